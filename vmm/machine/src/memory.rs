//! The guest's RAM: private anonymous memory on both sides of the gap for devices.

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::layout::{HIGH_RAM_START, LOW_RAM_END};

/// The least that a kernel with an initramfs starts in.
pub const MIN_MIB: u64 = 64;
/// 1 TiB.
pub const MAX_MIB: u64 = 1 << 20;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("guest memory of {0} MiB is not within {MIN_MIB} to {MAX_MIB} MiB")]
    Size(u64),
    #[error("mapping {mib} MiB of guest memory")]
    Map {
        mib: u64,
        source: vm_memory::mmap::FromRangesError,
    },
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
pub fn allocate(memory_mib: u64) -> Result<GuestMemoryMmap, MemoryError> {
    GuestMemoryMmap::from_ranges(&ranges(memory_mib)?).map_err(|source| MemoryError::Map {
        mib: memory_mib,
        source,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

    use super::*;

    const PAGE: usize = 4096;
    const REGION: usize = 4 * PAGE;

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
        let memory = allocate(3073).unwrap();

        assert_eq!(
            memory.iter().map(GuestMemoryRegion::len).sum::<u64>(),
            3073 << 20
        );
        assert!(memory.address_in_range(GuestAddress(LOW_RAM_END - 1)));
        assert!(!memory.address_in_range(GuestAddress(LOW_RAM_END)));
        assert!(!memory.address_in_range(GuestAddress(HIGH_RAM_START - 1)));
    }

    /// Two small regions round the gap, each between pages that fault.
    fn guarded() -> GuestMemoryMmap {
        let region = |start| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let area = unsafe {
                rustix::mm::mmap_anonymous(
                    std::ptr::null_mut(),
                    REGION + 2 * PAGE,
                    rustix::mm::ProtFlags::empty(),
                    rustix::mm::MapFlags::PRIVATE,
                )
            }
            .unwrap();
            let inside = area.cast::<u8>().wrapping_add(PAGE);
            let protection = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
            // SAFETY: these pages lie within the mapping made above, which nobody else knows.
            unsafe { rustix::mm::mprotect(inside.cast(), REGION, protection) }.unwrap();
            // SAFETY: the pages are readable, writable, and stay mapped until the test's process ends.
            let mapped = unsafe {
                MmapRegion::build_raw(inside, REGION, libc::PROT_READ | libc::PROT_WRITE, 0)
            }
            .unwrap();
            GuestRegionMmap::new(mapped, GuestAddress(start)).unwrap()
        };
        let low_start = LOW_RAM_END - REGION as u64;
        GuestMemoryMmap::from_regions(vec![region(low_start), region(HIGH_RAM_START)]).unwrap()
    }

    /// An address within two bytes of an edge of RAM, or of the address space.
    fn edge() -> impl Strategy<Value = u64> {
        let edges = [
            0,
            LOW_RAM_END - REGION as u64,
            LOW_RAM_END,
            HIGH_RAM_START,
            HIGH_RAM_START + REGION as u64,
            u64::MAX - 2,
        ];
        (proptest::sample::select(edges.to_vec()), 0_u64..5)
            .prop_map(|(edge, offset)| edge.saturating_sub(2).saturating_add(offset))
    }

    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![0_usize..6, REGION - 3..REGION + 4]
    }

    proptest! {
        #[test]
        fn cve_2019_18960_an_access_is_whole_and_in_ram_or_refused(address in edge(), length in length()) {
            let memory = guarded();
            let inside = |start: u64| {
                address.checked_sub(start).is_some_and(|offset| {
                    offset.checked_add(length as u64).is_some_and(|end| end <= REGION as u64)
                })
            };
            let in_ram = inside(LOW_RAM_END - REGION as u64) || inside(HIGH_RAM_START);
            let mut data = vec![0xA5; length];

            let written = memory.write_slice(&data, GuestAddress(address)).is_ok();
            let read = memory.read_slice(&mut data, GuestAddress(address)).is_ok();
            let sliced = memory.get_slice(GuestAddress(address), length).is_ok();

            // Where nothing is accessed, the address doesn't matter.
            prop_assert_eq!(written, in_ram || length == 0);
            prop_assert_eq!(read, in_ram || length == 0);
            prop_assert!(!sliced || in_ram || length == 0);
            prop_assert!(sliced || !in_ram || length == 0);
        }
    }
}
