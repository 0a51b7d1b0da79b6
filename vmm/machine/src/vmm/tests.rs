//! What a guest can reach besides RAM, against a list. (Ports have theirs in `kvm::ports`.)

use std::fs::File;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::config::{
    BlockConfig, CachePolicy, ConsoleConfig, NetConfig, NetLimits, ShareConfig, VsockConfig,
};
use crate::devices::mem::Slots;
use crate::layout::{HIGH_RAM_START, LOW_RAM_END, PCI_ECAM_START};
use crate::pci::platform::{MsiLine, MsiMessage, Platform};
use crate::pci::{BusState, FunctionInfo};

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

    fn hold(&self) {}

    fn connect_held(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Slots for Nothing {
    fn add(&mut self, _start: GuestAddress, _size: u64, _host: usize) -> io::Result<()> {
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
    let ram = crate::memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let (memory, managed) = memory::with_managed(&ram, 128).unwrap();
    let share = tempfile::tempdir().unwrap();
    let output = File::options().write(true).open("/dev/null").unwrap();
    let disk = tempfile::tempfile().unwrap();
    let config = MachineConfig {
        vcpus: 2,
        memory_mib: 64,
        kvm: FdIndex(100),
        start: Start::Boot(BootConfig {
            kernel: FdIndex(101),
            initramfs: None,
            cmdline: String::new(),
            huge_pages: false,
        }),
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
            udp_segmentation: false,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queue_pairs: 2,
            tap: None,
            limits: NetLimits::default(),
        }],
        memory_device_mib: 128,
        balloon: true,
    };
    let shares = Shares {
        roots: vec![share.path().to_owned()],
        proc_self_fd: File::open("/proc/self/fd").unwrap().into(),
    };
    let mut descriptors = Descriptors::new(vec![output.into(), disk.into()]);
    let pci = PciRoot::new(memory, Arc::new(Nothing));
    let (pci, _) = add_devices(
        pci,
        &config,
        2,
        &mut descriptors,
        &shares,
        Box::new(|_, _| {}),
        Some(Mem::new(managed, Box::new(Nothing))),
    )
    .unwrap();
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
            // memory
            (8, 0x1af4, 0x1058, 0xff_00_00),
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

    let bars = (0xC000_8000..0xC004_8000_u64).step_by(0x1000);
    // Function 0 of the first nine slots.
    let configuration = (0xE000_0000..0xE004_8000).step_by(0x8000);
    assert_eq!(answers, bars.chain(configuration).collect::<Vec<_>>());
}

/// Registers of a function, from its BAR on: the common configuration is its first page.
struct Registers<'a> {
    pci: &'a PciRoot,
    bar: u64,
}

impl Registers<'_> {
    fn write(&self, offset: u64, data: &[u8]) {
        self.pci.mmio_write(self.bar + offset, data);
    }

    fn read16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.pci.mmio_read(self.bar + offset, &mut data);
        u16::from_le_bytes(data)
    }
}

/// All but the host bridge's.
fn slots(pci: &PciRoot) -> impl Iterator<Item = u64> {
    1..pci.functions().len() as u64
}

/// Does what the drivers of all devices do, up to `DRIVER_OK`, with small queues one after the other.
fn drive(pci: &PciRoot) {
    let mut place = 0x1000_u64;
    for slot in slots(pci) {
        pci.mmio_write(PCI_ECAM_START + slot * 0x8000 + 4, &[6, 0]);
        let registers = Registers {
            pci,
            bar: 0xC000_0000 + slot * 0x8000,
        };
        for status in [1, 3] {
            registers.write(0x14, &[status]);
        }
        // VIRTIO_F_VERSION_1, and no more.
        registers.write(0x08, &1_u32.to_le_bytes());
        registers.write(0x0c, &1_u32.to_le_bytes());
        registers.write(0x14, &[11]);
        for queue in 0..registers.read16(0x12) {
            registers.write(0x16, &queue.to_le_bytes());
            registers.write(0x18, &8_u16.to_le_bytes());
            for (register, offset) in [(0x20, 0), (0x28, 0x80), (0x30, 0xa0)] {
                let address = (place + offset).to_le_bytes();
                registers.write(register, &address[..4]);
            }
            registers.write(0x1c, &1_u16.to_le_bytes());
            place += 0x100;
        }
        registers.write(0x14, &[15]);
        let mut status = [0];
        pci.mmio_read(registers.bar + 0x14, &mut status);
        assert_eq!(status, [15]);
    }
}

fn encoded(state: &BusState) -> Vec<u8> {
    postcard::to_allocvec(state).unwrap()
}

/// The state of a bus on which all devices run.
fn state_of_all() -> Vec<u8> {
    let pci = bus();
    drive(&pci);
    let state = encoded(&pci.suspend().unwrap());
    pci.stop();
    state
}

#[test]
fn a_bus_put_aside_is_the_same_in_another_machine() {
    let state = state_of_all();
    let other = bus();

    other
        .restore(postcard::from_bytes(&state).unwrap())
        .unwrap();
    let again = other.suspend().unwrap();
    other.resume();
    let and_again = other.suspend().unwrap();
    other.stop();

    assert_eq!(encoded(&again), state);
    assert_eq!(encoded(&and_again), state);
}

/// Threads of this process that panicked, other than those of tests, whose names have colons.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts [`PANICS`] from now on.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let thread = std::thread::current();
            if thread.name().is_some_and(|name| !name.contains("::")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            usual(panic);
        }));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a state says, a bus takes it, and its devices run on what they find, or refuses it.
    #[test]
    fn no_state_breaks_the_bus(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        count_panics();
        let mut state = state_of_all();
        for (place, value) in changes {
            let place = place.index(state.len());
            state[place] = value;
        }

        if let Ok(state) = postcard::from_bytes(&state) {
            let pci = bus();
            if pci.restore(state).is_ok() {
                drive_on(&pci);
                pci.suspend().unwrap();
                pci.resume();
            }
            pci.stop();
        }
        prop_assert_eq!(PANICS.load(Ordering::SeqCst), 0);
    }
}

/// Rings all doorbells.
fn drive_on(pci: &PciRoot) {
    for slot in slots(pci) {
        for queue in 0..8 {
            let notify = 0xC000_0000 + slot * 0x8000 + 0x3000 + 4 * queue;
            pci.mmio_write(notify, &[0, 0]);
        }
    }
}
