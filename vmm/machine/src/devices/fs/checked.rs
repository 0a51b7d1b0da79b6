//! Refuses bad names and offsets before the file server sees them, and spares the guest requests without an effect.
//!
//! The file server hands a name to the host's path walk as it came. It takes care that a walk stays below the
//! directory that it starts in, but not in every operation; a name here is one component, or it is refused
//! (CVE-2026-47243 is what becomes of it otherwise).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;

/// Longest name, in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;

/// A file system that gets only names of one component and offsets that a file can have.
pub(super) struct Checked<F>(F);

impl<F> Checked<F> {
    pub(super) fn new(file_system: F) -> Self {
        Self(file_system)
    }
}

/// Checks a name: one component of a path, and not the directory itself nor its parent.
///
/// The last two could only be looked up under export support (`FUSE_EXPORT_SUPPORT`), which is not offered.
fn name(name: &CStr) -> io::Result<()> {
    is_name(name.to_bytes())
}

/// The same, of bytes.
pub(super) fn is_name(name: &[u8]) -> io::Result<()> {
    let errno = match name {
        b"" => libc::ENOENT,
        long if long.len() > MAX_NAME => libc::ENAMETOOLONG,
        b"." | b".." => libc::EINVAL,
        slash if slash.contains(&b'/') => libc::EINVAL,
        _ => return Ok(()),
    };
    Err(io::Error::from_raw_os_error(errno))
}

/// Checks that a range is within what a file offset can say. The file server panics on others.
fn range(offset: u64, size: u32) -> io::Result<()> {
    offset
        .checked_add(u64::from(size))
        .and_then(|end| i64::try_from(end).ok())
        .map(|_| ())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Checks the type of a node to be made: a device node on the host is of no use to a guest, which has
/// devices of its own; but 0:0 is how an overlay marks a name as deleted.
fn node(mode: u32, device: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        libc::S_IFBLK => Err(io::Error::from_raw_os_error(libc::EPERM)),
        libc::S_IFCHR if device != 0 => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Ok(()),
    }
}

/// Operations without a name or an offset.
macro_rules! pass_on {
    ($(fn $operation:ident(&self $(, $argument:ident: $type:ty)* $(,)?) $(-> $result:ty)?;)*) => {
        $(fn $operation(&self $(, $argument: $type)*) $(-> $result)? {
            self.0.$operation($($argument),*)
        })*
    };
}

impl<F: FileSystem> FileSystem for Checked<F> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    pass_on! {
        fn init(&self, capable: FsOptions) -> io::Result<FsOptions>;
        fn destroy(&self);
        fn forget(&self, ctx: Context, inode: Self::Inode, count: u64);
        fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>);
        fn getattr(&self, ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>) -> io::Result<(fuse::Attr, Duration)>;
        fn setattr(&self, ctx: Context, inode: Self::Inode, attr: fuse::SetattrIn, handle: Option<Self::Handle>, valid: SetattrValid) -> io::Result<(fuse::Attr, Duration)>;
        fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>>;
        fn flush(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle) -> io::Result<()>;
        fn fallocate(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, mode: u32, offset: u64, length: u64) -> io::Result<()>;
        fn release(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle, flush: bool, flock_release: bool, lock_owner: Option<u64>) -> io::Result<()>;
        fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, value: &[u8], flags: u32, extra_flags: SetxattrFlags) -> io::Result<()>;
        fn getxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()>;
        fn opendir(&self, ctx: Context, inode: Self::Inode, flags: u32) -> io::Result<(Option<Self::Handle>, OpenOptions)>;
        fn readdir(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fn fsyncdir(&self, ctx: Context, inode: Self::Inode, datasync: bool, handle: Self::Handle) -> io::Result<()>;
        fn releasedir(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(&self, ctx: Context, inode_in: Self::Inode, handle_in: Self::Handle, offset_in: u64, inode_out: Self::Inode, handle_out: Self::Handle, offset_out: u64, len: u64, flags: u64) -> io::Result<usize>;
        fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()>;
    }

    /// The close of a file that is only read asks for nothing: each was a request that the guest waited for. Locks are the
    /// guest's own.
    fn open(
        &self,
        ctx: Context,
        inode: Self::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Self::Handle>, OpenOptions)> {
        let (handle, mut options) = self.0.open(ctx, inode, kill_priv, flags)?;
        if flags & libc::O_ACCMODE.unsigned_abs() == libc::O_RDONLY.unsigned_abs() {
            options |= OpenOptions::NOFLUSH;
        }
        Ok((handle, options))
    }

    fn lookup(&self, ctx: Context, parent: Self::Inode, child: &CStr) -> io::Result<Entry> {
        name(child)?;
        self.0.lookup(ctx, parent, child)
    }

    /// What the link says is the guest's: no link is ever followed on the host.
    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: Self::Inode,
        link: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        name(link)?;
        self.0.symlink(ctx, target, parent, link, extensions)
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Self::Inode,
        child: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        name(child)?;
        node(mode, rdev)?;
        self.0
            .mknod(ctx, parent, child, mode, rdev, umask, extensions)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Self::Inode,
        child: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        name(child)?;
        self.0.mkdir(ctx, parent, child, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: Self::Inode, child: &CStr) -> io::Result<()> {
        name(child)?;
        self.0.unlink(ctx, parent, child)
    }

    fn rmdir(&self, ctx: Context, parent: Self::Inode, child: &CStr) -> io::Result<()> {
        name(child)?;
        self.0.rmdir(ctx, parent, child)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: Self::Inode,
        old: &CStr,
        new_parent: Self::Inode,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        name(old)?;
        name(new)?;
        self.0.rename(ctx, old_parent, old, new_parent, new, flags)
    }

    fn link(
        &self,
        ctx: Context,
        inode: Self::Inode,
        parent: Self::Inode,
        child: &CStr,
    ) -> io::Result<Entry> {
        name(child)?;
        self.0.link(ctx, inode, parent, child)
    }

    fn create(
        &self,
        ctx: Context,
        parent: Self::Inode,
        child: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        name(child)?;
        self.0.create(
            ctx, parent, child, mode, kill_priv, flags, umask, extensions,
        )
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        range(offset, size)?;
        self.0
            .read(ctx, inode, handle, to, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Self::Inode,
        handle: Self::Handle,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        range(offset, size)?;
        self.0.write(
            ctx,
            inode,
            handle,
            from,
            size,
            offset,
            lock_owner,
            delayed_write,
            kill_priv,
            flags,
        )
    }
}

/// What is put down is looked at by [`super::known`].
impl<F: SerializableFileSystem> SerializableFileSystem for Checked<F> {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        self.0.prepare_serialization(cancel);
    }

    fn serialize(&self, state_pipe: File) -> io::Result<()> {
        self.0.serialize(state_pipe)
    }

    fn deserialize_and_apply(&self, state_pipe: File) -> io::Result<()> {
        self.0.deserialize_and_apply(state_pipe)
    }
}
