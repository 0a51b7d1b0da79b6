//! Why the agent did not do what it was asked.

use std::io;
use std::time::Duration;

use hull_machine::client::ConnectError;
use ttrpc::Code;

use crate::text::{cut, printable};

/// A text of the agent is cut to this many bytes.
pub(super) const TEXT_MAX: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("connecting to the agent")]
    Connect(#[source] ConnectError),
    #[error("getting random bytes for the guest")]
    Entropy(#[source] io::Error),
    #[error("sending a stream's number to the agent")]
    Stream(#[source] io::Error),
    #[error("the agent did not answer {call} within {} s", limit.as_secs())]
    TimedOut { call: &'static str, limit: Duration },
    #[error("the connection to the agent is lost")]
    Lost,
    /// The agent said no.
    #[error("{message}")]
    Refused { code: Code, message: String },
    /// Not a message of the protocol.
    #[error("{call}: {message}")]
    Protocol { call: &'static str, message: String },
}

impl AgentError {
    /// The code with which a shell says this, or 128 as runtimes say for what has never run.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Refused {
                code: Code::NOT_FOUND,
                ..
            } => 127,
            Self::Refused {
                code: Code::PERMISSION_DENIED,
                ..
            } => 126,
            _ => 128,
        }
    }
}

pub(super) async fn within<T>(
    call: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(AgentError::TimedOut { call, limit }))
}

pub(super) fn failure(call: &'static str, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Refused {
            code: status.code(),
            message: shown(status.message()),
        },
        ttrpc::Error::Socket(_)
        | ttrpc::Error::RemoteClosed
        | ttrpc::Error::LocalClosed
        | ttrpc::Error::Eof => AgentError::Lost,
        other => AgentError::Protocol {
            call,
            message: shown(&other.to_string()),
        },
    }
}

pub(super) fn shown(text: &str) -> String {
    printable(cut(text, TEXT_MAX).as_bytes())
}
