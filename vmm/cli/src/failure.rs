//! Why a command failed, and the exit code that says so.

use std::io;
use std::process::ExitCode;

use hull_machine::channel::SocketError;
use hull_pod::client::ClientError;
use hull_pod::configuration::ConfigurationError;
use hull_pod::images::ImageError;
use hull_pod::manifest::ManifestError;
use hull_pod::networks::NetworkError;
use hull_pod::snapshots::SnapshotError;
use hull_pod::state::StateError;
use hull_pod::supervisor::{InstallationError, PodFailure, SupervisorError};
use hull_pod::templates::TemplateError;
use hull_pod::text::chain;
use hull_pod::timeline::TimelineError;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The user's to mend. Nothing was started.
    #[error("{0}")]
    Input(String),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    #[error("{0}")]
    Failed(String),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Timeline(#[from] TimelineError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Installation(#[from] InstallationError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("making a template")]
    Machine(#[from] PodFailure),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    /// Printing as another format.
    #[error("formatting the output: {0}")]
    Format(String),
    /// Said already, or another program's code to pass on.
    #[error("exit code {0}")]
    Exit(u8),
    /// With a code of its own.
    #[error("{failure}")]
    WithCode { code: u8, failure: Box<Failure> },
}

impl Failure {
    pub fn io(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            doing: doing.into(),
            source: source.into(),
        }
    }

    /// The same with another exit code.
    #[must_use]
    pub fn with_code(self, code: u8) -> Self {
        match self {
            Self::Exit(_) | Self::WithCode { .. } => self,
            failure => Self::WithCode {
                code,
                failure: Box::new(failure),
            },
        }
    }

    /// Says it, and gives the code.
    pub fn report(self) -> ExitCode {
        if !self.is_silent() {
            eprintln!("hull: {}", self.text());
        }
        ExitCode::from(self.code())
    }

    fn text(&self) -> String {
        match self {
            Self::WithCode { failure, .. } => failure.text(),
            failure => chain(failure),
        }
    }

    fn code(&self) -> u8 {
        match self {
            Self::Input(_)
            | Self::Manifest(_)
            | Self::Configuration(_)
            | Self::Template(TemplateError::BadPolicy(_))
            | Self::Snapshot(
                SnapshotError::NotEmpty(_)
                | SnapshotError::Taken(_)
                | SnapshotError::Left { .. }
                | SnapshotError::None(_),
            )
            | Self::Network(NetworkError::Refused(_) | NetworkError::NoSuchNetwork(_)) => 2,
            Self::Exit(code) | Self::WithCode { code, .. } => *code,
            _ => 1,
        }
    }

    /// Said already; or nobody is there any more to hear it, as with `hull logs | head`.
    fn is_silent(&self) -> bool {
        match self {
            Self::Exit(_) => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::BrokenPipe,
            _ => false,
        }
    }
}

/// A process's exit code as ours.
pub fn exit(code: i32) -> Result<(), Failure> {
    match u8::try_from(code) {
        Ok(0) => Ok(()),
        Ok(code) => Err(Failure::Exit(code)),
        Err(_) => Err(Failure::Exit(255)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_input_is_2_and_other_failures_are_1() {
        assert_eq!(Failure::Input(String::new()).code(), 2);
        assert_eq!(Failure::Failed(String::new()).code(), 1);
    }

    #[test]
    fn a_code_of_its_own_is_given_once() {
        let failure = Failure::Failed("x".into()).with_code(127).with_code(125);

        assert_eq!(failure.code(), 127);
        assert_eq!(failure.text(), "x");
    }

    #[test]
    fn codes_pass_through() {
        assert!(exit(0).is_ok());
        assert!(matches!(exit(137), Err(Failure::Exit(137))));
    }
}
