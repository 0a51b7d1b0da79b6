//! The ACPI tables: hardware-reduced, and only what this machine has.
//!
//! ACPI 6.5. No interrupt controller but the local APICs, no fixed hardware but the
//! sleep and reset registers; devices are the PCI root and pvpanic.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::madt::{EnabledStatus, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::layout::{
    ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT, ACPI_START,
    BIOS_ENTRY, LOCAL_APIC, PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO32_SIZE, PCI_MMIO32_START,
    PCI_MMIO64_SIZE, PVPANIC_PORT,
};
use crate::memory::GuestRam;

const OEM: [u8; 6] = *b"HULL  ";
const OEM_TABLE: [u8; 8] = *b"HULLVM  ";
const OEM_REVISION: u32 = 1;

/// `SLP_TYP` of power-off, chosen by `_S5` below.
pub const S5_SLEEP_TYPE: u8 = 5;

// These lie below 4 GiB, as the tables' 32-bit fields want.
const LOCAL_APIC_32: u32 = below_4g(LOCAL_APIC);
const ECAM_32: u32 = below_4g(PCI_ECAM_START);
const ECAM_SIZE_32: u32 = below_4g(PCI_ECAM_SIZE);
const MMIO32_FIRST: u32 = below_4g(PCI_MMIO32_START);
const MMIO32_LAST: u32 = below_4g(PCI_MMIO32_START + PCI_MMIO32_SIZE - 1);

#[expect(
    clippy::cast_possible_truncation,
    reason = "checked, and evaluated by the compiler"
)]
const fn below_4g(value: u64) -> u32 {
    assert!(value <= u32::MAX as u64);
    value as u32
}

/// IA-PC boot architecture flags (table 5.10): no VGA, no ASPM control, no CMOS clock;
/// bits 0 and 1, for legacy devices and a keyboard controller, stay clear.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// Why the tables can't be had.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables take {0} bytes and do not fit in their area")]
    Size(u64),
    #[error("writing the ACPI tables to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes all tables and returns the address of the first, the RSDP.
///
/// # Errors
/// When they don't fit.
pub fn write(memory: &GuestRam, vcpus: u8, mmio64_start: u64) -> Result<GuestAddress, AcpiError> {
    let rsdp = GuestAddress(ACPI_START);
    let mut area = Area {
        memory,
        next: rsdp.unchecked_add(Rsdp::len() as u64),
    };
    let dsdt = area.place(dsdt(mmio64_start).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [bytes(&fadt(dsdt)), bytes(&madt(vcpus)), bytes(&mcfg())] {
        xsdt.add_entry(area.place(&table)?.raw_value());
    }
    let xsdt = area.place(&bytes(&xsdt))?;
    memory
        .write_slice(&bytes(&Rsdp::new(OEM, xsdt.raw_value())), rsdp)
        .map_err(AcpiError::Write)?;
    Ok(rsdp)
}

/// The part of guest memory that is still free for tables.
struct Area<'a> {
    memory: &'a GuestRam,
    next: GuestAddress,
}

impl Area<'_> {
    fn place(&mut self, table: &[u8]) -> Result<GuestAddress, AcpiError> {
        let start = GuestAddress(self.next.raw_value().next_multiple_of(16));
        let end = start.unchecked_add(table.len() as u64);
        if end.raw_value() > BIOS_ENTRY {
            return Err(AcpiError::Size(end.raw_value() - ACPI_START));
        }
        self.memory
            .write_slice(table, start)
            .map_err(AcpiError::Write)?;
        self.next = end;
        Ok(start)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A register of one byte in I/O space.
fn port(address: u16) -> GAS {
    GAS::new(
        gas::AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn fadt(dsdt: GuestAddress) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt.raw_value())
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set where there is no such fixed button (section 4.8.3.1).
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(ACPI_SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let address = LocalInterruptController::Address(LOCAL_APIC_32);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM_START, 0, 0, 0);
    mcfg
}

fn dsdt(mmio64_start: u64) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    for byte in definition_block(mmio64_start) {
        dsdt.byte(byte);
    }
    dsdt.update_checksum();
    dsdt
}

fn definition_block(mmio64_start: u64) -> Vec<u8> {
    let bus = AddressSpace::new_bus_number(0_u16, 0);
    let memory32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MMIO32_FIRST,
        MMIO32_LAST,
        None,
    );
    let memory64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        mmio64_start,
        mmio64_start + (PCI_MMIO64_SIZE - 1),
        None,
    );
    let windows = ResourceTemplate::new(vec![&bus, &memory32, &memory64]);
    let root_id = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let root_compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &0_u8);
    let number = Name::new("_BBN".into(), &0_u8);
    let unique = Name::new("_UID".into(), &0_u8);
    let resources = Name::new("_CRS".into(), &windows);
    let root = Device::new(
        "PCI0".into(),
        vec![
            &root_id,
            &root_compatible,
            &segment,
            &number,
            &unique,
            &resources,
        ],
    );

    // PCI Firmware Specification 3.3, section 4.1.2: the motherboard reserves what MCFG describes.
    let ecam = Memory32Fixed::new(true, ECAM_32, ECAM_SIZE_32);
    let ecam = ResourceTemplate::new(vec![&ecam]);
    let board_id = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let board_resources = Name::new("_CRS".into(), &ecam);
    let board = Device::new("MBRD".into(), vec![&board_id, &board_resources]);

    let panic_port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    let panic_port = ResourceTemplate::new(vec![&panic_port]);
    let panic_id = Name::new("_HID".into(), &"QEMU0001");
    // Present, enabled, shown, working.
    let panic_status = Name::new("_STA".into(), &0xF_u8);
    let panic_resources = Name::new("_CRS".into(), &panic_port);
    let panic = Device::new(
        "PEVT".into(),
        vec![&panic_id, &panic_status, &panic_resources],
    );

    let mut block = bytes(&Scope::new("_SB_".into(), vec![&root, &board, &panic]));
    let power_off = Package::new(vec![&S5_SLEEP_TYPE, &0_u8, &0_u8, &0_u8]);
    block.extend(bytes(&Name::new("_S5_".into(), &power_off)));
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::pci_mmio64_start;
    use crate::memory;

    const MMIO64: u64 = pci_mmio64_start(0);

    fn read(memory: &GuestRam, start: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
        bytes
    }

    fn table(memory: &GuestRam, start: u64) -> Vec<u8> {
        let length = u32::from_le_bytes(read(memory, start + 4, 4).try_into().unwrap());
        read(memory, start, length as usize)
    }

    fn u64_at(table: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The tables that XSDT lists, then DSDT.
    fn tables(memory: &GuestRam) -> Vec<Vec<u8>> {
        let xsdt = table(memory, u64_at(&read(memory, ACPI_START, 36), 24));
        let mut tables: Vec<_> = xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table(memory, u64_at(entry, 0)))
            .collect();
        let dsdt = table(memory, u64_at(&tables[0], 140));
        tables.push(dsdt);
        tables
    }

    #[test]
    fn the_rsdp_leads_to_every_table_and_all_sums_are_right() {
        let memory = memory::allocate(64).unwrap();

        let rsdp = write(&memory, 2, MMIO64).unwrap();

        let rsdp = read(&memory, rsdp.raw_value(), 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let tables = tables(&memory);
        let names: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"DSDT"]);
        assert!(tables.iter().all(|table| sum(table) == 0));
    }

    #[test]
    fn the_fadt_names_the_ports_of_the_layout() {
        let memory = memory::allocate(64).unwrap();

        write(&memory, 1, MMIO64).unwrap();

        // Table 5.9: flags at 112, reset register at 116, its value at 128, sleep registers at 244 and 256.
        let fadt = &tables(&memory)[0];
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & 1 << 20, 0);
        assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0x602, 1));
        assert_eq!((fadt[244], u64_at(fadt, 248)), (1, 0x600));
        assert_eq!((fadt[256], u64_at(fadt, 260)), (1, 0x601));
    }

    #[test]
    fn the_madt_has_a_local_apic_for_each_processor_and_nothing_else() {
        let memory = memory::allocate(64).unwrap();

        write(&memory, 64, MMIO64).unwrap();

        let madt = &tables(&memory)[1];
        let entries: Vec<_> = madt[44..].chunks_exact(8).collect();
        assert_eq!(entries.len(), 64);
        assert_eq!(entries[63], [0, 8, 63, 63, 1, 0, 0, 0]);
    }

    #[test]
    fn the_mcfg_has_the_one_bus() {
        let memory = memory::allocate(64).unwrap();

        write(&memory, 1, MMIO64).unwrap();

        let mcfg = &tables(&memory)[2];
        assert_eq!(mcfg.len(), 60);
        assert_eq!(u64_at(mcfg, 44), PCI_ECAM_START);
        assert_eq!(&mcfg[52..56], [0, 0, 0, 0]);
    }

    #[test]
    fn the_dsdt_lists_only_devices_that_exist() {
        let block = definition_block(MMIO64);
        let devices: Vec<_> = block
            .windows(2)
            .enumerate()
            .filter(|(_, bytes)| *bytes == [0x5B, 0x82])
            .map(|(position, _)| {
                // The package length that follows takes one to four bytes (section 20.2.4).
                let name = position + 3 + usize::from(block[position + 2] >> 6);
                block[name..name + 4].to_vec()
            })
            .collect();

        assert_eq!(devices, [b"PCI0", b"MBRD", b"PEVT"]);
    }

    #[test]
    fn tables_past_the_area_are_refused() {
        let memory = memory::allocate(64).unwrap();
        let mut area = Area {
            memory: &memory,
            next: GuestAddress(BIOS_ENTRY - 16),
        };

        assert!(area.place(&[0; 16]).is_ok());
        assert!(matches!(area.place(&[0]), Err(AcpiError::Size(0x1_FFF1))));
    }
}
