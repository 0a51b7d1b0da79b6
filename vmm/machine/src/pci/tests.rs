//! The bus as a guest's processor finds it, without a hypervisor.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::platform::{MsiLine, MsiMessage};
use super::*;
use crate::layout::PCI_MMIO32_SIZE;
use crate::virtio::device::{Activation, Suspended, VirtioDevice};

#[derive(Debug, Default)]
struct Line {
    connected: Mutex<Option<MsiMessage>>,
    pending: AtomicBool,
    delivered: Mutex<Vec<MsiMessage>>,
}

impl MsiLine for Line {
    fn connect(&self, message: MsiMessage) -> io::Result<()> {
        // As KVM does with x2APIC ids: the low byte of the high half must be zero.
        if message.address >> 32 & 0xff != 0 {
            *self.connected.lock().unwrap() = None;
            return Err(io::ErrorKind::InvalidInput.into());
        }
        *self.connected.lock().unwrap() = Some(message);
        if self.pending.swap(false, Ordering::SeqCst) {
            self.delivered.lock().unwrap().push(message);
        }
        Ok(())
    }

    fn disconnect(&self) -> io::Result<()> {
        *self.connected.lock().unwrap() = None;
        Ok(())
    }

    fn signal(&self) -> io::Result<()> {
        match *self.connected.lock().unwrap() {
            Some(message) => self.delivered.lock().unwrap().push(message),
            None => self.pending.store(true, Ordering::SeqCst),
        }
        Ok(())
    }

    fn is_pending(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    fn clear(&self) {
        self.pending.store(false, Ordering::SeqCst);
    }
}

#[derive(Debug, Default)]
struct Hypervisor {
    lines: Mutex<Vec<Arc<Line>>>,
    doorbells: Mutex<Vec<u64>>,
}

impl Platform for Hypervisor {
    fn msi_line(&self) -> io::Result<Arc<dyn MsiLine>> {
        let line = Arc::new(Line::default());
        self.lines.lock().unwrap().push(line.clone());
        Ok(line)
    }

    fn attach_doorbell(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        if doorbells.contains(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        doorbells.push(address);
        Ok(())
    }

    fn detach_doorbell(&self, address: u64, _kick: &EventFd) -> io::Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let before = doorbells.len();
        doorbells.retain(|attached| *attached != address);
        assert_eq!(doorbells.len() + 1, before, "no doorbell at {address:#x}");
        Ok(())
    }

    fn hold(&self) {}

    fn connect_held(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A device whose configuration is a letter, and which counts its resets.
#[derive(Debug, Default)]
struct Device {
    active: Arc<AtomicU64>,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        4
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(b'x');
    }

    fn activate(&mut self, _activation: Activation) -> io::Result<()> {
        self.active.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        self.active.fetch_sub(1, Ordering::SeqCst);
        Ok(Suspended::default())
    }

    fn reset(&mut self) {
        self.active.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Bench {
    root: PciRoot,
    hypervisor: Arc<Hypervisor>,
    active: Arc<AtomicU64>,
}

/// The function's configuration space, its BAR, and parts of the BAR.
const CONFIG: u64 = PCI_ECAM_START + 0x8000;
const BAR: u64 = PCI_MMIO32_START + 0x8000;
const DEVICE: u64 = BAR + 0x2000;
const TABLE: u64 = BAR + 0x4000;
const PENDING: u64 = BAR + 0x5000;

impl Bench {
    fn new() -> Self {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let hypervisor = Arc::new(Hypervisor::default());
        let mut root = PciRoot::new(memory, hypervisor.clone());
        let active = Arc::new(AtomicU64::new(0));
        let device = Device {
            active: active.clone(),
        };
        assert_eq!(root.add_virtio(Box::new(device)).unwrap(), 1);
        Self {
            root,
            hypervisor,
            active,
        }
    }

    /// With memory decoding on, and MSI-X enabled.
    fn enabled() -> Self {
        let bench = Self::new();
        bench.write16(CONFIG + 4, 6);
        bench.write16(bench.msix_control(), 0x8000);
        bench
    }

    fn read32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.root.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write32(&self, address: u64, value: u32) {
        self.root.mmio_write(address, &value.to_le_bytes());
    }

    fn write16(&self, address: u64, value: u16) {
        self.root.mmio_write(address, &value.to_le_bytes());
    }

    fn write8(&self, address: u64, value: u8) {
        self.root.mmio_write(address, &[value]);
    }

    /// Id, offset in configuration space, and first four bytes of each capability.
    fn capabilities(&self) -> Vec<(u8, u64)> {
        let first = self.read32(CONFIG + 0x34) & 0xff;
        std::iter::successors(Some(u64::from(first)), |at| {
            let next = self.read32(CONFIG + at) >> 8 & 0xff;
            (next != 0).then_some(u64::from(next))
        })
        .map(|at| (self.read32(CONFIG + at).to_le_bytes()[0], at))
        .collect()
    }

    fn capability(&self, id: u8) -> u64 {
        let all = self.capabilities();
        let last = all.iter().rfind(|(kind, _)| *kind == id).unwrap();
        CONFIG + last.1
    }

    fn msix_control(&self) -> u64 {
        self.capability(0x11) + 2
    }

    fn set_vector(&self, number: u64, message: MsiMessage, masked: u32) {
        let entry = TABLE + 16 * number;
        self.write32(entry, u32::try_from(message.address & 0xffff_ffff).unwrap());
        self.write32(entry + 4, u32::try_from(message.address >> 32).unwrap());
        self.write32(entry + 8, message.data);
        self.write32(entry + 12, masked);
    }

    fn doorbells(&self) -> Vec<u64> {
        self.hypervisor.doorbells.lock().unwrap().clone()
    }

    fn line(&self, number: usize) -> Arc<Line> {
        self.hypervisor.lines.lock().unwrap()[number].clone()
    }

    fn connected(&self, number: usize) -> Option<MsiMessage> {
        *self.line(number).connected.lock().unwrap()
    }
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_1000,
        data,
    }
}

#[test]
fn the_bus_has_a_bridge_and_the_device_and_nothing_else() {
    let bench = Bench::new();

    let found: Vec<_> = (0..PCI_ECAM_SIZE / 0x1000)
        .map(|function| bench.read32(PCI_ECAM_START + function * 0x1000))
        .enumerate()
        .filter(|(_, id)| *id != u32::MAX)
        .collect();

    assert_eq!(found, [(0, 0x0008_1b36), (8, 0x1044_1af4)]);
    assert_eq!(bench.read32(PCI_ECAM_START + 8) >> 8, 0x06_00_00);
    // Type 0, one function.
    assert_eq!(bench.read32(CONFIG + 0x0c), 0);
}

#[test]
fn capabilities_are_the_five_structures_and_msix() {
    let bench = Bench::new();

    let kinds: Vec<_> = bench
        .capabilities()
        .iter()
        .map(|(id, at)| (*id, bench.read32(CONFIG + at).to_le_bytes()[3]))
        .collect();

    assert_eq!(kinds, [(9, 1), (9, 2), (9, 3), (9, 4), (9, 5), (0x11, 0)]);
    // Three vectors: for two queues, and for the configuration.
    assert_eq!(bench.read32(bench.msix_control() - 2) >> 16, 2);
}

#[test]
fn each_queue_has_its_doorbell_while_memory_decoding_is_on() {
    let bench = Bench::new();
    let before = bench.doorbells();
    bench.write16(CONFIG + 4, 2);
    let on = bench.doorbells();
    bench.write16(CONFIG + 4, 0);

    assert_eq!(on, [BAR + 0x3000, BAR + 0x3004]);
    assert_eq!((before, bench.doorbells()), (vec![], vec![]));
}

#[test]
fn a_bar_answers_only_while_memory_decoding_is_on() {
    let bench = Bench::new();
    let off = bench.read32(DEVICE);
    bench.write16(CONFIG + 4, 2);
    let on = bench.read32(DEVICE);
    bench.write16(CONFIG + 4, 0);

    assert_eq!((off, on), (u32::MAX, 0x7878_7878));
    assert_eq!(bench.read32(DEVICE), u32::MAX);
}

#[test]
fn a_bar_that_the_guest_moves_answers_there_with_its_doorbells() {
    let bench = Bench::enabled();
    let elsewhere = PCI_MMIO32_START + PCI_MMIO32_SIZE - 0x8000;
    bench.write32(CONFIG + 0x10, u32::try_from(elsewhere).unwrap());

    assert_eq!(bench.read32(DEVICE), u32::MAX);
    assert_eq!(bench.read32(elsewhere + 0x2000), 0x7878_7878);
    assert_eq!(bench.doorbells(), [elsewhere + 0x3000, elsewhere + 0x3004]);
}

#[test]
fn a_bar_outside_the_window_answers_nowhere() {
    let bench = Bench::enabled();

    for outside in [
        0,
        0x10_0000,
        0xBFFF_8000,
        0xE000_0000,
        0xFEE0_0000,
        0xFFFF_8000,
    ] {
        bench.write32(CONFIG + 0x10, outside);

        assert_ne!(bench.read32(u64::from(outside) + 0x2000), 0x7878_7878);
        assert!(bench.doorbells().is_empty());
    }
    bench.write32(CONFIG + 0x10, u32::try_from(BAR).unwrap());
    assert_eq!(bench.read32(DEVICE), 0x7878_7878);
}

#[test]
fn a_bar_on_another_functions_answers_nowhere() {
    let mut bench = Bench::enabled();
    bench.root.add_virtio(Box::new(Device::default())).unwrap();
    let other = CONFIG + 0x8000;
    bench.write16(other + 4, 2);
    let both = bench.doorbells().len();
    bench.write32(other + 0x10, u32::try_from(BAR).unwrap());
    let one = bench.doorbells();
    bench.write16(CONFIG + 4, 0);

    assert_eq!(both, 4);
    assert_eq!(one, [BAR + 0x3000, BAR + 0x3004]);
    assert_eq!(bench.read32(DEVICE), u32::MAX);
}

#[test]
fn other_bars_do_not_exist() {
    let bench = Bench::new();

    for bar in 1..7 {
        bench.write32(CONFIG + 0x10 + 4 * bar, u32::MAX);
    }

    let read: Vec<_> = (1..6)
        .map(|bar| bench.read32(CONFIG + 0x10 + 4 * bar))
        .collect();
    assert_eq!(read, [0; 5]);
    assert_eq!(bench.read32(CONFIG + 0x30), 0);
}

#[test]
fn vectors_are_delivered_where_the_guest_says_and_follow_it() {
    let bench = Bench::enabled();

    bench.set_vector(1, message(0x41), 0);
    bench.line(1).signal().unwrap();
    bench.write32(TABLE + 16 + 8, 0x42);
    bench.line(1).signal().unwrap();

    let delivered = bench.line(1).delivered.lock().unwrap().clone();
    assert_eq!(delivered, [message(0x41), message(0x42)]);
    assert_eq!(bench.connected(0), None);
}

#[test]
fn a_masked_vector_is_pending_and_delivered_once_unmasked() {
    let bench = Bench::enabled();
    bench.set_vector(2, message(7), 0);
    bench.write32(TABLE + 2 * 16 + 12, 1);
    bench.line(2).signal().unwrap();
    bench.line(2).signal().unwrap();
    let pending = bench.read32(PENDING);
    bench.write32(TABLE + 2 * 16 + 12, 0);

    assert_eq!((pending, bench.read32(PENDING)), (0b100, 0));
    assert_eq!(*bench.line(2).delivered.lock().unwrap(), [message(7)]);
}

#[test]
fn the_function_mask_masks_every_vector() {
    let bench = Bench::enabled();
    bench.set_vector(0, message(1), 0);
    bench.set_vector(1, message(2), 0);
    bench.write16(bench.msix_control(), 0xc000);
    bench.line(0).signal().unwrap();
    let pending = bench.read32(PENDING);
    bench.write16(bench.msix_control(), 0x8000);

    assert_eq!(pending, 1);
    assert_eq!(*bench.line(0).delivered.lock().unwrap(), [message(1)]);
    assert_eq!(bench.connected(1), Some(message(2)));
}

#[test]
fn a_message_that_no_processor_takes_leaves_the_vector_without_a_line() {
    let bench = Bench::enabled();
    let bad = MsiMessage {
        address: 0x01_fee0_1000,
        data: 1,
    };
    bench.set_vector(0, bad, 0);
    let refused = bench.connected(0);
    bench.write32(TABLE + 4, 0);

    assert_eq!(refused, None);
    assert_eq!(bench.connected(0), Some(message(1)));
}

#[test]
fn what_was_signalled_without_msix_is_forgotten() {
    let bench = Bench::new();
    bench.write16(CONFIG + 4, 6);
    bench.line(0).signal().unwrap();
    bench.set_vector(0, message(1), 0);

    bench.write16(bench.msix_control(), 0x8000);

    assert_eq!(bench.connected(0), Some(message(1)));
    assert!(bench.line(0).delivered.lock().unwrap().is_empty());
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let bench = Bench::new();
    let window = bench.capability(9);
    bench.write8(window + 4, 0);
    bench.write32(window + 8, 0x2000);
    bench.write32(window + 12, 4);
    let device = bench.read32(window + 16);
    // The status register, one byte.
    bench.write32(window + 8, 0x14);
    bench.write32(window + 12, 1);
    bench.write8(window + 16, 1);
    let mut status = [0];
    bench.root.mmio_read(window + 16, &mut status);

    assert_eq!(device, 0x7878_7878);
    assert_eq!(status, [1]);
}

#[test]
fn stopping_the_bus_resets_its_devices() {
    let bench = Bench::enabled();
    bench.write8(BAR + 0x14, 1);
    bench.write8(BAR + 0x14, 3);
    bench.write32(BAR + 8, 1);
    bench.write32(BAR + 0xc, 1);
    bench.write8(BAR + 0x14, 11);
    bench.write8(BAR + 0x14, 15);
    let running = bench.active.load(Ordering::SeqCst);

    bench.root.stop();

    assert_eq!((running, bench.active.load(Ordering::SeqCst)), (1, 0));
}

#[test]
fn a_bus_is_full_after_31_devices() {
    let mut bench = Bench::new();

    let added = (0..40)
        .map(|_| bench.root.add_virtio(Box::new(Device::default())))
        .filter(Result::is_ok)
        .count();

    assert_eq!(added, 30);
    let functions = bench.root.functions();
    let windows: Vec<_> = functions.iter().filter_map(|found| found.bar).collect();
    assert_eq!(windows.len(), 31);
    assert!(
        windows
            .windows(2)
            .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
    );
    let (last, size) = windows[30];
    assert!(last + size <= PCI_MMIO32_START + PCI_MMIO32_SIZE);
}

fn places() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0..0x100_u64).prop_map(|at| CONFIG + at),
        3 => (0..0x40_u64).prop_map(|at| BAR + at),
        3 => (0..0x48_u64).prop_map(|at| TABLE + at),
        2 => (0..0x8000_u64).prop_map(|at| BAR + at),
        1 => (0..0x20_u64).prop_map(|at| BAR - 8 + at),
        1 => (0..0x20_u64).prop_map(|at| BAR + 0x8000 - 8 + at),
        1 => (0..PCI_ECAM_SIZE + 16).prop_map(|at| PCI_ECAM_START - 8 + at),
        1 => any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_access_breaks_the_bus(
        accesses in prop::collection::vec(
            (places(), prop::collection::vec(any::<u8>(), 0..17), any::<bool>()), 1..96),
    ) {
        let bench = Bench::enabled();
        bench.set_vector(0, message(1), 0);

        for (address, data, natural) in accesses {
            let len = if natural { data.len().min(4).next_power_of_two() } else { data.len() };
            let mut data = data;
            data.resize(len, 0);
            bench.root.mmio_write(address, &data);
            bench.root.mmio_read(address, &mut data);
        }

        // Ids stand, and each line is connected exactly if the registers say so.
        prop_assert_eq!(bench.read32(CONFIG), 0x1044_1af4);
        bench.write16(CONFIG + 4, 2);
        bench.write32(CONFIG + 0x10, u32::try_from(BAR).unwrap());
        let control = bench.read32(bench.msix_control() - 2) >> 16;
        for number in 0..3_u16 {
            let entry = TABLE + 16 * u64::from(number);
            let register = |index: u64| bench.read32(entry + 4 * index);
            let open = control & 0xc000 == 0x8000 && register(3) & 1 == 0;
            let refused = register(1) & 0xff != 0;
            let address = u64::from(register(1)) << 32 | u64::from(register(0));
            let message = MsiMessage { address, data: register(2) };
            let expected = (open && !refused).then_some(message);
            prop_assert_eq!(bench.connected(usize::from(number)), expected);
        }
    }
}
