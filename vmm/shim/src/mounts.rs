//! A container's root file system: what the snapshotter says is mounted, and bound into the pod's share.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use hull_pod::volumes::Share;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::bundle::Bundle;
use crate::failure::TaskError;
use crate::pod::RootMount;

/// mount(2) takes a page of options.
const MAX_OPTIONS: usize = 4095;
/// Options that are flags of mount(2). The others are the file system's own.
const FLAGS: &[(&str, MountFlags)] = &[
    ("rw", MountFlags::empty()),
    ("ro", MountFlags::RDONLY),
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("noatime", MountFlags::NOATIME),
    ("relatime", MountFlags::RELATIME),
    ("sync", MountFlags::SYNCHRONOUS),
    ("bind", MountFlags::BIND),
    ("rbind", MountFlags::BIND.union(MountFlags::REC)),
];

/// Makes a directory of the shim's own, if it isn't there yet.
///
/// # Errors
/// When it can't be made.
pub fn make_directory(path: &Path) -> Result<(), TaskError> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    made.map_err(|source| TaskError::Io {
        doing: format!("making {}", path.display()),
        source,
    })
}

/// Puts a container's root file system into the share, as `rootfs/NAME`. Without mounts it is the directory that the
/// specification names.
///
/// Nothing stays mounted but in the share.
///
/// # Errors
/// When something can't be mounted.
pub fn root(
    share: &Share,
    name: &str,
    bundle: &Bundle,
    mounts: &[RootMount],
) -> Result<(), TaskError> {
    let place = if mounts.is_empty() {
        let root = bundle
            .spec
            .root()
            .as_ref()
            .map(|root| root.path().as_path());
        bundle.path.join(root.unwrap_or(Path::new("rootfs")))
    } else {
        let place = bundle.path.join("rootfs");
        make_directory(&place)?;
        place
    };
    let io_error = |source: io::Error| TaskError::Io {
        doing: format!("mounting the root file system at {}", place.display()),
        source,
    };
    let mut mounted = 0;
    let bound = mounts
        .iter()
        .try_for_each(|mount| {
            mount_at(mount, &place)?;
            mounted += 1;
            Ok(())
        })
        .and_then(|()| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok(rustix::fs::openat(CWD, &place, flags, Mode::empty())?)
        })
        .map_err(io_error)
        .and_then(|root| Ok(share.bind_root(name, &root)?));
    for _ in 0..mounted {
        let gone = rustix::mount::unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        if let Err(error) = gone {
            tracing::warn!(%error, place = %place.display(), "unmounting");
        }
    }
    bound
}

fn mount_at(mount: &RootMount, place: &Path) -> io::Result<()> {
    let (flags, data) = options(&mount.options);
    if data.len() > MAX_OPTIONS {
        return Err(io::Error::other(format!(
            "the options of a {} are longer than mount(2) takes",
            mount.kind
        )));
    }
    if flags.contains(MountFlags::BIND) {
        // What else there is holds for the share as a whole.
        let flags = flags & (MountFlags::BIND | MountFlags::REC);
        return Ok(rustix::mount::mount(&mount.source, place, "", flags, None)?);
    }
    let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
    Ok(rustix::mount::mount(
        &mount.source,
        place,
        &mount.kind,
        flags | MountFlags::NODEV | MountFlags::NOSUID,
        &*data,
    )?)
}

fn options(given: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in given {
        match FLAGS.iter().find(|(name, _)| name == option) {
            Some((_, flag)) => flags |= *flag,
            None => data.push(option),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_told_from_a_file_systems_own() {
        let given = ["ro", "lowerdir=/a:/b", "rbind", "index=off"].map(String::from);

        let (flags, data) = options(&given);

        assert_eq!(
            flags,
            MountFlags::RDONLY | MountFlags::BIND | MountFlags::REC
        );
        assert_eq!(data, "lowerdir=/a:/b,index=off");
    }
}
