//! The PVH boot protocol: start info, memory map, command line, initramfs.
//!
//! Xen's `docs/misc/pvh.pandoc` and `arch-x86/hvm/start_info.h`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, GuestUsize};

use crate::layout::{
    ACPI_END, ACPI_START, CMDLINE, CMDLINE_MAX, CONVENTIONAL_END, HIGH_MEMORY, PCI_ECAM_SIZE,
    PCI_ECAM_START, PVH_MEMMAP, PVH_MODULES, PVH_START_INFO,
};
use crate::memory::{GuestRam, whole_pieces};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u32 = 1;
/// `XEN_HVM_MEMMAP_TYPE_RESERVED`.
const RESERVED: u32 = 2;

const PAGE: u64 = 4096;

/// Why the guest can't be told what it needs to boot.
#[derive(Debug, thiserror::Error)]
pub enum PvhError {
    #[error("the kernel command line of {0} bytes is longer than {max}", max = CMDLINE_MAX - 1)]
    CmdlineLength(usize),
    #[error("the kernel command line has a byte that is not printable ASCII at position {0}")]
    CmdlineByte(usize),
    #[error("reading the size of the initramfs")]
    InitramfsSize(#[source] std::io::Error),
    #[error(
        "the initramfs of {size} bytes does not fit in guest memory beside the kernel; give the machine more memory"
    )]
    InitramfsFit { size: u64 },
    #[error("reading the initramfs into guest memory")]
    InitramfsRead(#[source] vm_memory::GuestMemoryError),
    #[error("writing the command line to guest memory")]
    Cmdline(#[source] vm_memory::GuestMemoryError),
    #[error("writing the boot parameters to guest memory")]
    Parameters(#[source] linux_loader::configurator::Error),
}

/// Where the initramfs lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    start: GuestAddress,
    size: u64,
}

/// Reads the initramfs to the end of low RAM, as far from the kernel as can be.
///
/// # Errors
/// When it doesn't fit past `kernel_end`, or can't be read.
pub fn load_initramfs(
    memory: &GuestRam,
    mut file: File,
    kernel_end: GuestAddress,
) -> Result<Initramfs, PvhError> {
    let size = file.metadata().map_err(PvhError::InitramfsSize)?.size();
    let start = memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
        .checked_sub(size)
        .map(|start| GuestAddress(start & !(PAGE - 1)))
        .filter(|start| *start >= kernel_end)
        .ok_or(PvhError::InitramfsFit { size })?;
    let length = usize::try_from(size).map_err(|_| PvhError::InitramfsFit { size })?;
    memory
        .read_exact_volatile_from(start, &mut file, length)
        .map_err(PvhError::InitramfsRead)?;
    Ok(Initramfs { start, size })
}

/// Writes all that the entry point is told: `%ebx` is to be [`PVH_START_INFO`].
///
/// # Errors
/// When the command line is not one, or guest memory is too small.
pub fn write(
    memory: &GuestRam,
    cmdline: &str,
    initramfs: Option<Initramfs>,
    rsdp: GuestAddress,
) -> Result<(), PvhError> {
    write_cmdline(memory, cmdline)?;
    let map = memory_map(memory);
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: PVH_MODULES,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp.raw_value(),
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: map.iter().fold(0, |count, _| count + 1),
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, GuestAddress(PVH_START_INFO));
    parameters.set_sections(&map, GuestAddress(PVH_MEMMAP));
    if let Some(initramfs) = initramfs {
        let module = hvm_modlist_entry {
            paddr: initramfs.start.raw_value(),
            size: initramfs.size,
            ..Default::default()
        };
        parameters.set_modules(&[module], GuestAddress(PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(PvhError::Parameters)
}

fn write_cmdline(memory: &GuestRam, cmdline: &str) -> Result<(), PvhError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(PvhError::CmdlineLength(cmdline.len()));
    }
    if let Some(position) = cmdline
        .bytes()
        .position(|byte| byte != b' ' && !byte.is_ascii_graphic())
    {
        return Err(PvhError::CmdlineByte(position));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(CMDLINE))
        .map_err(PvhError::Cmdline)
}

/// RAM without the legacy hole; the tables and the configuration space are reserved.
fn memory_map(memory: &GuestRam) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr: u64, end: u64, type_: u32| hvm_memmap_table_entry {
        addr,
        size: end - addr,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, CONVENTIONAL_END, RAM),
        entry(ACPI_START, ACPI_END, RESERVED),
    ];
    for region in whole_pieces(memory) {
        let start = region.start_addr().raw_value();
        let end = start + GuestUsize::from(region.len());
        map.push(entry(start.max(HIGH_MEMORY), end, RAM));
    }
    // Linux believes MCFG about what a memory map or a device reserves, and nothing else.
    map.push(entry(
        PCI_ECAM_START,
        PCI_ECAM_START + PCI_ECAM_SIZE,
        RESERVED,
    ));
    map.sort_unstable_by_key(|entry| entry.addr);
    map
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use vm_memory::ByteValued;

    use super::*;
    use crate::layout::{HIGH_RAM_START, LOW_RAM_END};
    use crate::memory;

    const RSDP: GuestAddress = GuestAddress(ACPI_START);

    fn start_info(memory: &GuestRam) -> hvm_start_info {
        let mut info = hvm_start_info::default();
        memory
            .read_slice(info.as_mut_slice(), GuestAddress(PVH_START_INFO))
            .unwrap();
        info
    }

    fn file_of(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn the_start_info_leads_to_everything() {
        let memory = memory::allocate(64).unwrap();

        write(&memory, "console=hvc0", None, RSDP).unwrap();

        let info = start_info(&memory);
        let mut cmdline = [0; 13];
        memory
            .read_slice(&mut cmdline, GuestAddress(info.cmdline_paddr))
            .unwrap();
        assert_eq!((info.magic, info.version), (MAGIC, 1));
        assert_eq!((info.rsdp_paddr, info.nr_modules), (ACPI_START, 0));
        assert_eq!(&cmdline, b"console=hvc0\0");
    }

    #[test]
    fn the_memory_map_covers_ram_but_not_the_legacy_hole() {
        let memory = memory::allocate(4096).unwrap();

        let map = memory_map(&memory);

        let plain: Vec<_> = map
            .iter()
            .map(|entry| (entry.addr, entry.addr + entry.size, entry.type_))
            .collect();
        assert_eq!(
            plain,
            [
                (0, 0xA_0000, RAM),
                (0xE_0000, 0x10_0000, RESERVED),
                (0x10_0000, LOW_RAM_END, RAM),
                (0xE000_0000, 0xE010_0000, RESERVED),
                (HIGH_RAM_START, HIGH_RAM_START + (1 << 30), RAM),
            ]
        );
    }

    #[test]
    fn the_initramfs_is_a_module_at_the_end_of_low_ram() {
        let memory = memory::allocate(64).unwrap();
        let content = vec![7; 5000];

        let initramfs =
            load_initramfs(&memory, file_of(&content), GuestAddress(HIGH_MEMORY)).unwrap();
        write(&memory, "", Some(initramfs), RSDP).unwrap();

        let mut module = hvm_modlist_entry::default();
        let info = start_info(&memory);
        memory
            .read_slice(module.as_mut_slice(), GuestAddress(info.modlist_paddr))
            .unwrap();
        let mut loaded = vec![0; 5000];
        memory
            .read_slice(&mut loaded, GuestAddress(module.paddr))
            .unwrap();
        assert_eq!(info.nr_modules, 1);
        assert_eq!((module.paddr, module.size), ((64 << 20) - 8192, 5000));
        assert_eq!(loaded, content);
    }

    #[test]
    fn an_initramfs_that_reaches_into_the_kernel_is_refused() {
        let memory = memory::allocate(64).unwrap();
        let kernel_end = GuestAddress((64 << 20) - 4096);

        let loaded = load_initramfs(&memory, file_of(&[0; 4097]), kernel_end);

        assert!(matches!(loaded, Err(PvhError::InitramfsFit { size: 4097 })));
    }

    #[test]
    fn a_command_line_is_printable_and_fits() {
        let memory = memory::allocate(64).unwrap();
        let longest = "x".repeat(CMDLINE_MAX - 1);

        assert!(write_cmdline(&memory, &longest).is_ok());
        assert!(matches!(
            write_cmdline(&memory, &format!("{longest}x")),
            Err(PvhError::CmdlineLength(CMDLINE_MAX))
        ));
        for bad in ["a\0", "a\n", "aé"] {
            assert!(matches!(
                write_cmdline(&memory, bad),
                Err(PvhError::CmdlineByte(1))
            ));
        }
    }
}
