//! What is behind the blocks, in this process and in KVM.
//!
//! A chunk in which nothing was ever plugged is nowhere: this process can't access it, no device is let to, and the guest
//! finds no memory there. With its first block a chunk comes, for good. From then on a plugged block is anonymous
//! memory of its own, and all blocks that are not plugged are one and the same block, the scrap: whoever accesses them,
//! be it the guest, a device in the middle of a request, or the host's kernel, gets an answer, and the
//! guest has one block more in all than it was given.

use std::io;
use std::ops::Range;
use std::ptr::{null_mut, with_exposed_provenance_mut};

use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap_fixed};
use vm_memory::{Address, GuestAddress};

use super::blocks::{BLOCK, CHUNK_BLOCKS};
use crate::memory::{CHUNK, ManagedRegion};

#[expect(clippy::cast_possible_truncation, reason = "a block is 2 MiB")]
const LENGTH: usize = BLOCK as usize;

/// Gives memory of this process to the guest. Implemented by KVM.
pub trait Slots: Send + std::fmt::Debug {
    /// Puts `size` bytes from `host` on at the guest's address, where there is nothing yet.
    ///
    /// # Errors
    /// When there is no room, or the hypervisor refuses.
    fn add(&mut self, start: GuestAddress, size: u64, host: usize) -> io::Result<()>;
}

/// The memory of a region.
#[derive(Debug)]
pub struct Backing {
    region: ManagedRegion,
    slots: Box<dyn Slots>,
    /// Where this process has the scrap, once it is needed.
    scrap: Option<usize>,
}

impl Backing {
    pub fn new(region: ManagedRegion, slots: Box<dyn Slots>) -> Self {
        Self {
            region,
            slots,
            scrap: None,
        }
    }

    /// Makes the blocks, which are of one chunk, memory of their own, empty.
    ///
    /// # Errors
    /// When the host has no room. All is then as it was.
    pub fn plug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let chunk = blocks.start / CHUNK_BLOCKS;
        if self.region.chunks.is_there(chunk) {
            return self.fill(blocks);
        }
        // Nobody reaches any of it before all of it can be accessed.
        let first = chunk * CHUNK_BLOCKS;
        for block in (first..blocks.start).chain(blocks.end..first + CHUNK_BLOCKS) {
            self.scrap(block)?;
        }
        self.fill(blocks)?;
        let offset = chunk as u64 * CHUNK;
        let start = self.region.start.unchecked_add(offset);
        let host = self.host(first);
        self.slots.add(start, CHUNK, host)?;
        self.region.chunks.come(chunk);
        Ok(())
    }

    /// Takes a block of a chunk that has come away, and gives what is in it back to the host.
    ///
    /// # Errors
    /// When the host has no room for one mapping more. All is then as it was.
    pub fn unplug(&mut self, block: usize) -> io::Result<()> {
        self.scrap(block)
    }

    fn fill(&self, blocks: Range<usize>) -> io::Result<()> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let place = with_exposed_provenance_mut(self.host(blocks.start));
        // SAFETY: the place is within the region, which is this process's for good. Who accesses it does
        // so by volatile accesses, and finds memory before and after.
        unsafe { mmap_anonymous(place, blocks.len() * LENGTH, access, flags) }?;
        Ok(())
    }

    fn scrap(&mut self, block: usize) -> io::Result<()> {
        let scrap = match self.scrap {
            Some(scrap) => scrap,
            None => *self.scrap.insert(new_scrap()?),
        };
        let place = with_exposed_provenance_mut(self.host(block));
        let scrap = with_exposed_provenance_mut(scrap);
        // SAFETY: of a shared mapping nothing is moved, but another one made of the same pages (mremap(2), an old size
        // of 0). It takes the place of a block of the region, as in `fill`.
        unsafe { mremap_fixed(scrap, 0, LENGTH, MremapFlags::MAYMOVE, place) }?;
        Ok(())
    }

    /// Where a block of the region is in this process.
    fn host(&self, block: usize) -> usize {
        self.region.host + block * LENGTH
    }
}

fn new_scrap() -> io::Result<usize> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel finds room, which stays.
    let scrap = unsafe { mmap_anonymous(null_mut(), LENGTH, access, flags) }?;
    Ok(scrap.expose_provenance())
}
