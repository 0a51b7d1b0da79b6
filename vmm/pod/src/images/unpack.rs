//! A layer's tar stream to a directory that overlayfs can use as a lower layer.
//!
//! Layers come from anybody. Nothing outside of the directory is ever touched:
//! every path is walked by the kernel with the directory as its root
//! (`RESOLVE_IN_ROOT`), so `..`, absolute names and symbolic links in the layer
//! lead nowhere else. Whiteouts are converted from the OCI form (image-spec,
//! layer.md, "Whiteouts") to that of overlayfs.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use tar::EntryType;

/// More than any real layer has; a bound against tar bombs.
const MAX_ENTRIES: u64 = 4_000_000;
const MAX_BYTES: u64 = 256 << 30;
/// Bound on what describes one entry (long names, extended attributes), which the
/// tar reader holds in memory.
const MAX_DESCRIPTION: u64 = 2 << 20;
const MAX_DEPTH: usize = 256;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

/// Unpacks a tar stream into an empty directory; returns the bytes of its files.
///
/// # Errors
/// When the stream is no tar archive, or an entry can't be made.
pub fn unpack(stream: impl Read, root: &OwnedFd) -> io::Result<u64> {
    let allowance = Rc::new(Cell::new(MAX_DESCRIPTION));
    let mut archive = tar::Archive::new(Metered {
        stream,
        allowance: allowance.clone(),
    });
    let mut unpacker = Unpacker {
        root,
        parent: None,
        directories: Vec::new(),
        bytes: 0,
    };
    let mut count = 0;
    let mut entries = archive.entries()?;
    loop {
        allowance.set(MAX_DESCRIPTION);
        let Some(entry) = entries.next() else {
            break;
        };
        let mut entry = entry?;
        count += 1;
        if count > MAX_ENTRIES {
            return Err(io::Error::other("too many files in the layer"));
        }
        allowance.set(u64::MAX);
        let name = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
        unpacker.entry(&name, &mut entry).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", name.display()))
        })?;
        io::copy(&mut entry, &mut io::sink())?;
    }
    allowance.set(u64::MAX);
    unpacker.finish()
}

/// Bounds how much is read while the tar reader collects an entry's description.
struct Metered<R> {
    stream: R,
    allowance: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        let left = self.allowance.get().checked_sub(count as u64);
        self.allowance
            .set(left.ok_or_else(|| io::Error::other("names or attributes too long"))?);
        Ok(count)
    }
}

struct Unpacker<'a> {
    root: &'a OwnedFd,
    /// The directory of the last entry: entries come in runs.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Times of directories, which change until their last entry is in place.
    directories: Vec<(PathBuf, i64)>,
    bytes: u64,
}

/// What an entry says of itself.
struct Attributes {
    mode: Mode,
    uid: Uid,
    gid: Gid,
    mtime: i64,
    xattrs: Vec<(String, Vec<u8>)>,
}

impl Unpacker<'_> {
    fn entry(&mut self, name: &Path, entry: &mut tar::Entry<'_, impl Read>) -> io::Result<()> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let path = clean(name)?;
        let attributes = Attributes::of(entry)?;
        let Some(last) = path.file_name() else {
            // The root itself.
            let root = self.root.as_fd();
            attributes.apply(root)?;
            self.directories.push((path, attributes.mtime));
            return Ok(());
        };
        let parent_path = path.parent().unwrap_or(Path::new(""));
        let parent = self.parent(parent_path)?;
        if let Some(hidden) = last.as_bytes().strip_prefix(WHITEOUT) {
            let done = whiteout(parent.as_fd(), last, OsStr::from_bytes(hidden));
            self.parent = Some((parent_path.to_owned(), parent));
            return done;
        }
        self.make(parent.as_fd(), &path, last, kind, &attributes, entry)?;
        self.parent = Some((parent_path.to_owned(), parent));
        Ok(())
    }

    fn make(
        &mut self,
        parent: BorrowedFd<'_>,
        path: &Path,
        name: &OsStr,
        kind: EntryType,
        attributes: &Attributes,
        entry: &mut tar::Entry<'_, impl Read>,
    ) -> io::Result<()> {
        match kind {
            EntryType::Directory => {
                let directory = make_directory(parent, name)?;
                attributes.apply(directory.as_fd())?;
                self.directories.push((path.to_owned(), attributes.mtime));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                replace(parent, name)?;
                let flags = OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::WRONLY
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let mut file = File::from(rustix::fs::openat(
                    parent,
                    name,
                    flags,
                    Mode::RUSR | Mode::WUSR,
                )?);
                let room = MAX_BYTES.saturating_sub(self.bytes);
                let written = io::copy(
                    &mut Read::take(&mut *entry, room.saturating_add(1)),
                    &mut file,
                )?;
                if written > room {
                    return Err(io::Error::other("the layer is too large"));
                }
                self.bytes += written;
                attributes.apply(file.as_fd())?;
                rustix::fs::futimens(&file, &times(attributes.mtime))?;
            }
            EntryType::Link => {
                let target = link_target(entry)?;
                let target = clean(Path::new(&target))?;
                let target_name = target
                    .file_name()
                    .ok_or(io::Error::other("a link to the root"))?;
                let target_parent = self.open_in_root(target.parent().unwrap_or(Path::new("")))?;
                if target != path {
                    replace(parent, name)?;
                    rustix::fs::linkat(
                        &target_parent,
                        target_name,
                        parent,
                        name,
                        AtFlags::empty(),
                    )?;
                }
            }
            EntryType::Symlink => {
                replace(parent, name)?;
                rustix::fs::symlinkat(link_target(entry)?.as_os_str(), parent, name)?;
                attributes.apply_by_name(parent, name, false)?;
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                replace(parent, name)?;
                let (file_type, device) = device(kind, entry)?;
                rustix::fs::mknodat(parent, name, file_type, Mode::RUSR, device)?;
                attributes.apply_by_name(parent, name, true)?;
            }
            other => {
                return Err(io::Error::other(format!(
                    "unknown kind of entry: {:?}",
                    char::from(other.as_byte())
                )));
            }
        }
        Ok(())
    }

    /// A directory of the layer, made with all above it if it isn't there.
    fn parent(&mut self, path: &Path) -> io::Result<OwnedFd> {
        if let Some((known, directory)) = self.parent.take()
            && known == path
        {
            return Ok(directory);
        }
        match self.open_in_root(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let mut so_far = PathBuf::new();
        let mut directory = self.open_in_root(&so_far)?;
        for part in path.components() {
            so_far.push(part);
            directory = match self.open_in_root(&so_far) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let made = make_directory(directory.as_fd(), part.as_os_str())?;
                    rustix::fs::fchmod(&made, Mode::from_raw_mode(0o755))?;
                    made
                }
                found => found?,
            };
        }
        Ok(directory)
    }

    fn open_in_root(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(
            self.root,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }

    fn finish(self) -> io::Result<u64> {
        for (path, mtime) in self.directories.iter().rev() {
            // A later entry may have replaced it.
            if let Ok(directory) = self.open_in_root(path) {
                rustix::fs::futimens(&directory, &times(*mtime))?;
            }
        }
        Ok(self.bytes)
    }
}

impl Attributes {
    fn of(entry: &mut tar::Entry<'_, impl Read>) -> io::Result<Self> {
        let header = entry.header();
        let id = |value: u64| {
            u32::try_from(value).map_err(|_| io::Error::other("user or group id too large"))
        };
        let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
        let (uid, gid) = (id(header.uid()?)?, id(header.gid()?)?);
        let mtime = i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0);
        let mut xattrs = Vec::new();
        for extension in entry.pax_extensions()?.into_iter().flatten().flatten() {
            let name = extension
                .key()
                .unwrap_or_default()
                .strip_prefix("SCHILY.xattr.");
            xattrs.extend(
                name.filter(|name| is_kept(name))
                    .map(|name| (name.to_owned(), extension.value_bytes().to_vec())),
            );
        }
        // All ones is "no id" to chown.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(io::Error::other("user or group id too large"));
        }
        Ok(Self {
            mode,
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            mtime,
            xattrs,
        })
    }

    /// In this order: a change of owner takes setuid bits and capabilities away.
    fn apply(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        rustix::fs::fchown(file, Some(self.uid), Some(self.gid))?;
        rustix::fs::fchmod(file, self.mode)?;
        for (name, value) in &self.xattrs {
            match rustix::fs::fsetxattr(file, name.as_str(), value, XattrFlags::empty()) {
                // The store's file system has no such attributes: as if the image's had none.
                Err(Errno::NOTSUP) => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// For what can't be opened. `name` has just been made here, so it is no link
    /// unless it was made as one.
    fn apply_by_name(
        &self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        has_mode: bool,
    ) -> io::Result<()> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(parent, name, Some(self.uid), Some(self.gid), flags)?;
        if has_mode {
            rustix::fs::chmodat(parent, name, self.mode, AtFlags::empty())?;
        }
        Ok(rustix::fs::utimensat(
            parent,
            name,
            &times(self.mtime),
            flags,
        )?)
    }
}

/// Attributes that belong to an image. Those of overlayfs itself (`trusted.overlay.`
/// and `user.overlay.`) would let a layer redirect names, and labels are the host's.
fn is_kept(name: &str) -> bool {
    name == "security.capability"
        || name.starts_with("system.posix_acl_")
        || (name.starts_with("user.") && !name.starts_with("user.overlay."))
}

fn times(mtime: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// A name relative to the layer's root.
fn clean(name: &Path) -> io::Result<PathBuf> {
    let mut path = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::other("the name leads out of the layer"));
            }
        }
    }
    if path.components().count() > MAX_DEPTH {
        return Err(io::Error::other("the name is too deep"));
    }
    Ok(path)
}

fn link_target(entry: &tar::Entry<'_, impl Read>) -> io::Result<OsString> {
    let target = entry
        .link_name_bytes()
        .ok_or(io::Error::other("a link without a target"))?;
    Ok(OsStr::from_bytes(&target).to_owned())
}

fn device(kind: EntryType, entry: &tar::Entry<'_, impl Read>) -> io::Result<(FileType, u64)> {
    let header = entry.header();
    let number = || -> io::Result<u64> {
        let (major, minor) = (header.device_major()?, header.device_minor()?);
        match (major, minor) {
            // To overlayfs that is a whiteout, which images write in another way.
            (Some(0), Some(0)) | (None, _) | (_, None) => {
                Err(io::Error::other("no valid device number"))
            }
            (Some(major), Some(minor)) => Ok(rustix::fs::makedev(major, minor)),
        }
    };
    Ok(match kind {
        EntryType::Char => (FileType::CharacterDevice, number()?),
        EntryType::Block => (FileType::BlockDevice, number()?),
        _ => (FileType::Fifo, 0),
    })
}

/// What is at a name of this layer.
enum Present {
    Nothing,
    Directory,
    Whiteout,
    Other,
}

fn present(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<Present> {
    let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(Present::Nothing),
        stat => stat?,
    };
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Present::Directory,
        FileType::CharacterDevice if stat.st_rdev == 0 => Present::Whiteout,
        _ => Present::Other,
    })
}

/// Makes room for an entry: the last one of a name counts.
fn replace(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match present(parent, name)? {
        Present::Nothing => {}
        Present::Directory => remove_directory(parent, name)?,
        Present::Whiteout | Present::Other => rustix::fs::unlinkat(parent, name, AtFlags::empty())?,
    }
    Ok(())
}

/// Removes a directory with all in it, without following links.
fn remove_directory(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for entry in rustix::fs::Dir::read_from(&directory)? {
        let entry = entry?;
        let child = OsStr::from_bytes(entry.file_name().to_bytes());
        if child != "." && child != ".." {
            replace(directory.as_fd(), child)?;
        }
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Makes a directory, or takes the one that is there.
fn make_directory(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let before = present(parent, name)?;
    match before {
        Present::Directory => {}
        Present::Nothing => rustix::fs::mkdirat(parent, name, Mode::RWXU)?,
        Present::Whiteout | Present::Other => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    if matches!(before, Present::Whiteout) {
        // Removed below and made anew: nothing of the old one shines through.
        set_opaque(directory.as_fd())?;
    }
    Ok(directory)
}

fn set_opaque(directory: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(
        directory,
        OPAQUE_XATTR,
        b"y",
        XattrFlags::empty(),
    )?)
}

/// `.wh.NAME` hides NAME of the layers below, never one of its own layer.
fn whiteout(parent: BorrowedFd<'_>, marker: &OsStr, hidden: &OsStr) -> io::Result<()> {
    if marker.as_bytes() == OPAQUE {
        return set_opaque(parent);
    }
    if hidden.as_bytes().starts_with(WHITEOUT) {
        // Other marks of aufs, without meaning in an image.
        return Ok(());
    }
    if hidden.is_empty() || hidden == "." || hidden == ".." {
        return Err(io::Error::other("a whiteout of nothing"));
    }
    match present(parent, hidden)? {
        Present::Nothing => Ok(rustix::fs::mknodat(
            parent,
            hidden,
            FileType::CharacterDevice,
            Mode::empty(),
            0,
        )?),
        Present::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            set_opaque(rustix::fs::openat(parent, hidden, flags, Mode::empty())?.as_fd())
        }
        Present::Whiteout | Present::Other => Ok(()),
    }
}
