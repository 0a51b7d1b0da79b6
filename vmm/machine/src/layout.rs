//! Guest physical addresses, all of them.
//!
//! ```text
//! 0                          RAM (low)
//! 0xC000_0000  MMIO gap      32-bit PCI BAR window, 512 MiB
//! 0xE000_0000                PCI ECAM, one bus, 1 MiB
//! 0xFEE0_0000                local APIC (KVM's)
//! 0xFFFB_C000                KVM's TSS and identity map (Intel)
//! 0x1_0000_0000              RAM (high)
//! after RAM                  what a memory device adds, if there is one
//! after these                64-bit PCI BAR window
//! ```

/// End of low RAM and start of the gap for devices.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// First address of RAM past the gap.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// 32-bit PCI memory window.
pub const PCI_MMIO32_START: u64 = 0xC000_0000;
/// Its size in bytes.
pub const PCI_MMIO32_SIZE: u64 = 0x2000_0000;

/// The largest unit in which Linux adds memory on x86-64, in bytes.
const MANAGED_ALIGN: u64 = 2 << 30;

/// Start of what a memory device adds, for a machine whose RAM ends at `ram_end`.
pub const fn managed_start(ram_end: u64) -> u64 {
    let past = if ram_end > HIGH_RAM_START {
        ram_end
    } else {
        HIGH_RAM_START
    };
    past.next_multiple_of(MANAGED_ALIGN)
}

/// Size of the 64-bit PCI memory window, in bytes; where it starts depends on the RAM.
pub const PCI_MMIO64_SIZE: u64 = 0x4_0000_0000;

/// Start of the 64-bit PCI memory window, for a machine whose RAM, and what can be added to it, ends at `ram_end`.
///
/// Aligned to its size: what lies in it can be, too.
pub const fn pci_mmio64_start(ram_end: u64) -> u64 {
    let past = if ram_end > HIGH_RAM_START {
        ram_end
    } else {
        HIGH_RAM_START
    };
    past.next_multiple_of(PCI_MMIO64_SIZE)
}

/// Memory-mapped configuration space (PCI Firmware Specification 3.3, MCFG): bus 0 only.
pub const PCI_ECAM_START: u64 = 0xE000_0000;
/// 32 devices of 8 functions of 4 KiB.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;

/// Local APIC, where the architecture has it.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;

/// KVM needs three pages for a task state segment on Intel processors.
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// And one for an identity page table.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;

/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Its memory map.
pub const PVH_MEMMAP: u64 = 0x7000;
/// Its module list.
pub const PVH_MODULES: u64 = 0x6040;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Its largest size, with the final NUL, in bytes.
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory; from here to the BIOS area is nothing that a guest may use.
pub const CONVENTIONAL_END: u64 = 0xA_0000;
/// RSDP; the other ACPI tables follow. In the BIOS area, which is reserved in the memory map.
pub const ACPI_START: u64 = 0xE_0000;
/// Where a jump to the BIOS in real mode leads (segment 0xFFFF, offset 0); no table reaches it.
pub const BIOS_ENTRY: u64 = 0xF_FFF0;
/// End of the BIOS area.
pub const ACPI_END: u64 = 0x10_0000;
/// Kernels are loaded from here on.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Sleep control register (ACPI 6.5, section 4.8.3.7); hardware-reduced power-off.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register (ACPI 6.5, section 4.8.3.6).
pub const ACPI_RESET_PORT: u16 = 0x602;
/// Value that resets.
pub const ACPI_RESET_VALUE: u8 = 1;
/// The pvpanic device (QEMU's specification, ACPI id QEMU0001).
pub const PVPANIC_PORT: u16 = 0x505;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_of_the_gap_do_not_overlap() {
        let gap = [
            (PCI_MMIO32_START, PCI_MMIO32_SIZE),
            (PCI_ECAM_START, PCI_ECAM_SIZE),
            (LOCAL_APIC, 0x1000),
            (KVM_IDENTITY_MAP, 0x1000),
            (KVM_TSS, 0x3000),
            (HIGH_RAM_START, 0),
        ];

        for pair in gap.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert_eq!(gap[0].0, LOW_RAM_END);
    }

    #[test]
    fn the_boot_structures_do_not_overlap() {
        let low = [
            (PVH_START_INFO, 0x40),
            (PVH_MODULES, 0x20),
            (PVH_MEMMAP, 0x1000),
            (CMDLINE, CMDLINE_MAX as u64),
            (CONVENTIONAL_END, 0),
            (ACPI_START, BIOS_ENTRY - ACPI_START),
            (BIOS_ENTRY, ACPI_END - BIOS_ENTRY),
            (HIGH_MEMORY, 0),
        ];

        for pair in low.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn the_64_bit_window_starts_past_all_ram() {
        assert_eq!(pci_mmio64_start(0x800_0000), PCI_MMIO64_SIZE);
        assert_eq!(pci_mmio64_start(PCI_MMIO64_SIZE), PCI_MMIO64_SIZE);
        assert_eq!(pci_mmio64_start(PCI_MMIO64_SIZE + 1), 2 * PCI_MMIO64_SIZE);
    }
}
