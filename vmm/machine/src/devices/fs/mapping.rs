//! Guest memory, typed as the file server library wants it.
//!
//! The library is made for vhost-user, so its readers and writers are for memory with a bitmap of dirty pages
//! that a front-end may ask for. Ours has none, and its type says so; this is the same mapping under the other type, with the bitmap left empty.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use virtiofsd::descriptor_utils::Reader;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::memory::{GuestRam, Piece};

/// Names the type parameter that the library leaves at its default.
pub(super) trait WithBitmap {
    type Bitmap;
}

impl<B> WithBitmap for Reader<'static, B> {
    type Bitmap = B;
}

pub(super) type LibraryBitmap = <Reader<'static> as WithBitmap>::Bitmap;

/// What of the guest's memory is there, under the library's type.
pub(super) type Alias = GuestMemoryMmap<LibraryBitmap>;

/// The guest's memory under the library's type.
#[derive(Debug)]
pub(super) struct FileServerMemory {
    memory: GuestRam,
    /// With the chunks that had come when it was made.
    alias: RwLock<(usize, Arc<Alias>)>,
}

impl FileServerMemory {
    pub(super) fn new(memory: &GuestRam) -> io::Result<Self> {
        let count = count(memory);
        Ok(Self {
            alias: RwLock::new((count, Arc::new(alias(memory)?))),
            memory: memory.clone(),
        })
    }

    /// All that is there by now. It stays.
    pub(super) fn get(&self) -> io::Result<Arc<Alias>> {
        let count = count(&self.memory);
        let known = self.alias.read().unwrap_or_else(PoisonError::into_inner);
        if known.0 >= count {
            return Ok(Arc::clone(&known.1));
        }
        drop(known);
        let made = Arc::new(alias(&self.memory)?);
        *self.alias.write().unwrap_or_else(PoisonError::into_inner) = (count, Arc::clone(&made));
        Ok(made)
    }
}

fn count(memory: &GuestRam) -> usize {
    memory.iter().map(Piece::count).sum()
}

fn alias(memory: &GuestRam) -> io::Result<Alias> {
    let mut regions = Vec::new();
    for piece in memory.iter() {
        for (start, length) in piece.present() {
            let size = usize::try_from(length).map_err(io::Error::other)?;
            let offset = usize::try_from(start).map_err(io::Error::other)?;
            let mapping = piece.mapping();
            // SAFETY: it is within the piece, mapped with these attributes, and stays so: guest memory is not
            // unmapped while the process lives, and what of it is there stays there. It is only ever
            // reached by volatile accesses, so a second view of it breaks no rule of aliasing.
            let region = unsafe {
                MmapRegion::build_raw(
                    mapping.as_ptr().wrapping_add(offset),
                    size,
                    mapping.prot(),
                    mapping.flags(),
                )
            }
            .map_err(io::Error::other)?;
            let start = GuestAddress(piece.start_addr().raw_value() + start);
            regions.push(
                GuestRegionMmap::new(region, start)
                    .ok_or_else(|| io::Error::other("a region of guest memory wraps around"))?,
            );
        }
    }
    Alias::from_regions(regions).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{CHUNK, from_ranges, with_managed};

    #[test]
    fn what_comes_is_there_for_the_library_and_what_was_there_stays() {
        let ram = from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let (memory, region) = with_managed(&ram, 384).unwrap();
        let start = region.start.raw_value();
        let known = FileServerMemory::new(&memory).unwrap();
        let lengths = |alias: &Alias| alias.iter().map(GuestMemoryRegion::len).collect::<Vec<_>>();

        let first = known.get().unwrap();
        region.chunks.come(1);
        let second = known.get().unwrap();
        region.chunks.come(2);
        let third = known.get().unwrap();

        assert_eq!(lengths(&first), [0x1000]);
        assert_eq!(lengths(&second), [0x1000, CHUNK]);
        assert_eq!(lengths(&third), [0x1000, 2 * CHUNK]);
        assert!(!third.address_in_range(GuestAddress(start)));
        let address = GuestAddress(start + CHUNK);
        assert_eq!(
            third.get_host_address(address).unwrap().addr(),
            region.host + usize::try_from(CHUNK).unwrap()
        );
        assert!(Arc::ptr_eq(&third, &known.get().unwrap()));
    }
}
