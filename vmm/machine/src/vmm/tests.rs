//! What a guest can reach besides RAM, against a list. (Ports have theirs in `kvm::ports`.)

use std::fs::File;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::config::{CachePolicy, ConsoleConfig, NetLimits, VsockConfig};
use crate::layout::{HIGH_RAM_START, LOW_RAM_END, PCI_ECAM_START};
use crate::pci::FunctionInfo;
use crate::pci::platform::{MsiLine, MsiMessage, Platform};

/// A hypervisor that does nothing.
#[derive(Debug)]
struct Nothing;

impl Platform for Nothing {
    fn msi_line(&self) -> io::Result<Arc<dyn MsiLine>> {
        Ok(Arc::new(Self))
    }

    fn attach_doorbell(&self, _address: u64, _kick: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn detach_doorbell(&self, _address: u64, _kick: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

impl MsiLine for Nothing {
    fn connect(&self, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn disconnect(&self) -> io::Result<()> {
        Ok(())
    }

    fn signal(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_pending(&self) -> bool {
        false
    }

    fn clear(&self) {}
}

/// The bus of a machine with one of each device.
fn bus() -> PciRoot {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let share = tempfile::tempdir().unwrap();
    let output = File::options().write(true).open("/dev/null").unwrap();
    let disk = tempfile::tempfile().unwrap();
    let config = MachineConfig {
        vcpus: 2,
        memory_mib: 64,
        kvm: FdIndex(100),
        kernel: FdIndex(101),
        initramfs: None,
        cmdline: String::new(),
        console: ConsoleConfig { output: FdIndex(0) },
        shares: vec![ShareConfig {
            tag: "hull".into(),
            root: FdIndex(102),
            read_only: true,
            cache: CachePolicy::Auto,
        }],
        blocks: vec![BlockConfig {
            id: "disk".into(),
            disk: Some(FdIndex(1)),
            read_only: true,
        }],
        vsock: Some(VsockConfig {
            cid: 3,
            guest_ports: vec![],
        }),
        nets: vec![NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queue_pairs: 2,
            tap: None,
            limits: NetLimits::default(),
        }],
        balloon: true,
    };
    let shares = Shares {
        roots: vec![share.path().to_owned()],
        proc_self_fd: File::open("/proc/self/fd").unwrap().into(),
    };
    let mut descriptors = Descriptors::new(vec![output.into(), disk.into()]);
    let pci = PciRoot::new(memory, Arc::new(Nothing));
    let (pci, _) =
        add_devices(pci, &config, &mut descriptors, &shares, Box::new(|_, _| {})).unwrap();
    pci
}

/// CVE-2015-3456: a device that nobody used was there all the same.
#[test]
fn cve_2015_3456_no_other_function_is_on_the_bus() {
    let pci = bus();

    let found: Vec<_> = pci
        .functions()
        .iter()
        .map(|FunctionInfo { slot, identity, .. }| {
            (*slot, identity.vendor, identity.device, identity.class)
        })
        .collect();

    assert_eq!(
        found,
        [
            // host bridge
            (0, 0x1b36, 0x0008, 0x06_00_00),
            // console
            (1, 0x1af4, 0x1043, 0x07_80_00),
            // entropy
            (2, 0x1af4, 0x1044, 0xff_00_00),
            // block
            (3, 0x1af4, 0x1042, 0x01_80_00),
            // file system
            (4, 0x1af4, 0x105a, 0x01_80_00),
            // vsock
            (5, 0x1af4, 0x1053, 0x07_80_00),
            // network
            (6, 0x1af4, 0x1041, 0x02_00_00),
            // balloon
            (7, 0x1af4, 0x1045, 0xff_00_00),
        ]
    );
}

/// CVE-2015-3456, for memory: every page from the end of low RAM to the start of high RAM.
#[test]
fn cve_2015_3456_no_other_page_answers() {
    let pci = bus();
    // The guest lets every function decode its BAR.
    for slot in 0..32 {
        pci.mmio_write(PCI_ECAM_START + slot * 0x8000 + 4, &[2, 0]);
    }

    let answers: Vec<u64> = (LOW_RAM_END..HIGH_RAM_START)
        .step_by(0x1000)
        .filter(|page| {
            let mut data = [0; 4];
            pci.mmio_read(*page, &mut data);
            data != [0xff; 4]
        })
        .collect();

    let bars = (0xC000_8000..0xC004_0000_u64).step_by(0x1000);
    // Function 0 of the first eight slots.
    let configuration = (0xE000_0000..0xE004_0000).step_by(0x8000);
    assert_eq!(answers, bars.chain(configuration).collect::<Vec<_>>());
}
