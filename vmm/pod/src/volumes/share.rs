//! The directory tree that a pod's guest sees.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, EmptyDirVolumeSource, Volume};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags};
use rustix::mount::{MountAttrFlags, UnmountFlags};

use super::mounts::{self, GUEST, Propagation};
use super::overlay::Layers;
use super::{Doing, MemoryVolume, NetworkFacts, VolumeError, etc, host_path, is_memory};
use crate::images::Image;
use crate::manifest::{PodManifest, Quantity};
use crate::oci;

const VOLUMES: &str = "volumes";
const ROOTS: &str = "rootfs";
const ETC: &str = "etc";

/// The tree: `rootfs/<container>`, `volumes/<name>` and `etc/{hosts,hostname,resolv.conf}`.
///
/// The guest can change what is beneath those, and nothing of the tree itself: for
/// everybody it is read-only, but for the descriptor held here. So no name in it
/// ever leads anywhere else (CVE-2020-2024, CVE-2020-2026), and the supervisor opens
/// nothing beneath a volume or a root once it is mounted.
///
/// Volumes are bound once, whatever the number of containers that mount them:
/// read-only if none of them may write. What one container may write and another
/// may not is a read-only mount in the guest.
#[derive(Debug)]
pub struct Share {
    /// What the guest gets: read-only, and shared, so that mounts appear in the jail
    /// of `hull-vmm`.
    root: OwnedFd,
    /// The same directory, writable, for mount points.
    writable: OwnedFd,
    /// The pod's directory on disk.
    data: PathBuf,
}

impl Share {
    /// Makes the (still empty) tree at `path`. `pod_data` is the pod's own directory
    /// below the data directory, for emptyDir volumes and the containers' writes.
    ///
    /// # Errors
    /// When a directory or mount can't be made.
    pub fn create(path: &Path, pod_data: &Path) -> Result<Self, VolumeError> {
        let doing = || format!("making the pod's share at {}", path.display());
        let place = open_directory(CWD, path).doing(doing)?;
        let tree = mounts::tmpfs("1m", "4k").doing(doing)?;
        for name in [VOLUMES, ROOTS, ETC] {
            rustix::fs::mkdirat(&tree, name, Mode::from_raw_mode(0o755)).doing(doing)?;
        }
        mounts::set_attributes(tree.as_fd(), MountAttrFlags::empty(), Propagation::Private)
            .doing(doing)?;
        mounts::cover(&tree, &place).doing(doing)?;
        let root = mounts::clone_tree(&tree).doing(doing)?;
        mounts::set_attributes(
            root.as_fd(),
            MountAttrFlags::MOUNT_ATTR_RDONLY,
            Propagation::Private,
        )
        .doing(doing)?;
        mounts::cover(&root, &tree).doing(doing)?;
        // Only what is attached can be shared.
        mounts::set_attributes(root.as_fd(), MountAttrFlags::empty(), Propagation::Shared)
            .doing(doing)?;
        Ok(Self {
            root,
            writable: tree,
            data: pod_data.to_owned(),
        })
    }

    /// An `O_PATH` descriptor of the tree's root, for `ShareConfig::root`.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Binds every volume that a container mounts, and returns those that the agent
    /// has to make.
    ///
    /// # Errors
    /// As [`super::check`], or when a mount fails.
    pub fn bind_volumes(&self, manifest: &PodManifest) -> Result<Vec<MemoryVolume>, VolumeError> {
        let uses = uses(manifest);
        let mut memory = Vec::new();
        for volume in manifest.spec().volumes.iter().flatten() {
            let Some(usage) = uses.get(volume.name.as_str()) else {
                continue;
            };
            match source(volume) {
                Source::HostPath(source) => {
                    self.bind(&volume.name, &host_path::open(source)?, *usage)?;
                }
                Source::Disk => {
                    let directory = self.empty_dir(manifest, &volume.name)?;
                    self.bind(&volume.name, &directory, *usage)?;
                }
                Source::Memory(source) => memory.push(memory_volume(&volume.name, source)),
            }
        }
        Ok(memory)
    }

    /// Writes `etc/hosts`, `etc/hostname` and `etc/resolv.conf`. Containers may change
    /// them, as they may under Kubernetes.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn write_etc(
        &self,
        manifest: &PodManifest,
        network: &NetworkFacts,
    ) -> Result<(), VolumeError> {
        let doing = || "writing the pod's files of /etc".to_owned();
        let hostname = oci::infra(manifest).hostname;
        // Its own file system, so that a container that fills it fills nothing else.
        let tree = mounts::tmpfs("1m", "64").doing(doing)?;
        let files = [
            ("hosts", etc::hosts(manifest, network).into_bytes()),
            ("hostname", format!("{hostname}\n").into_bytes()),
            (
                "resolv.conf",
                etc::resolv_conf(manifest, network).into_bytes(),
            ),
        ];
        for (name, content) in files {
            let mut file = std::fs::File::from(create_file(&tree, name).doing(doing)?);
            file.write_all(&content).doing(doing)?;
        }
        mounts::attach(&tree, &self.root, ETC).doing(doing)
    }

    /// Mounts a fresh root file system of an image at `rootfs/<name>`. What was
    /// written in an earlier one of that name is gone.
    ///
    /// It is writable, whatever the container's `readOnlyRootFilesystem`: the agent
    /// makes mount points in it before it makes it read-only for the container.
    ///
    /// # Errors
    /// When a directory or mount can't be made.
    pub fn mount_root(&self, name: &str, image: &Image) -> Result<(), VolumeError> {
        let doing = || {
            format!(
                "mounting the root file system {name} of {}",
                image.reference
            )
        };
        let directory = self.root_data(name)?;
        remove_tree(&directory).doing(doing)?;
        private_directory(&directory).doing(doing)?;
        self.remount_root(name, image)
    }

    /// The same with what has been written in it, which is on the pod's disk.
    ///
    /// # Errors
    /// When a directory or mount can't be made.
    pub fn remount_root(&self, name: &str, image: &Image) -> Result<(), VolumeError> {
        let doing = || {
            format!(
                "mounting the root file system {name} of {}",
                image.reference
            )
        };
        let directory = self.root_data(name)?;
        let overlay = Layers::prepare(&directory, &image.layers).doing(doing)?;
        let tree = overlay.mount().doing(doing)?;
        let place = format!("{ROOTS}/{name}");
        self.make_directory(&place).doing(doing)?;
        mounts::attach(&tree, &self.root, &place).doing(doing)
    }

    /// Puts a directory that somebody else has mounted at `rootfs/<name>`, with what is mounted beneath it.
    ///
    /// # Errors
    /// When it can't be mounted there.
    pub fn bind_root(&self, name: &str, root: &OwnedFd) -> Result<(), VolumeError> {
        let doing = || format!("binding the root file system {name}");
        self.root_data(name)?;
        let tree = mounts::clone_tree(root).doing(doing)?;
        mounts::set_attributes(tree.as_fd(), GUEST, Propagation::Private).doing(doing)?;
        let place = format!("{ROOTS}/{name}");
        self.make_directory(&place).doing(doing)?;
        mounts::attach(&tree, &self.root, &place).doing(doing)
    }

    /// Binds a file or directory of the host at `volumes/<name>`.
    ///
    /// # Errors
    /// When it can't be mounted there.
    pub fn bind_volume(
        &self,
        name: &str,
        source: &OwnedFd,
        read_only: bool,
    ) -> Result<(), VolumeError> {
        let usage = if read_only {
            Usage::ReadOnly
        } else {
            Usage::ReadWrite
        };
        self.bind(name, source, usage)
    }

    /// Takes `rootfs/<name>` away, with all that was written in it. That there is
    /// none is no error.
    ///
    /// # Errors
    /// When its files can't be removed.
    pub fn unmount_root(&self, name: &str) -> Result<(), VolumeError> {
        let doing = || format!("removing the root file system {name}");
        let directory = self.root_data(name)?;
        let place = format!("{ROOTS}/{name}");
        let path = format!("/proc/self/fd/{}/{place}", self.root.as_raw_fd());
        // At once for everybody; the file system goes with its last user.
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).doing(doing),
        }
        match rustix::fs::unlinkat(&self.writable, place.as_str(), AtFlags::REMOVEDIR) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error).doing(doing),
        }
        remove_tree(&directory).doing(doing)
    }

    fn root_data(&self, name: &str) -> Result<PathBuf, VolumeError> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(VolumeError::Refused(format!(
                "{name:?} is no name of a root file system"
            )));
        }
        Ok(self.data.join(ROOTS).join(name))
    }

    /// Binds a file or directory at `volumes/<name>`.
    fn bind(&self, name: &str, source: &OwnedFd, usage: Usage) -> Result<(), VolumeError> {
        let doing = || format!("binding volume {name}");
        let tree = mounts::clone_tree(source).doing(doing)?;
        let attributes = match usage {
            Usage::ReadOnly => GUEST | MountAttrFlags::MOUNT_ATTR_RDONLY,
            Usage::ReadWrite => GUEST,
        };
        // Private: what the host mounts beneath it later would come without these.
        mounts::set_attributes(tree.as_fd(), attributes, Propagation::Private).doing(doing)?;
        let place = format!("{VOLUMES}/{name}");
        let stat = rustix::fs::fstat(source).doing(doing)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.make_directory(&place).doing(doing)?;
        } else {
            create_file(&self.writable, &place).doing(doing)?;
        }
        mounts::attach(&tree, &self.root, &place).doing(doing)
    }

    /// Makes an emptyDir on the pod's disk: writable for all, of the pod's fsGroup.
    fn empty_dir(&self, manifest: &PodManifest, name: &str) -> Result<OwnedFd, VolumeError> {
        let path = self.data.join("emptydir").join(name);
        let doing = || format!("making emptyDir {}", path.display());
        // A pod that was put aside has it, as its containers have left it.
        let is_there = path.is_dir();
        private_directory(&path).doing(doing)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, &path, flags, Mode::empty()).doing(doing)?;
        if is_there {
            return Ok(directory);
        }
        let group = manifest
            .spec()
            .security_context
            .as_ref()
            .and_then(|context| context.fs_group);
        let mode = match group.and_then(|group| u32::try_from(group).ok()) {
            Some(group) => {
                rustix::fs::fchown(&directory, None, Some(Gid::from_raw(group))).doing(doing)?;
                // Files made in it are of the group, too.
                0o2777
            }
            None => 0o777,
        };
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode)).doing(doing)?;
        Ok(directory)
    }

    fn make_directory(&self, path: &str) -> rustix::io::Result<()> {
        match rustix::fs::mkdirat(&self.writable, path, Mode::from_raw_mode(0o755)) {
            Err(rustix::io::Errno::EXIST) => Ok(()),
            made => made,
        }
    }
}

/// What the pod's containers do with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Usage {
    ReadOnly,
    ReadWrite,
}

/// The volumes that containers mount. What none mounts, the guest doesn't see.
fn uses(manifest: &PodManifest) -> BTreeMap<&str, Usage> {
    let containers = manifest
        .init_containers()
        .iter()
        .chain(manifest.containers());
    let mut uses = BTreeMap::new();
    for mount in containers.flat_map(|container| container.volume_mounts.iter().flatten()) {
        let usage = if mount.read_only == Some(true) {
            Usage::ReadOnly
        } else {
            Usage::ReadWrite
        };
        let known = uses.entry(mount.name.as_str()).or_insert(usage);
        *known = usage.max(*known);
    }
    uses
}

/// Whether a container that joins the running pod can have the volumes that it mounts. They are
/// those of the pod's first containers, as they were bound for these.
///
/// # Errors
/// [`VolumeError::Refused`] with field and value.
pub fn check_joining(manifest: &PodManifest, container: &Container) -> Result<(), VolumeError> {
    let uses = uses(manifest);
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let wrong = match uses.get(mount.name.as_str()) {
            None => {
                "no container of the manifest mounts this volume, so the running pod does not have it"
            }
            Some(Usage::ReadOnly) if mount.read_only != Some(true) => {
                "the running pod has this volume read-only; mount it read-only"
            }
            Some(_) => continue,
        };
        return Err(VolumeError::Refused(format!(
            "container {}: volumeMounts[{index}].name: {:?}: {wrong}",
            container.name, mount.name
        )));
    }
    Ok(())
}

enum Source<'a> {
    HostPath(&'a k8s_openapi::api::core::v1::HostPathVolumeSource),
    Memory(&'a EmptyDirVolumeSource),
    /// An emptyDir on disk, which is also what a volume without a source is.
    Disk,
}

fn source(volume: &Volume) -> Source<'_> {
    match (&volume.host_path, &volume.empty_dir) {
        (Some(source), _) => Source::HostPath(source),
        (None, Some(source)) if is_memory(source) => Source::Memory(source),
        _ => Source::Disk,
    }
}

fn memory_volume(name: &str, source: &EmptyDirVolumeSource) -> MemoryVolume {
    let limit = source
        .size_limit
        .as_ref()
        .and_then(|limit| Quantity::parse(&limit.0).ok());
    MemoryVolume {
        name: name.to_owned(),
        size_bytes: limit.map_or(0, Quantity::units),
    }
}

fn open_directory(at: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

fn create_file(directory: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, path, flags, Mode::RUSR)?;
    // Whatever the umask.
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
    Ok(file)
}

fn private_directory(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Removes a tree without following any link in it.
fn remove_tree(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "share_tests.rs"]
pub(super) mod tests;
