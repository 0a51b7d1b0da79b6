//! Why a pod ended that should not have.

use std::time::Duration;

use hull_machine::client::{LaunchError, PlugError, SnapshotError};
use hull_machine::control::ExitReason;

use super::installation::InstallationError;
use crate::agent::{AgentError, ExitStatus};
use crate::images::ImageError;
use crate::network::WiringError;
use crate::networks::NetworkError;
use crate::oci::SpecError;
use crate::state::StateError;
use crate::templates::TemplateError;
use crate::volumes::VolumeError;

#[derive(Debug, thiserror::Error)]
pub enum PodFailure {
    #[error("the pod's files")]
    State(#[from] StateError),
    #[error("Hull's own files")]
    Installation(#[from] InstallationError),
    #[error("opening {path}")]
    Open {
        path: String,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error("container {container}")]
    Spec {
        container: String,
        #[source]
        source: SpecError,
    },
    #[error("giving the machine a network interface")]
    Plug(#[from] PlugError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("making a template")]
    Snapshot(#[from] SnapshotError),
    #[error("starting the machine")]
    Launch(#[from] LaunchError),
    #[error("the machine ended")]
    MachineEnded(#[source] ExitReason),
    #[error(
        "the guest's agent was not ready after {} s (HULL_TIMEOUT_SCALE gives slow machines more time)",
        .0.as_secs()
    )]
    AgentNotReady(Duration),
    #[error("asking the guest's agent")]
    Agent(#[source] AgentError),
    #[error("the guest's agent is gone")]
    AgentLost,
    #[error("the pod's infra process ended with code {}", .0.code)]
    InfraEnded(ExitStatus),
    #[error("init container {container} ended with code {code}")]
    InitFailed { container: String, code: i32 },
    /// Not a failure, but as much the end of a start.
    #[error("the pod was stopped")]
    Stopped,
    #[error("a task of the supervisor")]
    Task(#[from] tokio::task::JoinError),
}

impl PodFailure {
    /// One word, as `hull ps` shows it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::State(_) | Self::Open { .. } | Self::Task(_) => "SupervisorError",
            Self::Installation(_) | Self::Launch(_) => "MachineNotStarted",
            Self::Image(_) => "ImageError",
            Self::Volume(_) => "VolumeError",
            Self::Template(_) | Self::Snapshot(_) => "TemplateError",
            Self::Network(_) | Self::Wiring(_) | Self::Plug(_) => "NetworkError",
            Self::Spec { .. } => "SpecError",
            Self::MachineEnded(ExitReason::Panic) => "GuestPanic",
            Self::MachineEnded(_) => "MachineEnded",
            Self::AgentNotReady(_) => "AgentNotReady",
            Self::Agent(_) => "AgentError",
            Self::AgentLost => "AgentLost",
            Self::InfraEnded(_) => "InfraEnded",
            Self::InitFailed { .. } => "InitFailed",
            Self::Stopped => "Stopped",
        }
    }

    /// Whether the end of the guest's console may tell more.
    #[must_use]
    pub fn concerns_the_guest(&self) -> bool {
        matches!(
            self,
            Self::Launch(_)
                | Self::MachineEnded(_)
                | Self::AgentNotReady(_)
                | Self::Agent(_)
                | Self::AgentLost
                | Self::InfraEnded(_)
        )
    }
}

impl From<AgentError> for PodFailure {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::Lost => Self::AgentLost,
            error => Self::Agent(error),
        }
    }
}
