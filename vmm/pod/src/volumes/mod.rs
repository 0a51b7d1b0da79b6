//! Volumes and root file systems: assembled on the host, bound under the pod's share.
//!
//! Order of calls, all by the supervisor: [`check`] before anything is started;
//! [`enter_private_namespace`] while it has one thread; [`Share::create`],
//! [`Share::bind_volumes`], [`Share::write_etc`], then [`Share::mount_root`] for
//! each container, also while the machine runs.

mod etc;
mod host_path;
mod mounts;
mod overlay;
mod share;

use std::io;

pub use etc::NetworkFacts;
pub use host_path::check;
use k8s_openapi::api::core::v1::EmptyDirVolumeSource;
pub use mounts::enter_private_namespace;
pub use share::{Share, check_joining};

/// Something that the user should know and that stops nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice(pub String);

/// An emptyDir with medium Memory, which the agent makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryVolume {
    pub name: String,
    /// 0: no limit but the guest's.
    pub size_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A fault of the manifest or of what it points to, with file, field and value.
    #[error("{0}")]
    Refused(String),
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
}

/// Says what was being done when a call failed.
trait Doing<T> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, VolumeError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, VolumeError> {
        self.map_err(|error| VolumeError::Io {
            doing: doing(),
            source: error.into(),
        })
    }
}

/// Whether an emptyDir is of the guest's memory.
#[must_use]
pub fn is_memory(source: &EmptyDirVolumeSource) -> bool {
    source.medium.as_deref() == Some("Memory")
}
