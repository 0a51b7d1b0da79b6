//! What can go wrong in a call, and how the supervisor is told.

use std::io;

use ttrpc::{Code, get_status};

/// Longest error text that leaves the guest, in bytes.
const MAX_TEXT: usize = 1024;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong; sending it again won't help.
    #[error("{0}")]
    Invalid(String),
    #[error("{kind} {id:?} does not exist")]
    NotFound { kind: &'static str, id: String },
    #[error("{kind} {id:?} already exists")]
    Exists { kind: &'static str, id: String },
    /// The call does not fit what the pod or container is doing.
    #[error("{0}")]
    State(String),
    #[error("no more than {limit} {what} at a time")]
    TooMany { what: &'static str, limit: usize },
    #[error("stream {0} was not opened in time")]
    StreamMissing(u64),
    #[error("nothing listens on port {port} of the pod")]
    NothingListens { port: u16 },
    #[error("{program:?} is not in the container's file system or PATH")]
    ProgramNotFound { program: String },
    #[error("{program:?} can't be executed by the container's user")]
    ProgramNotExecutable { program: String },
    /// libcontainer, in the process made for it, could not do what was asked.
    #[error("{doing}: {text}")]
    Helper { doing: &'static str, text: String },
    #[error("{doing}: {source}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
}

/// Result of the agent's fallible operations.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::NotFound { .. } | Self::ProgramNotFound { .. } => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::TooMany { .. } => Code::RESOURCE_EXHAUSTED,
            Self::StreamMissing(_) => Code::DEADLINE_EXCEEDED,
            Self::NothingListens { .. } => Code::UNAVAILABLE,
            Self::ProgramNotExecutable { .. } => Code::PERMISSION_DENIED,
            Self::Helper { .. } | Self::Io { .. } => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(get_status(
            error.code(),
            shorten(&error.to_string(), MAX_TEXT),
        ))
    }
}

/// Says what was being done when a system call failed.
pub trait Doing<T> {
    /// Names the operation and what it was done to.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::Io {
            doing: what(),
            source: error.into(),
        })
    }
}

/// The longest beginning of `text` that has at most `limit` bytes.
pub fn shorten(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_between_characters() {
        let text = "aé".repeat(600);
        let cut = shorten(&text, 1025);
        assert_eq!(cut.len(), 1024);
        assert!(text.starts_with(cut));
    }

    #[test]
    fn a_status_is_bounded() {
        let status = match ttrpc::Error::from(Error::Invalid("x".repeat(5000))) {
            ttrpc::Error::RpcStatus(status) => status,
            other => panic!("not a status: {other}"),
        };
        assert_eq!(status.message.len(), MAX_TEXT);
        assert_eq!(status.code(), Code::INVALID_ARGUMENT);
    }
}
