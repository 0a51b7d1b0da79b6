//! Which pages of the file that its memory came from a machine has written to, as the kernel sees it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use procfs::ProcError;
use procfs::process::{MMPermissions, MMapPath, MemoryMap, MemoryPageFlags, PageInfo, Process};
use rustix::fd::BorrowedFd;
use rustix::fs::{Stat, fstat};

use crate::memory::working_set::{MAX_PAGES, MAX_RANGES, PAGE, PageRange};

/// Pages that are looked at in one go.
const WINDOW: u64 = 1 << 16;
/// Pages that are looked at altogether: 16 GiB.
const LOOKED_AT: u64 = 1 << 22;

/// Ranges by rising page, within the limits of a working set.
pub fn written_pages(pid: i32, memory: BorrowedFd<'_>) -> io::Result<Vec<PageRange>> {
    let file = fstat(memory)?;
    let process = Process::new(pid).map_err(io_error)?;
    let mut ranges = Ranges::default();
    let mut left = LOOKED_AT;
    let mut pages = process.pagemap().map_err(io_error)?;
    for mapping in process.maps().map_err(io_error)? {
        let pages_of_file = u64::try_from(file.st_size).unwrap_or(0) / PAGE;
        let (start, end) = mapping.address;
        let first = mapping.offset / PAGE;
        let length = (end.saturating_sub(start) / PAGE).min(pages_of_file.saturating_sub(first));
        if length == 0 || !maps(pid, &mapping, &file) {
            continue;
        }
        let mut done = 0;
        while done < length && left > 0 && !ranges.are_full() {
            let count = WINDOW.min(length - done).min(left);
            let from = usize::try_from(start / PAGE + done).map_err(io::Error::other)?;
            let to = from.saturating_add(usize::try_from(count).map_err(io::Error::other)?);
            let found = pages.get_range_info(from..to).map_err(io_error)?;
            for (page, info) in (first + done..).zip(found) {
                if is_own(info) && !ranges.are_full() {
                    ranges.push(page);
                }
            }
            done += count;
            left -= count;
        }
    }
    Ok(ranges.ranges)
}

/// Whether a mapping is a private, writable one of this file.
fn maps(pid: i32, mapping: &MemoryMap, file: &Stat) -> bool {
    let wanted = MMPermissions::WRITE | MMPermissions::PRIVATE;
    if !mapping.perms.contains(wanted) || !matches!(mapping.pathname, MMapPath::Path(_)) {
        return false;
    }
    // What the list of mappings itself says of a file is, on some file systems, not what stat says.
    let (start, end) = mapping.address;
    let found = fs::metadata(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
    found.is_ok_and(|found| found.dev() == file.st_dev && found.ino() == file.st_ino)
}

/// A page of the process's own, which the file's are not.
fn is_own(info: PageInfo) -> bool {
    match info {
        PageInfo::MemoryPage(flags) => {
            flags.contains(MemoryPageFlags::PRESENT) && !flags.contains(MemoryPageFlags::FILE)
        }
        PageInfo::SwapPage(_) => true,
    }
}

#[derive(Debug, Default)]
struct Ranges {
    ranges: Vec<PageRange>,
    pages: u64,
}

impl Ranges {
    fn are_full(&self) -> bool {
        self.ranges.len() >= MAX_RANGES || self.pages >= MAX_PAGES
    }

    fn push(&mut self, page: u64) {
        self.pages += 1;
        match self.ranges.last_mut() {
            Some(last) if last.first + last.count == page => last.count += 1,
            _ => self.ranges.push(PageRange {
                first: page,
                count: 1,
            }),
        }
    }
}

fn io_error(error: ProcError) -> io::Error {
    match error {
        ProcError::Io(error, _) => error,
        error => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{MIN_MIB, from_file};

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[test]
    fn what_was_written_is_found_and_what_was_read_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8 * 4096]).unwrap();
        file.set_len(MIN_MIB << 20).unwrap();
        let ram = from_file(MIN_MIB, file.as_fd()).unwrap();
        let read: u8 = ram.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(read, 1);
        for page in [3, 4, 7, 5000] {
            ram.write_obj(2_u8, GuestAddress(page * PAGE)).unwrap();
        }

        let found = written_pages(own_pid(), file.as_fd()).unwrap();

        let expected = [(3, 2), (7, 1), (5000, 1)].map(PageRange::from);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_file_that_is_no_memory_has_no_pages() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(written_pages(own_pid(), file.as_fd()).unwrap(), []);
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(written_pages(i32::MAX, file.as_fd()).is_err());
    }
}
