//! The memory file: every piece of RAM, by rising address, without gaps between them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress, VolatileSlice, WriteVolatile};

use crate::memory::{GuestRam, Piece, whole_pieces};

const PAGE: usize = 4096;
/// Pages that are written by one call, at most.
const RUN: usize = 256;

/// Writes all of `memory`, which nobody changes meanwhile, to a file, which is to be empty. Pages of zeroes become
/// holes, but for the last: the file has the memory's size.
///
/// # Errors
/// When it can't be written.
pub fn write(file: OwnedFd, memory: &GuestRam) -> io::Result<()> {
    let mut file = File::from(file);
    let mut before = 0;
    for region in whole_pieces(memory) {
        write_region(&mut file, before, region)?;
        before += region.len();
    }
    Ok(())
}

fn write_region(file: &mut File, before: u64, region: &Piece) -> io::Result<()> {
    let pages = usize::try_from(region.len()).map_err(io::Error::other)? / PAGE;
    let mut page = 0;
    while page < pages {
        if is_zero(&slice(region, page, 1)?) && page + 1 < pages {
            page += 1;
            continue;
        }
        let start = page;
        page += 1;
        while page < pages
            && page - start < RUN
            && (page + 1 == pages || !is_zero(&slice(region, page, 1)?))
        {
            page += 1;
        }
        file.seek(SeekFrom::Start(before + (start * PAGE) as u64))?;
        file.write_all_volatile(&slice(region, start, page - start)?)
            .map_err(io::Error::other)?;
    }
    Ok(())
}

fn slice(region: &Piece, page: usize, count: usize) -> io::Result<VolatileSlice<'_>> {
    let start = MemoryRegionAddress((page * PAGE) as u64);
    let slice = region.get_slice(start, count * PAGE);
    slice.map_err(io::Error::other)
}

fn is_zero(page: &VolatileSlice<'_>) -> bool {
    let mut copy = [0_u64; PAGE / size_of::<u64>()];
    page.copy_to(&mut copy);
    copy.iter().all(|word| *word == 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{MemoryError, allocate, from_file};

    const MIB: u64 = 64;
    const END: u64 = MIB << 20;

    fn memory_with(places: &[u64]) -> GuestRam {
        let memory = allocate(MIB).unwrap();
        for place in places {
            memory.write_obj(*place, GuestAddress(*place)).unwrap();
        }
        memory
    }

    fn written(memory: &GuestRam) -> File {
        let file = tempfile::tempfile().unwrap();
        write(file.try_clone().unwrap().into(), memory).unwrap();
        file
    }

    #[test]
    fn memory_comes_back_and_what_is_zero_takes_no_place() {
        let places = [8, 0x1000 - 8, 0x20_0000, END / 2 + 16, END - 8];

        let file = written(&memory_with(&places));
        let memory = from_file(MIB, file.as_fd()).unwrap();

        for place in places {
            assert_eq!(memory.read_obj::<u64>(GuestAddress(place)).unwrap(), place);
        }
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0);
        assert_eq!(file.metadata().unwrap().len(), END);
        assert!(file.metadata().unwrap().blocks() * 512 < 0x10_0000);
    }

    #[test]
    fn long_runs_are_whole() {
        let memory = allocate(MIB).unwrap();
        let pages = (RUN * 2 + 3) as u64;
        for page in 0..pages {
            let place = page * PAGE as u64;
            memory.write_obj(page + 1, GuestAddress(place)).unwrap();
        }

        let file = written(&memory);
        let memory = from_file(MIB, file.as_fd()).unwrap();

        for page in 0..pages {
            let place = page * PAGE as u64;
            assert_eq!(
                memory.read_obj::<u64>(GuestAddress(place)).unwrap(),
                page + 1
            );
        }
    }

    #[test]
    fn what_one_machine_writes_reaches_neither_the_file_nor_another_machine() {
        let file = written(&memory_with(&[0x1000]));
        let one = from_file(MIB, file.as_fd()).unwrap();
        let other = from_file(MIB, file.as_fd()).unwrap();

        one.write_obj(1_u64, GuestAddress(0x1000)).unwrap();

        assert_eq!(other.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0x1000);
        let third = from_file(MIB, file.as_fd()).unwrap();
        assert_eq!(third.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0x1000);
    }

    #[test]
    fn a_file_of_another_length_or_kind_is_refused() {
        let file = written(&memory_with(&[]));

        for length in [0, END - 1, END + 1] {
            file.set_len(length).unwrap();
            let refused = from_file(MIB, file.as_fd());
            assert!(matches!(refused, Err(MemoryError::Length { found, .. }) if found == length));
        }
        let directory = File::open("/").unwrap();
        assert!(matches!(
            from_file(MIB, directory.as_fd()),
            Err(MemoryError::Kind)
        ));
    }
}
