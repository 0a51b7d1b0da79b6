//! The state in which a processor starts.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, GuestAddress};

use crate::layout::PVH_START_INFO;

/// Protection enabled, and the bit that is always set.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
/// Bit 1 of the flags is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Segment types (Intel SDM volume 3, table 3-1): execute and read, read and write, both accessed; busy task state.
const CODE: u8 = 0xB;
const DATA: u8 = 0x3;
const TASK: u8 = 0xB;

const IA32_MISC_ENABLE: u32 = 0x1A0;
/// Linux uses `rep movs` for copies only with this bit.
const FAST_STRINGS: u64 = 1 << 0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// Enabled, and everything is write-back: without it Linux leaves the page attribute table off, too.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// General registers at the PVH entry point: `%ebx` tells where the start info is.
pub fn pvh_general(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.raw_value(),
        rbx: PVH_START_INFO,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// System registers at the PVH entry point: 32-bit protected mode, flat segments, no paging.
pub fn pvh_system(reset: &kvm_sregs) -> kvm_sregs {
    let flat = |type_, selector| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        // A code or data segment, of 32 bits, with a limit in pages.
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let data = flat(DATA, 0x18);
    kvm_sregs {
        cr0: CR0_PE | CR0_ET,
        cr4: 0,
        cs: flat(CODE, 0x10),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: kvm_segment {
            base: 0,
            limit: 0x67,
            selector: 0x20,
            type_: TASK,
            present: 1,
            ..Default::default()
        },
        ..*reset
    }
}

/// Model-specific registers that differ from what KVM sets at reset.
///
/// # Errors
/// Never in practice: two entries fit.
pub fn model_specific() -> Result<Msrs, vmm_sys_util::fam::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[
        entry(IA32_MISC_ENABLE, FAST_STRINGS),
        entry(IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_is_reached_as_the_protocol_says() {
        let reset = kvm_sregs {
            cr0: 0x6000_0010,
            apic_base: 0xFEE0_0900,
            ..Default::default()
        };

        let general = pvh_general(GuestAddress(0x100_0000));
        let system = pvh_system(&reset);

        assert_eq!((general.rip, general.rbx), (0x100_0000, PVH_START_INFO));
        assert_eq!(general.rflags, 2);
        assert_eq!((system.cr0, system.cr4, system.efer), (0x11, 0, 0));
        assert_eq!((system.cs.base, system.cs.limit), (0, u32::MAX));
        assert_eq!(system.apic_base, reset.apic_base);
    }
}
