//! Guest memory, typed as the file server library wants it.
//!
//! The library is made for vhost-user, so its readers and writers are for memory with a bitmap of dirty pages
//! that a front-end may ask for. Ours has none, and its type says so; this is the same mapping under the other type, with the bitmap left empty.

use std::io;

use virtiofsd::descriptor_utils::Reader;
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Names the type parameter that the library leaves at its default.
pub(super) trait WithBitmap {
    type Bitmap;
}

impl<B> WithBitmap for Reader<'static, B> {
    type Bitmap = B;
}

pub(super) type LibraryBitmap = <Reader<'static> as WithBitmap>::Bitmap;

/// The guest's memory under the library's type.
#[derive(Debug)]
pub(super) struct FileServerMemory {
    alias: GuestMemoryMmap<LibraryBitmap>,
    /// Keeps the mapping that `alias` points into.
    _mapped: GuestMemoryMmap,
}

impl FileServerMemory {
    pub(super) fn new(memory: &GuestMemoryMmap) -> io::Result<Self> {
        let regions = memory
            .iter()
            .map(|region| {
                // SAFETY: the region is mapped, of this size, with these attributes, and stays so: `_mapped`
                // holds a reference to it for as long as the alias exists. Guest memory is only ever reached by
                // volatile accesses, so a second view of it breaks no rule of aliasing.
                let alias = unsafe {
                    MmapRegion::build_raw(
                        region.as_ptr(),
                        region.size(),
                        region.prot(),
                        region.flags(),
                    )
                }
                .map_err(io::Error::other)?;
                GuestRegionMmap::new(alias, region.start_addr())
                    .ok_or_else(|| io::Error::other("a region of guest memory wraps around"))
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            alias: GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)?,
            _mapped: memory.clone(),
        })
    }

    pub(super) fn get(&self) -> &GuestMemoryMmap<LibraryBitmap> {
        &self.alias
    }
}
