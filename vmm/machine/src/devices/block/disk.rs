//! The file behind a disk: reads and writes between it and guest memory, in whole sectors.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, seek};

use crate::virtio::buffers::Span;

/// Bytes of a sector, whatever the device's block size (Virtio 1.2, section 5.2.4).
pub const SECTOR: u32 = 512;
/// Zeroes written at a time, where the file can't be told to have them.
static ZEROES: [u8; 0x1_0000] = [0; 0x1_0000];

/// A regular file or a block device, of a size that doesn't change.
#[derive(Debug)]
pub struct Disk {
    file: OwnedFd,
    sectors: u64,
    read_only: bool,
}

/// A run of bytes that is in the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    start: u64,
    len: u64,
}

impl Disk {
    pub fn new(file: OwnedFd, read_only: bool) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a disk must be a regular file or a block device",
            ));
        }
        let size = seek(&file, SeekFrom::End(0))?;
        Ok(Self {
            file,
            sectors: size / u64::from(SECTOR),
            read_only,
        })
    }

    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The bytes of `count` sectors from `first` on, if the disk has them all.
    pub fn range(&self, first: u64, count: u64) -> Option<Range> {
        let end = first.checked_add(count)?;
        if end > self.sectors {
            return None;
        }
        // No overflow: the size in bytes is a file's.
        Some(Range {
            start: first.checked_mul(u64::from(SECTOR))?,
            len: count.checked_mul(u64::from(SECTOR))?,
        })
    }

    /// Fills `target`, which is as long as `range`.
    pub fn read(&self, range: Range, target: &Span<'_>) -> io::Result<()> {
        // SAFETY: `preadv` writes no more than the vectors say, and these name guest memory that
        // `target` borrows. The guest may change it meanwhile; nothing here holds a reference to it.
        self.transfer(range, target, |file, vectors, count, offset| unsafe {
            libc::preadv(file, vectors, count, offset)
        })
    }

    /// Writes `source`, which is as long as `range`.
    pub fn write(&self, range: Range, source: &Span<'_>) -> io::Result<()> {
        // SAFETY: `pwritev` reads no more than the vectors say, and these name guest memory that
        // `source` borrows. The guest may change it meanwhile; nothing here holds a reference to it.
        self.transfer(range, source, |file, vectors, count, offset| unsafe {
            libc::pwritev(file, vectors, count, offset)
        })
    }

    /// Makes all writes last.
    pub fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Gives up what is in a range; it then reads as zeroes.
    pub fn discard(&self, range: Range) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, range.start, range.len)?)
    }

    /// Makes a range read as zeroes, and keeps its place in the file.
    pub fn zero(&self, range: Range) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, range.start, range.len) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeroes(range),
            result => Ok(result?),
        }
    }

    fn write_zeroes(&self, range: Range) -> io::Result<()> {
        let mut done = 0;
        while done < range.len {
            let left = usize::try_from(range.len - done).unwrap_or(usize::MAX);
            let part = &ZEROES[..left.min(ZEROES.len())];
            let written = rustix::io::pwrite(&self.file, part, range.start + done)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            done += u64::try_from(written).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn transfer(
        &self,
        range: Range,
        span: &Span<'_>,
        call: impl Fn(i32, *const libc::iovec, i32, i64) -> isize,
    ) -> io::Result<()> {
        // The guards keep the pointers good until the end of this function.
        let guards: Vec<_> = span.pieces().map(|piece| piece.ptr_guard_mut()).collect();
        let mut vectors: Vec<_> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let mut left = &mut vectors[..];
        let mut offset = i64::try_from(range.start).map_err(io::Error::other)?;
        while !left.is_empty() {
            let count = i32::try_from(left.len()).map_err(io::Error::other)?;
            let moved = call(self.file.as_raw_fd(), left.as_ptr(), count, offset);
            let Ok(moved) = usize::try_from(moved) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            if moved == 0 {
                // The file has become shorter than it was.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += i64::try_from(moved).map_err(io::Error::other)?;
            left = advance(left, moved);
        }
        Ok(())
    }
}

/// What is left of `vectors` when `moved` bytes of them are done; `moved` is not more than they have.
fn advance(vectors: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for vector in vectors.iter() {
        if vector.iov_len > moved {
            break;
        }
        moved -= vector.iov_len;
        whole += 1;
    }
    let left = &mut vectors[whole..];
    if let Some(first) = left.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(moved).cast();
        first.iov_len -= moved;
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(base: usize, len: usize) -> libc::iovec {
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        }
    }

    fn advanced(moved: usize) -> Vec<(usize, usize)> {
        let mut vectors = [vector(0x1000, 4), vector(0x2000, 8)];
        advance(&mut vectors, moved)
            .iter()
            .map(|vector| (vector.iov_base.addr(), vector.iov_len))
            .collect()
    }

    #[test]
    fn what_was_moved_is_not_moved_again() {
        assert_eq!(advanced(3), [(0x1003, 1), (0x2000, 8)]);
        assert_eq!(advanced(4), [(0x2000, 8)]);
        assert_eq!(advanced(5), [(0x2001, 7)]);
        assert_eq!(advanced(12), []);
    }

    #[test]
    fn ranges_end_where_the_disk_ends() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 * 512 + 511).unwrap();
        let disk = Disk::new(file.into(), false).unwrap();

        assert_eq!(disk.sectors(), 10);
        assert_eq!(
            disk.range(9, 1),
            Some(Range {
                start: 9 * 512,
                len: 512
            })
        );
        assert_eq!(disk.range(10, 1), None);
        assert_eq!(disk.range(9, 2), None);
        assert_eq!(disk.range(u64::MAX, 2), None);
        assert_eq!(disk.range(0, u64::MAX), None);
    }

    #[test]
    fn a_pipe_is_no_disk() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();

        let error = Disk::new(reader, true).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
