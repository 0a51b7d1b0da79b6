//! What can go wrong with images.

use std::path::Path;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("image {0} is not in the local store; load it with: hull load FILE")]
    NotFound(String),
    #[error("image {reference:?}: {message}")]
    BadReference { reference: String, message: String },
    #[error("image {0} is in use by a running pod; stop the pod first")]
    InUse(String),
    /// The archive or layout is not what it should be.
    #[error("{path}: {message}")]
    Archive { path: String, message: String },
    /// The store itself can't be read or written.
    #[error("image store: {doing}: {source}")]
    Store {
        doing: String,
        source: std::io::Error,
    },
    #[error("image store: {path} is damaged: {message}; remove the image and load it again")]
    Damaged { path: String, message: String },
}

impl ImageError {
    pub(super) fn archive(path: &Path, message: impl std::fmt::Display) -> Self {
        Self::Archive {
            path: path.display().to_string(),
            message: message.to_string(),
        }
    }

    pub(super) fn store(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Store { doing, source }
    }

    pub(super) fn damaged(path: &Path, message: impl std::fmt::Display) -> Self {
        Self::Damaged {
            path: path.display().to_string(),
            message: message.to_string(),
        }
    }
}
