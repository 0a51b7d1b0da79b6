//! Volumes and root file systems: assembled on the host, bound under the pod's share.
//!
//! Order of calls, all by the supervisor: [`check`] before anything is started;
//! [`enter_private_namespace`] while it has one thread; [`Share::create`],
//! [`Share::bind_volumes`], [`Share::write_etc`], then [`Share::mount_root`] for
//! each container, also while the machine runs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::images::Image;
use crate::manifest::PodManifest;

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

/// The directory tree that the guest sees: `rootfs/<container>`, `volumes/<name>`
/// and `etc/{hosts,hostname,resolv.conf}`. Guest root can change what is beneath
/// those, and nothing of the tree itself: it is read-only but for the descriptor
/// held here.
#[derive(Debug)]
pub struct Share {
    root: OwnedFd,
    path: PathBuf,
    data: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A fault of the manifest or of what it points to, with field and value.
    #[error("{0}")]
    Refused(String),
    #[error("{doing}: {source}")]
    Io {
        doing: String,
        source: std::io::Error,
    },
}

/// Looks at what the volumes of a pod point to; changes nothing.
///
/// # Errors
/// [`VolumeError::Refused`] when a host path is missing or not of its type.
pub fn check(manifest: &PodManifest) -> Result<Vec<Notice>, VolumeError> {
    let _ = manifest;
    Ok(Vec::new())
}

/// Gives the calling thread, and all that it starts from now on, mounts of its own
/// that no other process of the host sees. Call it before any thread is started.
///
/// # Errors
/// When the caller may not.
pub fn enter_private_namespace() -> Result<(), VolumeError> {
    Ok(())
}

impl Share {
    /// Makes the (still empty) tree at `path`. `pod_data` is the pod's own directory
    /// below the data directory, for emptyDir volumes and the containers' writes.
    ///
    /// # Errors
    /// When a directory or mount can't be made.
    pub fn create(path: &Path, pod_data: &Path) -> Result<Self, VolumeError> {
        let root = std::fs::File::open(path).map_err(|source| VolumeError::Io {
            doing: format!("opening {}", path.display()),
            source,
        })?;
        Ok(Self {
            root: root.into(),
            path: path.to_owned(),
            data: pod_data.to_owned(),
        })
    }

    /// An `O_PATH` descriptor of the tree's root, for `ShareConfig::root`.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Binds every volume of the pod, and returns those that the agent has to make.
    ///
    /// # Errors
    /// As [`check`], or when a mount fails.
    pub fn bind_volumes(&self, manifest: &PodManifest) -> Result<Vec<MemoryVolume>, VolumeError> {
        let _ = (manifest, &self.path, &self.data);
        Ok(Vec::new())
    }

    /// Writes `etc/hosts`, `etc/hostname` and `etc/resolv.conf`.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn write_etc(&self, manifest: &PodManifest) -> Result<(), VolumeError> {
        let _ = manifest;
        Ok(())
    }

    /// Mounts a fresh root file system of an image at `rootfs/<name>`. What was
    /// written in an earlier one of that name is gone.
    ///
    /// # Errors
    /// When a directory or mount can't be made.
    pub fn mount_root(&self, name: &str, image: &Image) -> Result<(), VolumeError> {
        let _ = (name, image);
        Ok(())
    }

    /// Takes `rootfs/<name>` away, with all that was written in it.
    ///
    /// # Errors
    /// When it is still in use, or its files can't be removed.
    pub fn unmount_root(&self, name: &str) -> Result<(), VolumeError> {
        let _ = name;
        Ok(())
    }
}
