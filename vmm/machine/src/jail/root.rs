//! The jail's root file system: `shares/N`, and nothing else.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use super::{AtStep, JailError, Step};

/// Where the new root is mounted until it is the root. Any directory does; this one is always there.
const STAGE: &str = "/proc";

/// The mounts of each share, detached: nothing has a path to them yet.
pub(super) fn copy_mounts(shares: &[OwnedFd]) -> Result<Vec<OwnedFd>, JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    shares
        .iter()
        .enumerate()
        .map(|(index, share)| rustix::mount::open_tree(share, "", flags).at(Step::CopyShare(index)))
        .collect()
}

/// A mount of our `/proc/self/fd` alone. An ordinary descriptor would lead through `..`
/// to all of procfs, where root may write to the host's `/proc/sys`.
pub(super) fn proc_self_fd() -> Result<OwnedFd, JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, "/proc/self/fd", flags).at(Step::ProcSelfFd)
}

/// For standard input, output and error.
pub(super) fn dev_null() -> Result<OwnedFd, JailError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open("/dev/null", flags, Mode::empty()).at(Step::DevNull)
}

/// Makes the root, moves the shares in, and leaves the host's mounts for good.
/// Gives the path of each share.
pub(super) fn enter(trees: Vec<OwnedFd>) -> Result<Vec<PathBuf>, JailError> {
    let root = tmpfs().at(Step::MakeRoot)?;
    rustix::mount::move_mount(
        &root,
        "",
        CWD,
        STAGE,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .at(Step::MakeRoot)?;
    pivot(&root).at(Step::EnterRoot)?;
    drop(root);

    rustix::fs::mkdir("/shares", Mode::RWXU).at(Step::MakeRoot)?;
    let mut shares = Vec::with_capacity(trees.len());
    for (index, tree) in trees.into_iter().enumerate() {
        let path = PathBuf::from(format!("/shares/{index}"));
        mount_share(&path, &tree).at(Step::MountShare(index))?;
        shares.push(path);
    }

    let read_only = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    rustix::mount::mount_remount("/", read_only, "").at(Step::MakeRoot)?;
    Ok(shares)
}

/// A few directories' worth of memory, not attached anywhere.
fn tmpfs() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_set_string(&context, "size", "64k")?;
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
}

/// pivot_root(2), with the old root stacked on the new one for a moment, so that no directory is made for it.
fn pivot(root: &OwnedFd) -> rustix::io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    // What is above is the old root, with all the host's mounts.
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

fn mount_share(path: &Path, tree: &OwnedFd) -> rustix::io::Result<()> {
    rustix::fs::mkdir(path, Mode::RWXU)?;
    rustix::mount::move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    // The supervisor's later mounts come in; nothing goes out.
    rustix::mount::mount_change(
        path,
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
}
