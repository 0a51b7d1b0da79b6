//! The pages that a machine which goes on from a snapshot accesses first, as far as that is known from another.
//!
//! Each page that is read costs a fault while the guest runs, and one more when it is written and so copied. Mapped and
//! copied before, all at once, it costs none.

use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress, GuestMemoryRegion};

use super::{GuestRam, whole_pieces};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// As many ranges of each kind as are told of a machine, and as many pages of each: 32 MiB. A message has room for them.
pub const MAX_RANGES: usize = 1536;
pub const MAX_PAGES: u64 = 8192;

/// Pages of a snapshot's memory file, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct PageRange {
    pub first: u64,
    pub count: u64,
}

impl From<(u64, u64)> for PageRange {
    fn from((first, count): (u64, u64)) -> Self {
        Self { first, count }
    }
}

impl From<PageRange> for (u64, u64) {
    fn from(range: PageRange) -> Self {
        (range.first, range.count)
    }
}

/// Pages by what is done to them, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    pub written: Vec<PageRange>,
    /// And not written.
    pub read: Vec<PageRange>,
}

/// What is known of the pages that a machine will access.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accesses {
    Unknown,
    /// This is the machine whose accesses are to be seen, from outside.
    ToBeSeen,
    Known(WorkingSet),
}

/// Guest memory that is one piece in this process, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub guest: GuestAddress,
    pub host: *mut u8,
    /// In bytes.
    pub size: usize,
}

/// Where the pages are, within the limits above. Those past the end of memory are left out.
pub fn runs(ram: &GuestRam, ranges: &[PageRange]) -> Vec<Run> {
    let mut left = MAX_PAGES;
    let mut runs = Vec::new();
    for range in ranges.iter().take(MAX_RANGES) {
        let count = range.count.min(left);
        left -= count;
        let start = range.first.saturating_mul(PAGE);
        let end = range.first.saturating_add(count).saturating_mul(PAGE);
        let mut before = 0_u64;
        for piece in whole_pieces(ram) {
            let within = |offset: u64| offset.saturating_sub(before).min(piece.len());
            let (from, to) = (within(start), within(end));
            before = before.saturating_add(piece.len());
            let host = usize::try_from(from)
                .ok()
                .map(|from| piece.mapping().as_ptr().wrapping_add(from));
            if let (Some(host), Ok(size @ 1..)) = (host, usize::try_from(to - from)) {
                runs.push(Run {
                    guest: piece.start_addr().unchecked_add(from),
                    host,
                    size,
                });
            }
        }
    }
    runs
}

/// Gives this process pages of its own there, with what the file has. A kernel that can't (before 5.14) leaves it to
/// the guest's accesses, and so does one that has no memory left.
pub fn copy(runs: &[Run]) {
    populate(runs, Advice::LinuxPopulateWrite);
}

/// Gives this process the file's pages there, as [`copy`] does.
pub fn map(runs: &[Run]) {
    populate(runs, Advice::LinuxPopulateRead);
}

fn populate(runs: &[Run], advice: Advice) {
    for run in runs {
        // SAFETY: the range is of guest RAM, which is mapped for good; what is in it doesn't change.
        let populated = unsafe { madvise(run.host.cast(), run.size, advice) };
        if populated.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestMemory};

    use super::*;
    use crate::memory::{MIN_MIB, from_file, from_ranges};

    const RANGES: [(u64, u64); 3] = [(0, 1), (3, 3), (7, u64::MAX)];

    fn ranges(ranges: &[(u64, u64)]) -> Vec<PageRange> {
        ranges.iter().copied().map(PageRange::from).collect()
    }

    #[test]
    fn a_range_over_a_gap_is_two_runs_and_ends_with_memory() {
        let size = 4 * 4096;
        let high = GuestAddress(1 << 32);
        let ram = from_ranges(&[(GuestAddress(0), size), (high, size)]).unwrap();

        let found: Vec<_> = runs(&ram, &ranges(&RANGES))
            .iter()
            .map(|run| (run.guest.0, run.size))
            .collect();

        let high = |page: u64| high.0 + page * PAGE;
        assert_eq!(
            found,
            [
                (0, 4096),
                (3 * PAGE, 4096),
                (high(0), 2 * 4096),
                (high(3), 4096)
            ]
        );
        for run in runs(&ram, &ranges(&RANGES)) {
            assert_eq!(ram.get_host_address(run.guest).unwrap(), run.host);
        }
    }

    #[test]
    fn what_is_said_of_pages_is_bounded() {
        let ram = from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();

        let pages = |ranges: &[PageRange]| {
            let runs = runs(&ram, ranges);
            runs.iter().map(|run| run.size as u64 / PAGE).sum::<u64>()
        };

        assert_eq!(pages(&ranges(&[(0, u64::MAX)])), MAX_PAGES);
        assert_eq!(pages(&ranges(&[(u64::MAX, u64::MAX), (5, 0)])), 0);
        let many = vec![(1, 1); MAX_RANGES + 1];
        assert_eq!(pages(&ranges(&many)), MAX_RANGES as u64);
    }

    #[test]
    fn a_page_of_ones_own_has_what_the_file_has() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(MIN_MIB << 20).unwrap();
        file.write_all(&[7; 2 * 4096]).unwrap();
        let ram = from_file(MIN_MIB, file.as_fd()).unwrap();

        let runs = runs(&ram, &ranges(&[(1, 2)]));
        copy(&runs);

        let mut content = [0; 2 * 4096];
        ram.read_slice(&mut content, GuestAddress(4096)).unwrap();
        assert_eq!(content[..4096], [7; 4096]);
        assert_eq!(content[4096..], [0; 4096]);
    }
}
