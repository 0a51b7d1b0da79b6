//! A container's root file system: the image's layers, and above them what the
//! container writes.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountFlags, UnmountFlags};

use super::mounts::{self, GUEST};

/// mount(2) takes a page of options.
const MAX_OPTIONS: usize = 4095;

/// The directories of one overlay, on the pod's disk.
#[derive(Debug)]
pub struct Layers {
    /// Highest first, as overlayfs has them.
    lower: Vec<OwnedFd>,
    upper: OwnedFd,
    work: OwnedFd,
    /// For a mount(2) that is moved away at once.
    stage: PathBuf,
}

impl Layers {
    /// Makes fresh directories in `directory` for the layers of an image, lowest first.
    pub fn prepare(directory: &Path, layers: &[PathBuf]) -> io::Result<Self> {
        let make = |name: &str| -> io::Result<PathBuf> {
            let path = directory.join(name);
            match std::fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => Ok(path),
            }
        };
        let mut lower = layers
            .iter()
            .rev()
            .map(|path| open(path))
            .collect::<io::Result<Vec<_>>>()?;
        if lower.is_empty() {
            // An image may have no layers; an overlay has at least one.
            lower.push(open(&make("empty")?)?);
        }
        let is_new = !directory.join("upper").exists();
        let upper = open(&make("upper")?)?;
        if is_new {
            // The upper directory's owner and mode are those of the root.
            rustix::fs::fchmod(&reopen(&upper)?, Mode::from_raw_mode(0o755))?;
        }
        Ok(Self {
            lower,
            upper,
            work: open(&make("work")?)?,
            stage: make("stage")?,
        })
    }

    /// Mounts the overlay, not attached anywhere.
    pub fn mount(&self) -> io::Result<OwnedFd> {
        match self.mount_by_descriptor() {
            // Before Linux 6.5 layers can't be named one by one.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.mount_by_options(),
            mounted => mounted,
        }
    }

    /// With as many layers as overlayfs takes.
    fn mount_by_descriptor(&self) -> io::Result<OwnedFd> {
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "source", "hull")?;
        for layer in &self.lower {
            rustix::mount::fsconfig_set_string(&context, "lowerdir+", path_of(layer))?;
        }
        rustix::mount::fsconfig_set_string(&context, "upperdir", path_of(&self.upper))?;
        rustix::mount::fsconfig_set_string(&context, "workdir", path_of(&self.work))?;
        rustix::mount::fsconfig_create(&context)?;
        Ok(rustix::mount::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            GUEST,
        )?)
    }

    /// With mount(2). Descriptors make the options short: some 200 layers fit.
    fn mount_by_options(&self) -> io::Result<OwnedFd> {
        let lower: Vec<String> = self.lower.iter().map(path_of).collect();
        let (upper, work) = (path_of(&self.upper), path_of(&self.work));
        let options = format!(
            "lowerdir={},upperdir={upper},workdir={work}",
            lower.join(":")
        );
        if options.len() > MAX_OPTIONS {
            return Err(io::Error::other(
                "the image has too many layers for this kernel; Linux 6.5 takes more",
            ));
        }
        let options = CString::new(options).map_err(io::Error::other)?;
        rustix::mount::mount(
            "hull",
            &self.stage,
            "overlay",
            MountFlags::NODEV | MountFlags::NOSUID,
            &*options,
        )?;
        let tree = rustix::fs::openat(
            CWD,
            &self.stage,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(io::Error::from)
        .and_then(mounts::clone_tree);
        rustix::mount::unmount(&self.stage, UnmountFlags::DETACH)?;
        tree
    }
}

/// A name for a descriptor that needs no escaping and is short, whatever the
/// directory is called.
fn path_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

fn reopen(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(directory, ".", flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use super::super::share::tests::in_private_namespace;
    use super::*;

    /// Layers with a file each, `f<n>`, and `same` in all.
    fn layers(root: &Path, count: usize) -> Vec<PathBuf> {
        (0..count)
            .map(|number| {
                let path = root.join(format!("layer,{number}:x"));
                std::fs::create_dir(&path).unwrap();
                std::fs::write(path.join(format!("f{number}")), "").unwrap();
                std::fs::write(path.join("same"), number.to_string()).unwrap();
                path
            })
            .collect()
    }

    fn check(count: usize, mount: fn(&Layers) -> io::Result<OwnedFd>) {
        in_private_namespace(move |dir| {
            let paths = layers(dir, count);
            let work = dir.join("overlay");
            std::fs::create_dir(&work).unwrap();
            let overlay = Layers::prepare(&work, &paths).unwrap();
            let tree = mount(&overlay).unwrap();
            let root = PathBuf::from(path_of(&tree));
            assert_eq!(
                std::fs::read_to_string(root.join("same")).unwrap(),
                (count - 1).to_string()
            );
            std::fs::remove_file(root.join("f0")).unwrap();
            std::fs::write(root.join("new"), "x").unwrap();
            let whiteout = std::fs::symlink_metadata(work.join("upper/f0")).unwrap();
            assert!(whiteout.file_type().is_char_device());
            assert!(paths[0].join("f0").exists());
            assert!(work.join("upper/new").exists());
        });
    }

    #[test]
    fn layers_are_stacked_by_descriptor() {
        check(3, Layers::mount_by_descriptor);
    }

    #[test]
    fn layers_are_stacked_by_options() {
        check(3, Layers::mount_by_options);
    }

    #[test]
    fn many_layers_fit() {
        check(300, Layers::mount);
        check(150, Layers::mount_by_options);
    }

    #[test]
    fn an_image_without_layers_has_an_empty_root() {
        in_private_namespace(|dir| {
            let overlay = Layers::prepare(dir, &[]).unwrap();
            let tree = overlay.mount().unwrap();
            assert_eq!(std::fs::read_dir(path_of(&tree)).unwrap().count(), 0);
        });
    }
}
