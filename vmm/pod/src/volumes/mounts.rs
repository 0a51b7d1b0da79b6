//! Mounts made and changed by descriptor, so that no path is looked up twice.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
};
use rustix::thread::UnshareFlags;

use super::{Doing, VolumeError};

/// On all that the guest sees: what it makes of devices and setuid bits counts in the
/// guest, never on the host.
pub const GUEST: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NODEV.union(MountAttrFlags::MOUNT_ATTR_NOSUID);

/// Gives the calling thread, and all that it starts from now on, mounts of its own
/// that no other process of the host sees. Call it before any thread is started.
///
/// What the host unmounts is unmounted here, too, so that nothing is kept busy.
///
/// # Errors
/// When the caller may not.
pub fn enter_private_namespace() -> Result<(), VolumeError> {
    // SAFETY: only the mount namespace (and with it root and working directory) is
    // unshared, no descriptor table on which safety could depend.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .doing(|| "making a mount namespace (needs root)".to_owned())?;
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .doing(|| "separating the mounts from the host's".to_owned())
}

/// An empty tmpfs, not attached anywhere.
pub fn tmpfs(size: &str, inodes: &str) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [
        ("source", "hull"),
        ("mode", "0755"),
        ("size", size),
        ("nr_inodes", inodes),
    ] {
        rustix::mount::fsconfig_set_string(&context, key, value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        GUEST | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?)
}

/// A copy of the mounts at and beneath a file or directory, not attached anywhere.
pub fn clone_tree(fd: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(rustix::mount::open_tree(fd, "", flags)?)
}

/// Attaches a tree at a path beneath a directory. A symbolic link there is not followed.
pub fn attach(tree: impl AsFd, directory: impl AsFd, path: &str) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        tree,
        "",
        directory,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

/// Attaches a tree on top of a directory.
pub fn cover(tree: impl AsFd, directory: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(tree, "", directory, "", flags)?)
}

/// How mounts that appear in or beneath a tree spread.
#[derive(Debug, Clone, Copy)]
pub enum Propagation {
    /// To nowhere and from nowhere.
    Private,
    /// To its copies, and from them.
    Shared,
}

/// Sets attributes on a whole tree of mounts.
pub fn set_attributes(
    tree: BorrowedFd<'_>,
    set: MountAttrFlags,
    propagation: Propagation,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set.bits().into(),
        attr_clr: 0,
        propagation: match propagation {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::Shared => libc::MS_SHARED,
        },
        userns_fd: 0,
    };
    let empty: &CStr = c"";
    // SAFETY: the path and the structure outlive the call, and its size is the
    // structure's.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
