//! The memory file: every piece of RAM, by rising address, without gaps between them.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;

use vm_memory::{
    GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    VolatileSlice, WriteVolatile,
};

const PAGE: usize = 4096;
/// Pages that are written by one call, at most.
const RUN: usize = 256;

/// Writes all of `memory`, which nobody changes meanwhile, to a file, which is to be empty. Pages of zeroes become
/// holes, but for the last: the file has the memory's size.
///
/// # Errors
/// When it can't be written.
pub fn write(file: OwnedFd, memory: &GuestMemoryMmap) -> io::Result<()> {
    let mut file = File::from(file);
    let mut before = 0;
    for region in memory.iter() {
        write_region(&mut file, before, region)?;
        before += region.len();
    }
    Ok(())
}

fn write_region(file: &mut File, before: u64, region: &GuestRegionMmap) -> io::Result<()> {
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

fn slice(region: &GuestRegionMmap, page: usize, count: usize) -> io::Result<VolatileSlice<'_>> {
    let start = MemoryRegionAddress((page * PAGE) as u64);
    let slice = region.get_slice(start, count * PAGE);
    slice.map_err(io::Error::other)
}

fn is_zero(page: &VolatileSlice<'_>) -> bool {
    let mut copy = [0_u64; PAGE / size_of::<u64>()];
    page.copy_to(&mut copy);
    copy.iter().all(|word| *word == 0)
}
