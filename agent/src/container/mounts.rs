//! What a container sees of the pod's share and memory volumes.
//!
//! Containers may change what lies beneath a volume at any time. So a path is
//! resolved once, beneath its volume, into a descriptor; what it names is cloned as
//! a mount of its own; and only that mount's place, where no container comes, is
//! given to libcontainer.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fchmod, fstat, mkdirat, openat2};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

use crate::error::{Doing, Error, Result};

/// Most parts of a sub-path.
const MAX_DEPTH: usize = 64;
/// The first parts of a share path are the host's: "volumes/NAME", "rootfs/NAME".
const SHARE_PARTS: usize = 2;

/// A mount in the container's directory, gone when this is dropped. The container
/// has its own copy by then.
#[derive(Debug)]
pub struct Placed {
    pub path: PathBuf,
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            tracing::warn!("unmounting {}: {error}", self.path.display());
        }
    }
}

/// Opens a path of the share ("volumes/NAME[/SUBPATH]"), making missing
/// directories of the sub-path.
pub fn open_shared(share: &Path, path: &str) -> Result<OwnedFd> {
    let parts = parts(path)?;
    if parts.len() < SHARE_PARTS {
        return Err(Error::Invalid(format!(
            "{path:?} is no volume or root file system of the share"
        )));
    }
    let (fixed, sub) = parts.split_at(SHARE_PARTS);
    let fixed: PathBuf = fixed.iter().collect();
    let share = open_directory(share)?;
    let volume = open_either(
        &share,
        &fixed,
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
    .doing(|| format!("opening {} of the share", fixed.display()))?;
    beneath(volume, sub)
}

/// Opens a memory volume ("NAME[/SUBPATH]").
pub fn open_memory(volumes: &Path, path: &str) -> Result<OwnedFd> {
    let parts = parts(path)?;
    let Some((name, sub)) = parts.split_first() else {
        return Err(Error::Invalid("a memory volume has no name".into()));
    };
    let volume = openat2(
        open_directory(volumes)?,
        *name,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
    .doing(|| format!("opening memory volume {name:?}"))?;
    beneath(volume, sub)
}

/// Clones what `fd` names as a mount at `path`.
pub fn place(fd: impl AsFd, path: PathBuf) -> Result<Placed> {
    let is_directory = is_directory(&fd)?;
    let made = if is_directory {
        fs::create_dir(&path)
    } else {
        File::create_new(&path).map(drop)
    };
    made.doing(|| format!("making {}", path.display()))?;
    let tree = open_tree(
        fd,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE,
    )
    .doing(|| format!("cloning a mount for {}", path.display()))?;
    move_mount(
        tree,
        "",
        CWD,
        &path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .doing(|| format!("mounting {}", path.display()))?;
    Ok(Placed { path })
}

/// Refuses a root file system in which a directory that the runtime works in is a
/// link: youki follows it when it makes device nodes.
pub fn check_root(root: impl AsFd) -> Result<()> {
    for name in ["dev", "proc", "sys"] {
        match openat2(
            &root,
            name,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        ) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(Errno::LOOP | Errno::NOTDIR) => {
                return Err(Error::Invalid(format!(
                    "/{name} of the root file system is not a directory"
                )));
            }
            Err(error) => {
                return Err(error).doing(|| format!("looking at /{name} of the root file system"));
            }
        }
    }
    Ok(())
}

/// Makes a missing working directory within a root file system, as other runtimes do.
pub fn make_directory(root: impl AsFd, path: &Path) -> Result<()> {
    let doing = || format!("making the working directory {}", path.display());
    let mut sofar = PathBuf::from(".");
    for part in path
        .components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
    {
        let parent = sofar.clone();
        sofar.push(part);
        let open = |path: &Path| {
            openat2(
                &root,
                path,
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            )
        };
        match (open(&sofar), part) {
            (Ok(_), _) => {}
            (Err(Errno::NOENT), Component::Normal(name)) => {
                let parent = open(&parent).doing(doing)?;
                match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error).doing(doing),
                }
            }
            (Err(error), _) => return Err(error).doing(doing),
        }
    }
    Ok(())
}

fn parts(path: &str) -> Result<Vec<&str>> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let plain = |part: &&str| *part != "." && *part != ".." && !part.contains('\0');
    if path.starts_with('/') || parts.len() > MAX_DEPTH || !parts.iter().all(plain) {
        return Err(Error::Invalid(format!(
            "{path:?} must be a relative path without . and .."
        )));
    }
    Ok(parts)
}

/// Opens a directory of the agent's own.
pub fn open_directory(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("opening {}", path.display()))
}

/// Opens a directory, else whatever is there. Only the first makes the kernel mount
/// what the share announces as a mount of the host.
fn open_either(at: impl AsFd, path: &Path, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match openat2(&at, path, flags | OFlags::DIRECTORY, Mode::empty(), resolve) {
        Err(Errno::NOTDIR) => openat2(at, path, flags, Mode::empty(), resolve),
        other => other,
    }
}

/// Opens a sub-path. Links within the volume are followed, beyond it refused.
fn beneath(volume: OwnedFd, sub: &[&str]) -> Result<OwnedFd> {
    if sub.is_empty() {
        return Ok(volume);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let text = || format!("opening the sub-path {:?}", sub.join("/"));
    let whole: PathBuf = sub.iter().collect();
    let mut sofar = PathBuf::new();
    for part in sub {
        let parent = sofar.clone();
        sofar.push(part);
        match open_either(&volume, &sofar, resolve) {
            Ok(_) => {}
            Err(Errno::NOENT) => {
                // Reading: mkdirat does not take a path descriptor's mode along.
                let at = if parent.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    &parent
                };
                let parent = open_either(&volume, at, resolve).doing(text)?;
                make_like_volume(&volume, &parent, part).doing(text)?;
            }
            Err(error) => return Err(error).doing(text),
        }
    }
    open_either(&volume, &whole, resolve).doing(text)
}

/// Makes a directory with the mode of the volume's own, as the kubelet does.
fn make_like_volume(volume: &OwnedFd, parent: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode(fstat(volume)?.st_mode & 0o7777);
    match mkdirat(parent, name, mode) {
        Err(Errno::EXIST) => return Ok(()),
        other => other?,
    }
    let made = openat2(
        parent,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH,
    )?;
    // The process's umask took bits away.
    fchmod(made, mode)
}

fn is_directory(fd: impl AsFd) -> Result<bool> {
    let status = fstat(fd).doing(|| "looking at a mount's source".into())?;
    Ok(FileType::from_raw_mode(status.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    /// A share with volumes/v and volumes/other.
    fn share() -> tempfile::TempDir {
        let share = tempfile::tempdir().unwrap();
        for volume in ["v", "other"] {
            fs::create_dir_all(share.path().join("volumes").join(volume)).unwrap();
        }
        share
    }

    fn inode(fd: &OwnedFd) -> u64 {
        fstat(fd).unwrap().st_ino
    }

    #[test]
    fn a_missing_sub_path_is_made_with_the_volumes_mode() {
        let share = share();
        let volume = share.path().join("volumes/v");
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2777)).unwrap();

        let fd = open_shared(share.path(), "volumes/v/a/b").unwrap();

        let made = fs::metadata(volume.join("a/b")).unwrap();
        assert_eq!(made.ino(), inode(&fd));
        assert_eq!(made.permissions().mode() & 0o7777, 0o2777);
    }

    #[test]
    fn links_are_followed_within_the_volume_only() {
        let share = share();
        let volume = share.path().join("volumes/v");
        fs::create_dir(volume.join("real")).unwrap();
        symlink("real", volume.join("inside")).unwrap();
        symlink("../other", volume.join("sideways")).unwrap();
        symlink("/etc", volume.join("absolute")).unwrap();

        let inside = open_shared(share.path(), "volumes/v/inside").unwrap();
        let real = fs::metadata(volume.join("real")).unwrap();
        assert_eq!(inode(&inside), real.ino());
        for path in ["volumes/v/sideways", "volumes/v/absolute/x"] {
            assert!(open_shared(share.path(), path).is_err(), "{path}");
        }
    }

    #[test]
    fn the_hosts_parts_of_a_path_are_never_links() {
        let share = share();
        symlink("v", share.path().join("volumes/alias")).unwrap();
        assert!(open_shared(share.path(), "volumes/alias").is_err());
    }

    #[test]
    fn paths_with_dots_and_absolute_paths_are_refused() {
        let share = share();
        for path in [
            "volumes",
            "/volumes/v",
            "volumes/../v",
            "volumes/v/..",
            "volumes/v/./x",
            "",
        ] {
            assert!(open_shared(share.path(), path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn a_file_is_opened_too() {
        let share = share();
        fs::write(share.path().join("volumes/v/f"), "x").unwrap();
        let fd = open_shared(share.path(), "volumes/v/f").unwrap();
        assert!(!is_directory(&fd).unwrap());
    }

    #[test]
    fn a_root_whose_dev_is_a_link_is_refused() {
        let root = tempfile::tempdir().unwrap();
        assert!(check_root(open_directory(root.path()).unwrap()).is_ok());
        symlink("/run", root.path().join("dev")).unwrap();
        assert!(check_root(open_directory(root.path()).unwrap()).is_err());
    }

    #[test]
    fn a_working_directory_is_made_beneath_the_root() {
        let root = tempfile::tempdir().unwrap();
        symlink("/srv", root.path().join("link")).unwrap();
        fs::create_dir(root.path().join("srv")).unwrap();
        let fd = open_directory(root.path()).unwrap();

        make_directory(&fd, Path::new("/link/../link/app/x")).unwrap();

        assert!(root.path().join("srv/app/x").is_dir());
    }
}
