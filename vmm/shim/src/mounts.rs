//! A container's root file system. What the snapshotter says is mounted, and bound into the pod's share; a disk is
//! given to the machine as it is, and mounted there.

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use hull_pod::volumes::Share;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

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

/// File systems of disks that are the guest's to mount.
const ON_DISK: [&str; 2] = ["ext4", "xfs"];
/// What is mounted here: file systems of the host's own, that have no content of a container's but as files.
const MOUNTED: [&str; 6] = ["bind", "rbind", "", "overlay", "btrfs", "zfs"];

/// A root file system on a disk, open.
#[derive(Debug)]
pub struct Disk {
    pub file: File,
    pub file_system: String,
    pub read_only: bool,
    /// The file system's own.
    pub options: Vec<String>,
}

/// The mount of a root file system that is a disk with a file system: of the snapshotters devmapper and blockfile.
#[must_use]
pub fn on_disk(mounts: &[RootMount]) -> Option<&RootMount> {
    match mounts {
        [mount] if ON_DISK.contains(&mount.kind.as_str()) => Some(mount),
        _ => None,
    }
}

impl Disk {
    /// Opens the block device or file that a mount names.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open(mount: &RootMount) -> Result<Self, TaskError> {
        let (flags, options) = split(&mount.options);
        let read_only = flags.contains(MountFlags::RDONLY);
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(&mount.source)
            .map_err(|source| TaskError::Io {
                doing: format!("opening the root file system's disk {}", mount.source),
                source,
            })?;
        Ok(Self {
            file,
            file_system: mount.kind.clone(),
            read_only,
            // mount(8)'s way to say that it is a file.
            options: options
                .into_iter()
                .filter(|option| *option != "loop")
                .map(str::to_owned)
                .collect(),
        })
    }
}

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
    if !MOUNTED.contains(&mount.kind.as_str()) {
        return Err(io::Error::other(format!(
            "a root file system of type {:?} can't be given to a pod; use a snapshotter that has overlay, bind, btrfs or \
             zfs mounts, or ext4 or xfs on a block device",
            mount.kind
        )));
    }
    let (flags, options) = split(&mount.options);
    if flags.contains(MountFlags::BIND) {
        // What else there is holds for the share as a whole.
        let flags = flags & (MountFlags::BIND | MountFlags::REC);
        return Ok(rustix::mount::mount(&mount.source, place, "", flags, None)?);
    }
    let flags = flags | MountFlags::NODEV | MountFlags::NOSUID;
    let mount_with = |data: String| -> io::Result<()> {
        let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
        Ok(rustix::mount::mount(
            &mount.source,
            place,
            &mount.kind,
            flags,
            &*data,
        )?)
    };
    let data = options.join(",");
    if data.len() <= MAX_OPTIONS {
        return mount_with(data);
    }
    match shorten(&options) {
        Some((directory, data)) if data.len() <= MAX_OPTIONS => {
            in_directory(&directory, || mount_with(data))
        }
        _ => Err(io::Error::other(format!(
            "the options of a {} are longer than mount(2) takes",
            mount.kind
        ))),
    }
}

/// Does something with that working directory, which no other thread gets.
fn in_directory(directory: &Path, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // SAFETY: the working directory of a thread that ends at once is no resource that others rely on.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            rustix::process::chdir(directory)?;
            work()
        });
        worker
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
}

/// Options that are mount(2)'s flags, and the others.
fn split(given: &[String]) -> (MountFlags, Vec<&str>) {
    let mut flags = MountFlags::empty();
    let mut own: Vec<&str> = Vec::new();
    for option in given {
        match FLAGS.iter().find(|(name, _)| name == option) {
            Some((_, flag)) => flags |= *flag,
            None => own.push(option),
        }
    }
    (flags, own)
}

/// Names the layers of an overlay from the directory that all of them are in, as mount(2) takes only so many bytes.
/// None: they are in none together, or lie at paths that can't be told apart from the options' syntax.
fn shorten(options: &[&str]) -> Option<(PathBuf, String)> {
    let layers = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    if layers.contains('\\') {
        return None;
    }
    let mut layers = layers.split(':').map(Path::new);
    let mut common = layers.next()?.parent()?.to_owned();
    for layer in layers.clone() {
        while !layer.starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    let relative = |option: &&str| match option.strip_prefix("lowerdir=") {
        Some(layers) => {
            let layers = layers.split(':').map(|layer| {
                let path = Path::new(layer);
                path.strip_prefix(&common)
                    .unwrap_or(path)
                    .display()
                    .to_string()
            });
            format!("lowerdir={}", layers.collect::<Vec<_>>().join(":"))
        }
        None => (*option).to_owned(),
    };
    let options: Vec<_> = options.iter().map(relative).collect();
    Some((common, options.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_told_from_a_file_systems_own() {
        let given = ["ro", "lowerdir=/a:/b", "rbind", "index=off"].map(String::from);

        let (flags, data) = split(&given);

        assert_eq!(
            flags,
            MountFlags::RDONLY | MountFlags::BIND | MountFlags::REC
        );
        assert_eq!(data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn a_disk_is_told_from_what_is_mounted_here() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mount = |kind: &str, options: &[&str]| RootMount {
            kind: kind.into(),
            source: file.path().display().to_string(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        };
        assert!(on_disk(&[mount("overlay", &[])]).is_none());
        assert!(on_disk(&[mount("ext4", &[]), mount("overlay", &[])]).is_none());

        let mounts = [mount("xfs", &["ro", "nouuid", "loop"])];
        let disk = Disk::open(on_disk(&mounts).unwrap()).unwrap();

        assert!(disk.read_only);
        assert_eq!(
            (disk.file_system.as_str(), disk.options.as_slice()),
            ("xfs", ["nouuid".to_owned()].as_slice())
        );
        let gone = RootMount {
            source: "/nowhere/disk".into(),
            ..mount("ext4", &[])
        };
        assert!(
            Disk::open(&gone)
                .unwrap_err()
                .to_string()
                .contains("/nowhere/disk")
        );
    }

    #[test]
    fn what_is_no_root_file_system_is_refused() {
        let mount = RootMount {
            kind: "fuse3.fuse-overlayfs".into(),
            source: "overlay".into(),
            options: Vec::new(),
        };

        let error = mount_at(&mount, Path::new("/nowhere"))
            .unwrap_err()
            .to_string();

        assert!(error.contains("fuse3.fuse-overlayfs"), "{error}");
    }

    /// As containerd has them: a hundred layers are more than a page.
    #[test]
    fn an_overlay_of_many_layers_is_mounted() {
        hull_pod::volumes::enter_private_namespace().unwrap();
        let root = tempfile::tempdir().unwrap();
        let on_root = root
            .path()
            .join("a/directory/with/a/rather/long/name/as/snapshotters/have");
        rustix::mount::mount("tmpfs", root.path(), "tmpfs", MountFlags::empty(), None).unwrap();
        let layer = |n: usize| on_root.join(format!("{n}/fs"));
        let layers: Vec<_> = (0..100).map(|n| layer(n).display().to_string()).collect();
        for n in 0..100 {
            std::fs::create_dir_all(layer(n)).unwrap();
            std::fs::write(layer(n).join(n.to_string()), "").unwrap();
        }
        let place = root.path().join("place");
        std::fs::create_dir(&place).unwrap();
        let mount = RootMount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec!["index=off".into(), format!("lowerdir={}", layers.join(":"))],
        };

        mount_at(&mount, &place).unwrap();

        assert!(place.join("0").exists() && place.join("99").exists());
        let here = std::env::current_dir().unwrap();
        assert!(!here.starts_with(root.path()));
    }
}
