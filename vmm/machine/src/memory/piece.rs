//! A piece of the guest's memory as devices reach it: there from the start, or coming in chunks.
//!
//! What has not come can't be accessed by anybody. A chunk that has come is there for good, so that an access that was
//! found to be good stays so, whatever the guest does meanwhile; what is behind it may change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result;
use vm_memory::region::GuestMemoryRegionBytes;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// All that devices can access.
pub type GuestRam = GuestRegionCollection<Piece>;

/// What of a managed piece comes at once, in bytes.
pub const CHUNK: u64 = 128 << 20;

/// A piece.
#[derive(Debug)]
pub struct Piece {
    mapping: GuestRegionMmap,
    chunks: Option<Arc<Chunks>>,
}

impl Piece {
    /// One that is there from the start.
    pub fn whole(mapping: GuestRegionMmap) -> Self {
        Self {
            mapping,
            chunks: None,
        }
    }

    /// One of which `chunks` says what is there. What is there must be readable and writable.
    pub fn managed(mapping: GuestRegionMmap, chunks: Arc<Chunks>) -> Self {
        Self {
            mapping,
            chunks: Some(chunks),
        }
    }

    /// Whether it is there from the start.
    pub fn is_whole(&self) -> bool {
        self.chunks.is_none()
    }

    /// All of its addresses, whatever is there.
    pub fn mapping(&self) -> &GuestRegionMmap {
        &self.mapping
    }

    /// What is there: offset and length of each run.
    pub fn present(&self) -> Vec<(u64, u64)> {
        match &self.chunks {
            None => vec![(0, self.len())],
            Some(chunks) => chunks.present(),
        }
    }

    /// How many chunks have come.
    pub fn count(&self) -> usize {
        self.chunks.as_ref().map_or(0, |chunks| chunks.count())
    }
}

impl GuestMemoryRegion for Piece {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8> {
        self.check(address, 1)?;
        self.mapping.get_host_address(address)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>> {
        self.check(offset, count)?;
        GuestMemoryRegion::get_slice(&self.mapping, offset, count)
    }
}

impl GuestMemoryRegionBytes for Piece {}

impl Piece {
    fn check(&self, offset: MemoryRegionAddress, count: usize) -> Result<()> {
        let there = match &self.chunks {
            None => true,
            Some(chunks) => chunks.has(offset.0, count as u64),
        };
        there
            .then_some(())
            .ok_or(GuestMemoryError::InvalidBackendAddress)
    }
}

/// Which chunks of a managed piece have come.
#[derive(Debug)]
pub struct Chunks {
    there: Box<[AtomicBool]>,
    count: AtomicUsize,
}

impl Chunks {
    /// None of `count` has.
    pub fn new(count: usize) -> Self {
        Self {
            there: (0..count).map(|_| AtomicBool::new(false)).collect(),
            count: AtomicUsize::new(0),
        }
    }

    /// One has come, and whoever asks from here on can access it.
    pub fn come(&self, number: usize) {
        if let Some(chunk) = self.there.get(number)
            && !chunk.swap(true, Ordering::AcqRel)
        {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Whether one has come.
    pub fn is_there(&self, number: usize) -> bool {
        let chunk = self.there.get(number);
        chunk.is_some_and(|chunk| chunk.load(Ordering::Acquire))
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether all of a range of bytes is there; an empty one is where its start is.
    fn has(&self, offset: u64, count: u64) -> bool {
        let Some(last) = offset.checked_add(count.max(1) - 1) else {
            return false;
        };
        let number = |offset: u64| usize::try_from(offset / CHUNK).unwrap_or(usize::MAX);
        number(last) < self.there.len()
            && (number(offset)..=number(last)).all(|chunk| self.is_there(chunk))
    }

    fn present(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let there = (0..).zip(&self.there);
        for (number, _) in there.filter(|(_, chunk)| chunk.load(Ordering::Acquire)) {
            let offset = number * CHUNK;
            match runs.last_mut() {
                Some((start, length)) if *start + *length == offset => *length += CHUNK,
                _ => runs.push((offset, CHUNK)),
            }
        }
        runs
    }
}
