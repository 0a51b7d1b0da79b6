//! Why a call failed, as containerd understands it.

use hull_pod::agent::AgentError;
use hull_pod::supervisor::{DisksError, PodFailure, RewireError};
use hull_pod::text::chain;
use hull_pod::volumes::VolumeError;
use ttrpc::Code;

use crate::bundle::BundleError;
use crate::hooks::HookError;
use crate::logger::LoggerError;
use crate::options::OptionsError;
use crate::spec::SpecError;
use crate::streams::StreamError;

#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("there is no container {0:?} here")]
    NoTask(String),
    #[error("container {container:?} has no process {exec:?}")]
    NoExec { container: String, exec: String },
    #[error("{0:?} is here already")]
    Exists(String),
    /// What containerd takes for "it is done".
    #[error("{0:?} has ended: process already finished")]
    Ended(String),
    #[error("{id:?} is {is}, and would have to be {must}")]
    State {
        id: String,
        is: &'static str,
        must: &'static str,
    },
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("reading {what}")]
    Json {
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Logger(#[from] LoggerError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Disk(#[from] DisksError),
    #[error("the pod's network")]
    Network(#[from] RewireError),
    #[error(transparent)]
    Pod(#[from] PodFailure),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("a task of the shim")]
    Task(#[from] tokio::task::JoinError),
}

impl TaskError {
    /// Whether the guest has said no, or there was none to ask.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        match self {
            Self::Agent(error) => matches!(error, AgentError::Refused { .. }),
            _ => true,
        }
    }

    /// Whether what was asked of a process came after its end.
    #[must_use]
    pub fn is_too_late(&self) -> bool {
        match self {
            Self::Agent(error) => matches!(
                error,
                AgentError::Lost
                    | AgentError::Refused {
                        code: Code::FAILED_PRECONDITION,
                        ..
                    }
            ),
            Self::Pod(PodFailure::Stopped) => true,
            _ => false,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoTask(_) | Self::NoExec { .. } | Self::Ended(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Options(_) | Self::Bundle(_) | Self::Spec(_) | Self::Json { .. } => {
                Code::INVALID_ARGUMENT
            }
            // The agent's other codes would say things of the task that aren't so.
            Self::Agent(AgentError::Refused {
                code: code @ (Code::INVALID_ARGUMENT | Code::FAILED_PRECONDITION),
                ..
            }) => *code,
            _ => Code::UNKNOWN,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}
