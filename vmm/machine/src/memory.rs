//! The guest's RAM: private memory on both sides of the gap for devices, anonymous, or what a file has until the guest
//! writes to it; and past it addresses for what a memory device adds while the machine runs.
//!
//! It is never unmapped: the process is the machine, and ends with it.

mod piece;
pub mod watch;
pub mod working_set;

use std::ptr::null_mut;
use std::sync::Arc;

use rustix::fd::BorrowedFd;
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect,
};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestRegionCollectionError, GuestRegionMmap, MmapRegion,
};

use crate::layout::{HIGH_RAM_START, LOW_RAM_END, managed_start};

pub use self::piece::{CHUNK, Chunks, GuestRam, Piece};

/// The least that a kernel with an initramfs starts in.
pub const MIN_MIB: u64 = 64;
/// 1 TiB.
pub const MAX_MIB: u64 = 1 << 20;

const CHUNK_MIB: u64 = CHUNK >> 20;

/// KVM maps the guest's memory by huge pages only where guest and host addresses are aligned alike.
const HUGE_PAGE: usize = 2 << 20;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest memory of {0} MiB is not within {MIN_MIB} to {MAX_MIB} MiB")]
    Size(u64),
    #[error(
        "a memory device has {CHUNK_MIB} MiB to {MAX_MIB} MiB of addresses, a multiple of {CHUNK_MIB} MiB, not {0} MiB"
    )]
    Managed(u64),
    #[error("mapping {bytes} bytes of guest memory")]
    Map { bytes: usize, source: Errno },
    #[error("the file of a machine's memory is not a regular file")]
    Kind,
    #[error(
        "the file of a machine's memory has {found} bytes, not {expected}: it is not whole, or another machine's"
    )]
    Length { expected: u64, found: u64 },
    #[error("looking at the file of a machine's memory")]
    File(#[source] Errno),
    #[error("describing a piece of guest memory")]
    Region(#[source] MmapRegionError),
    #[error("putting the pieces of guest memory together")]
    Pieces(#[source] GuestRegionCollectionError),
}

/// Start and size in bytes of each piece of RAM, by rising address.
///
/// # Errors
/// When the size is out of bounds.
pub fn ranges(memory_mib: u64) -> Result<Vec<(GuestAddress, usize)>, MemoryError> {
    let bytes = (MIN_MIB..=MAX_MIB)
        .contains(&memory_mib)
        .then(|| memory_mib.checked_mul(1 << 20))
        .flatten()
        .ok_or(MemoryError::Size(memory_mib))?;
    let low = bytes.min(LOW_RAM_END);
    let high = bytes - low;
    [(0, low), (HIGH_RAM_START, high)]
        .into_iter()
        .filter(|(_, size)| *size > 0)
        .map(|(start, size)| {
            let size = usize::try_from(size).map_err(|_| MemoryError::Size(memory_mib))?;
            Ok((GuestAddress(start), size))
        })
        .collect()
}

/// Maps the guest's RAM. It costs the host nothing until the guest touches it.
///
/// # Errors
/// When the size is out of bounds, or the host has no address space for it.
pub fn allocate(memory_mib: u64) -> Result<GuestRam, MemoryError> {
    pieces(memory_mib, |_, size| map(size))
}

/// Has the host back RAM with huge pages, as far as it can: a boot touches nearly all of each that it touches at all, and
/// each costs one fault, not 512.
pub fn ask_for_huge_pages(ram: &GuestRam) {
    for piece in whole_pieces(ram) {
        let (start, size) = (piece.mapping().as_ptr(), piece.mapping().size());
        // SAFETY: guest RAM, mapped for good; how it is backed changes nothing of what is in it.
        let _ = unsafe { madvise(start.cast(), size, Advice::LinuxHugepage) };
    }
}

/// Maps the guest's RAM from a file that has all pieces one after the other. What the guest writes stays out of the file.
///
/// # Errors
/// When the size is out of bounds, the file has another one, or the host has no address space for it.
pub fn from_file(memory_mib: u64, file: BorrowedFd<'_>) -> Result<GuestRam, MemoryError> {
    let sizes = ranges(memory_mib)?.into_iter().map(|(_, size)| size as u64);
    let expected = sizes.sum();
    let found = fstat(file).map_err(MemoryError::File)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(MemoryError::Kind);
    }
    // What lies past the end of the file can't be accessed, which would end the process.
    let found = u64::try_from(found.st_size).unwrap_or(0);
    if found != expected {
        return Err(MemoryError::Length { expected, found });
    }
    pieces(memory_mib, |offset, size| map_file(size, file, offset))
}

/// Maps each piece; `map` is told how many bytes come before it.
fn pieces(
    memory_mib: u64,
    map: impl Fn(u64, usize) -> Result<MmapRegion, MemoryError>,
) -> Result<GuestRam, MemoryError> {
    let mut before = 0;
    let regions = ranges(memory_mib)?
        .into_iter()
        .map(|(start, size)| {
            let region = map(before, size)?;
            before += size as u64;
            let mapping = GuestRegionMmap::new(region, start);
            Ok(Piece::whole(mapping.ok_or(MemoryError::Size(memory_mib))?))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestRam::from_regions(regions).map_err(MemoryError::Pieces)
}

/// Addresses of the guest's for what a memory device adds, nothing of which is there yet.
#[derive(Debug)]
pub struct ManagedRegion {
    /// Aligned as the largest units are in which Linux takes memory.
    pub start: GuestAddress,
    /// In bytes, a multiple of [`CHUNK`].
    pub size: u64,
    /// Where they are in this process, aligned to huge pages. What is not there yet can't be accessed.
    pub host: usize,
    /// What is there. A chunk that comes must be readable and writable by then, and stay so.
    pub chunks: Arc<Chunks>,
}

/// Adds addresses for a memory device past all RAM. They cost the host nothing.
///
/// # Errors
/// When the size is out of bounds, or the host has no address space for it.
pub fn with_managed(ram: &GuestRam, mib: u64) -> Result<(GuestRam, ManagedRegion), MemoryError> {
    let refused = || MemoryError::Managed(mib);
    if !(CHUNK_MIB..=MAX_MIB).contains(&mib) || !mib.is_multiple_of(CHUNK_MIB) {
        return Err(refused());
    }
    let size = mib << 20;
    let length = usize::try_from(size).map_err(|_| refused())?;
    let ram_end = ram.last_addr().raw_value().saturating_add(1);
    let start = GuestAddress(managed_start(ram_end));
    let host = reserve(length)?;
    let chunks = usize::try_from(size / CHUNK).map_err(|_| refused())?;
    let managed = ManagedRegion {
        start,
        size,
        host: host.expose_provenance(),
        chunks: Arc::new(Chunks::new(chunks)),
    };
    let mapping = GuestRegionMmap::new(region(host, length)?, start).ok_or_else(refused)?;
    let piece = Piece::managed(mapping, Arc::clone(&managed.chunks));
    let memory = ram.insert_region(Arc::new(piece));
    Ok((memory.map_err(MemoryError::Pieces)?, managed))
}

/// The pieces that are there from the start.
pub fn whole_pieces(memory: &GuestRam) -> impl Iterator<Item = &Piece> {
    memory.iter().filter(|piece| piece.is_whole())
}

/// Memory of tests, with pieces of any size.
#[cfg(test)]
pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<GuestRam, MemoryError> {
    let pieces = ranges.iter().map(|(start, size)| {
        let mapping = GuestRegionMmap::from_range(*start, *size, None).unwrap();
        Piece::whole(mapping)
    });
    GuestRam::from_regions(pieces.collect()).map_err(MemoryError::Pieces)
}

const FLAGS: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

/// Maps a piece.
fn map(size: usize) -> Result<MmapRegion, MemoryError> {
    let start = reserve(size)?;
    let access = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: the pages are this function's, and nobody knows them yet.
    unsafe { mprotect(start.cast(), size, access) }.map_err(failed(size))?;
    region(start, size)
}

/// Maps a piece that has at first what the file has from `offset` on.
fn map_file(size: usize, file: BorrowedFd<'_>, offset: u64) -> Result<MmapRegion, MemoryError> {
    let start = reserve(size)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = FLAGS | MapFlags::FIXED;
    // SAFETY: the pages that the mapping takes the place of are this function's, and nobody knows them yet.
    unsafe { mmap(start.cast(), size, access, flags, file, offset) }.map_err(failed(size))?;
    region(start, size)
}

fn failed(bytes: usize) -> impl Fn(Errno) -> MemoryError {
    move |source| MemoryError::Map { bytes, source }
}

/// Addresses for a piece, with pages before and after that nobody can access: an access past its ends must not
/// reach anything, should a check ever be wrong. Nor can the pages themselves be accessed yet.
fn reserve(size: usize) -> Result<*mut u8, MemoryError> {
    let reserved = size
        .checked_add(2 * HUGE_PAGE)
        .ok_or_else(|| failed(size)(Errno::NOMEM))?;
    // SAFETY: a new mapping where the kernel finds room.
    let area = unsafe { mmap_anonymous(null_mut(), reserved, ProtFlags::empty(), FLAGS) }
        .map_err(failed(size))?
        .cast::<u8>();
    // The next aligned address: at most a huge page from the start, and at least one from the end.
    Ok(area.wrapping_add(HUGE_PAGE - area.addr() % HUGE_PAGE))
}

fn region(start: *mut u8, size: usize) -> Result<MmapRegion, MemoryError> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        FLAGS.bits().cast_signed(),
    );
    // SAFETY: the pages stay mapped as long as the process lives. They are readable and writable, but for a managed
    // region's, of which `Piece` gives out only what is.
    unsafe { MmapRegion::build_raw(start, size, protection, flags) }.map_err(MemoryError::Region)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion};

    use super::*;

    /// A piece on each side of the gap.
    const MIB: u64 = 3073;
    const HIGH_RAM_END: u64 = HIGH_RAM_START + (1 << 20);

    #[test]
    fn a_small_machine_has_one_piece() {
        assert_eq!(ranges(64).unwrap(), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ranges(3072).unwrap(), [(GuestAddress(0), 3072 << 20)]);
    }

    #[test]
    fn the_rest_of_a_larger_one_lies_past_the_gap() {
        assert_eq!(
            ranges(3073).unwrap(),
            [
                (GuestAddress(0), 3072 << 20),
                (GuestAddress(HIGH_RAM_START), 1 << 20)
            ]
        );
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for mib in [0, MIN_MIB - 1, MAX_MIB + 1, u64::MAX >> 20, u64::MAX] {
            assert!(matches!(ranges(mib), Err(MemoryError::Size(size)) if size == mib));
        }
    }

    #[test]
    fn all_of_it_is_there_and_nothing_of_the_gap() {
        let memory = allocate(MIB).unwrap();

        assert_eq!(
            memory.iter().map(GuestMemoryRegion::len).sum::<u64>(),
            MIB << 20
        );
        assert!(memory.address_in_range(GuestAddress(LOW_RAM_END - 1)));
        assert!(!memory.address_in_range(GuestAddress(LOW_RAM_END)));
        assert!(!memory.address_in_range(GuestAddress(HIGH_RAM_START - 1)));
    }

    #[test]
    fn nothing_next_to_a_piece_can_be_accessed() {
        let memory = allocate(MIB).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();

        for region in memory.iter() {
            let start = region.mapping().as_ptr().addr();
            let end = start + region.mapping().size();
            assert_eq!(start % HUGE_PAGE, 0);
            for (range, access) in [
                (format!("-{start:x} "), "---p"),
                (format!("{start:x}-{end:x} "), "rw-p"),
                (format!("{end:x}-"), "---p"),
            ] {
                let line = maps.lines().find(|line| line.contains(&range)).unwrap();
                assert!(line.contains(access), "{line}");
            }
        }
    }

    #[test]
    fn what_may_be_added_lies_past_all_ram_and_is_not_there() {
        for (ram_mib, start) in [(64, 4_u64), (3072, 4), (4096, 6)] {
            let ram = allocate(ram_mib).unwrap();
            let (memory, managed) = with_managed(&ram, MAX_MIB).unwrap();

            assert_eq!(managed.start, GuestAddress(start << 30));
            assert_eq!(managed.host % HUGE_PAGE, 0);
            assert_eq!(whole_pieces(&memory).count(), ram.num_regions());
            assert!(memory.get_slice(managed.start, 1).is_err());
            let end = managed.start.0 + (MAX_MIB << 20);
            assert_eq!(memory.last_addr(), GuestAddress(end - 1));
        }
    }

    #[test]
    fn addresses_for_what_may_be_added_are_whole_chunks() {
        let ram = allocate(64).unwrap();
        for mib in [0, 1, 127, 129, MAX_MIB + 128, !127, u64::MAX] {
            let refused = with_managed(&ram, mib);
            assert!(matches!(refused, Err(MemoryError::Managed(size)) if size == mib));
        }
    }

    /// An address within two bytes of an edge of RAM, or of the address space.
    fn edge() -> impl Strategy<Value = u64> {
        let edges = [0, LOW_RAM_END, HIGH_RAM_START, HIGH_RAM_END, u64::MAX - 2];
        (proptest::sample::select(edges.to_vec()), 0_u64..5)
            .prop_map(|(edge, offset)| edge.saturating_sub(2).saturating_add(offset))
    }

    /// Next to nothing, or next to all of the high piece.
    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![0_usize..6, (1_usize << 20) - 3..(1 << 20) + 4]
    }

    proptest! {
        // Each maps memory for good.
        #![proptest_config(ProptestConfig::with_cases(8))]

        #[test]
        fn cve_2019_18960_an_access_is_whole_and_in_ram_or_refused(accesses in proptest::collection::vec((edge(), length()), 64)) {
            let memory = allocate(MIB).unwrap();
            for (address, length) in accesses {
                let within = |start: u64, end: u64| {
                    let past = address.checked_add(length as u64);
                    address >= start && past.is_some_and(|past| past <= end)
                };
                // Where nothing is accessed, the address doesn't matter.
                let fine = length == 0 || within(0, LOW_RAM_END) || within(HIGH_RAM_START, HIGH_RAM_END);
                let mut data = vec![0xA5; length];

                let written = memory.write_slice(&data, GuestAddress(address)).is_ok();
                let read = memory.read_slice(&mut data, GuestAddress(address)).is_ok();
                let sliced = length > 0 && memory.get_slice(GuestAddress(address), length).is_ok();

                prop_assert_eq!(written, fine);
                prop_assert_eq!(read, fine);
                prop_assert_eq!(sliced, fine && length > 0);
            }
        }
    }
}
