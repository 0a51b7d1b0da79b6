//! Which pages of the file that its memory came from a machine has accessed, as the kernel sees it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use procfs::ProcError;
use procfs::process::{
    MMPermissions, MMapPath, MemoryMap, MemoryPageFlags, PageInfo, Process, VmFlags,
};
use rustix::fd::BorrowedFd;
use rustix::fs::{Stat, fstat};

use crate::memory::working_set::{MAX_PAGES, MAX_RANGES, PAGE, PageRange, WorkingSet};

/// Pages that are looked at in one go.
const WINDOW: u64 = 1 << 16;
/// Pages that are looked at altogether: 16 GiB.
const LOOKED_AT: u64 = 1 << 22;

/// To map a page that nobody reads costs less than another range does.
const READ_BETWEEN: u64 = 2;

/// Ranges by rising page, within the limits of a working set.
pub fn working_set(pid: i32, memory: BorrowedFd<'_>) -> io::Result<WorkingSet> {
    let file = fstat(memory)?;
    let process = Process::new(pid).map_err(io_error)?;
    let mut written = Ranges::default();
    let mut read = Ranges {
        between: READ_BETWEEN,
        ..Ranges::default()
    };
    let mut left = LOOKED_AT;
    let mut pages = process.pagemap().map_err(io_error)?;
    for mapping in process.smaps().map_err(io_error)? {
        let pages_of_file = u64::try_from(file.st_size).unwrap_or(0) / PAGE;
        let (start, end) = mapping.address;
        let first = mapping.offset / PAGE;
        let length = (end.saturating_sub(start) / PAGE).min(pages_of_file.saturating_sub(first));
        if length == 0 || !maps(pid, &mapping, &file) {
            continue;
        }
        // Elsewhere the kernel maps pages that are next to one that is accessed, too.
        let one_at_a_time = mapping.extension.vm_flags.contains(VmFlags::UW);
        let mut done = 0;
        while done < length && left > 0 {
            let count = WINDOW.min(length - done).min(left);
            let from = usize::try_from(start / PAGE + done).map_err(io::Error::other)?;
            let to = from.saturating_add(usize::try_from(count).map_err(io::Error::other)?);
            let found = pages.get_range_info(from..to).map_err(io_error)?;
            for (page, info) in (first + done..).zip(found) {
                match access(info) {
                    Some(Access::Write) => written.push(page),
                    Some(Access::Read) if one_at_a_time => read.push(page),
                    _ => {}
                }
            }
            done += count;
            left -= count;
        }
    }
    Ok(WorkingSet {
        written: written.ranges,
        read: read.ranges,
    })
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

#[derive(Debug, Clone, Copy)]
enum Access {
    Read,
    /// The page is the process's own, which the file's are not.
    Write,
}

fn access(info: PageInfo) -> Option<Access> {
    match info {
        PageInfo::MemoryPage(flags) if !flags.contains(MemoryPageFlags::PRESENT) => None,
        PageInfo::MemoryPage(flags) if flags.contains(MemoryPageFlags::FILE) => Some(Access::Read),
        PageInfo::MemoryPage(_) | PageInfo::SwapPage(_) => Some(Access::Write),
    }
}

/// As many as there is room for.
#[derive(Debug, Default)]
struct Ranges {
    ranges: Vec<PageRange>,
    pages: u64,
    /// As many pages that are none of it may lie within a range, next to each other.
    between: u64,
}

impl Ranges {
    /// Takes pages by rising number.
    fn push(&mut self, page: u64) {
        let is_full = self.ranges.len() >= MAX_RANGES;
        let more = match self.ranges.last_mut() {
            Some(last) if page - (last.first + last.count) <= self.between => {
                let more = page + 1 - (last.first + last.count);
                if self.pages + more > MAX_PAGES {
                    return;
                }
                last.count += more;
                more
            }
            _ if is_full || self.pages >= MAX_PAGES => return,
            _ => {
                self.ranges.push(PageRange {
                    first: page,
                    count: 1,
                });
                1
            }
        };
        self.pages += more;
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
    use crate::memory::{GuestRam, MIN_MIB, from_file, watch};

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    fn accessed(watch: impl FnOnce(&GuestRam)) -> WorkingSet {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8 * 4096]).unwrap();
        file.set_len(MIN_MIB << 20).unwrap();
        let ram = from_file(MIN_MIB, file.as_fd()).unwrap();
        watch(&ram);
        for page in [0, 2, 3, 6000] {
            ram.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        }
        for page in [3, 4, 7, 5000] {
            ram.write_obj(2_u8, GuestAddress(page * PAGE)).unwrap();
        }
        working_set(own_pid(), file.as_fd()).unwrap()
    }

    fn ranges<const N: usize>(ranges: [(u64, u64); N]) -> Vec<PageRange> {
        ranges.map(PageRange::from).into()
    }

    #[test]
    fn what_was_written_is_found_and_what_was_read_is_not_known() {
        let found = accessed(|_| {});

        assert_eq!(found.written, ranges([(3, 2), (7, 1), (5000, 1)]));
        assert_eq!(found.read, []);
    }

    #[test]
    fn of_a_watched_memory_what_was_read_is_found_too() {
        let mut can = false;

        let found = accessed(|ram| {
            let watched = watch::one_page_at_a_time(ram);
            can = watched.is_ok();
            // For good: that is how long the memory is mapped.
            std::mem::forget(watched);
        });

        assert_eq!(found.written, ranges([(3, 2), (7, 1), (5000, 1)]));
        // Linux 6.7 and newer.
        let read: &[(u64, u64)] = if can { &[(0, 3), (6000, 1)] } else { &[] };
        let read: Vec<_> = read.iter().copied().map(PageRange::from).collect();
        assert_eq!(found.read, read);
    }

    #[test]
    fn what_is_noted_is_bounded() {
        let mut scattered = Ranges::default();
        (0..2 * MAX_PAGES).for_each(|page| scattered.push(2 * page));
        let mut dense = Ranges::default();
        (0..2 * MAX_PAGES).for_each(|page| dense.push(page));
        let mut near = Ranges {
            between: 2,
            ..Ranges::default()
        };
        (0..MAX_PAGES).for_each(|page| near.push(3 * page));

        assert_eq!(scattered.ranges.len(), MAX_RANGES);
        assert_eq!(dense.ranges, ranges([(0, MAX_PAGES)]));
        assert_eq!(near.ranges[0], PageRange::from((0, MAX_PAGES - 1)));
        let pages: u64 = near.ranges.iter().map(|range| range.count).sum();
        assert_eq!(pages, MAX_PAGES);
    }

    #[test]
    fn a_file_that_is_no_memory_has_no_pages() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(
            working_set(own_pid(), file.as_fd()).unwrap(),
            WorkingSet::default()
        );
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert!(working_set(i32::MAX, file.as_fd()).is_err());
    }
}
