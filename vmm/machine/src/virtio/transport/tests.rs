//! A driver's register writes, good, bad and random, against what must always hold.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const QUEUES: [u16; 3] = [256, 64, 8];
const OFFERED: u64 = EVENT_IDX | INDIRECT_DESC | 0b101;
/// RAM of the test: two regions with a gap.
const LOW_END: u64 = 0x10_0000;
const HIGH_START: u64 = 0x18_0000;
const HIGH_END: u64 = 0x20_0000;

/// What has happened to a device.
#[derive(Debug, Default)]
struct Seen {
    running: Option<Activation>,
    activations: u32,
    resets: u32,
}

#[derive(Debug, Default)]
struct Device {
    seen: Arc<Mutex<Seen>>,
    fails: bool,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        // Bits that are the transport's, and that it doesn't have, must not get out.
        OFFERED | 1 << 33 | 1 << 34 | 1 << 40
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset & 0xff).unwrap());
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let mut seen = self.seen.lock().unwrap();
        assert!(seen.running.is_none(), "activated twice");
        seen.activations += 1;
        seen.running = Some(activation);
        if self.fails {
            return Err(io::Error::other("no"));
        }
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        let activation = self.seen.lock().unwrap().running.take();
        let queues = activation.iter().flat_map(|it| &it.queues);
        Ok(Suspended {
            positions: queues.map(ActiveQueue::position).collect(),
            state: vec![42],
            only_here: None,
        })
    }

    fn reset(&mut self) {
        let mut seen = self.seen.lock().unwrap();
        seen.running = None;
        seen.resets += 1;
    }
}

#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Interrupt for Counter {
    fn signal(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Bench {
    transport: Transport,
    seen: Arc<Mutex<Seen>>,
    counters: Vec<Arc<Counter>>,
}

impl Bench {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(fails: bool) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let device = Device {
            seen: seen.clone(),
            fails,
        };
        let memory = crate::memory::from_ranges(&[
            (GuestAddress(0), usize::try_from(LOW_END).unwrap()),
            (
                GuestAddress(HIGH_START),
                usize::try_from(HIGH_END - HIGH_START).unwrap(),
            ),
        ])
        .unwrap();
        let kicks = QUEUES
            .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
            .into_iter()
            .collect();
        let counters: Vec<_> = (0..4).map(|_| Arc::new(Counter::default())).collect();
        let vectors = counters
            .iter()
            .map(|counter| counter.clone() as Arc<dyn Interrupt>)
            .collect();
        Self {
            transport: Transport::new(Box::new(device), memory, kicks, vectors),
            seen,
            counters,
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.transport.write_common(offset, data);
    }

    fn write16(&mut self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn read16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.transport.read_common(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read_common(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn status(&self) -> u8 {
        let mut data = [0];
        self.transport.read_common(common::DEVICE_STATUS, &mut data);
        data[0]
    }

    /// Up to `FEATURES_OK`, with everything that is offered.
    fn negotiate(&mut self) {
        self.write(common::DEVICE_STATUS, &[1]);
        self.write(common::DEVICE_STATUS, &[3]);
        for half in 0..2 {
            self.write32(common::DEVICE_FEATURE_SELECT, half);
            let features = self.read32(common::DEVICE_FEATURE);
            self.write32(common::DRIVER_FEATURE_SELECT, half);
            self.write32(common::DRIVER_FEATURE, features);
        }
        self.write(common::DEVICE_STATUS, &[11]);
    }

    fn set_queue(&mut self, index: u16, size: u16, addresses: [u64; 3]) {
        self.write16(common::QUEUE_SELECT, index);
        self.write16(common::QUEUE_SIZE, size);
        for (base, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
            self.write32(base, select(address, 0));
            self.write32(base + 4, select(address, 1));
        }
        self.write16(common::QUEUE_VECTOR, index + 1);
        self.write16(common::QUEUE_ENABLE, 1);
    }

    fn driver_ok(&mut self) {
        self.write(common::DEVICE_STATUS, &[15]);
    }

    /// A device that runs, with queue 0 at good addresses.
    fn running() -> Self {
        let mut bench = Self::new();
        bench.start_anew();
        assert_eq!(bench.status(), 15);
        bench
    }

    fn start_anew(&mut self) {
        self.write(common::DEVICE_STATUS, &[0]);
        self.negotiate();
        self.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);
        self.driver_ok();
    }

    /// Status after a driver sets queue 0 up so, and says that it is done.
    fn status_with(size: u16, addresses: [u64; 3]) -> u8 {
        let mut bench = Self::new();
        bench.negotiate();
        bench.set_queue(0, size, addresses);
        bench.driver_ok();
        bench.status()
    }
}

#[test]
fn a_good_driver_gets_a_running_device_with_its_queues() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    bench.set_queue(2, 8, [HIGH_START, HIGH_START + 0x100, HIGH_END - 72]);
    bench.driver_ok();

    let seen = bench.seen.lock().unwrap();
    let running = seen.running.as_ref().unwrap();
    let queues: Vec<_> = running
        .queues
        .iter()
        .map(|active| (active.index, active.queue.size(), active.queue.used_ring()))
        .collect();
    assert_eq!(queues, [(0, 16, 0x3000), (2, 8, HIGH_END - 72)][..]);
    assert_eq!(running.features, OFFERED | VERSION_1);
    assert!(running.queues[0].queue.event_idx_enabled());
}

#[test]
fn interrupts_go_to_the_vector_that_the_driver_has_chosen() {
    let mut bench = Bench::running();
    bench.write16(common::CONFIG_VECTOR, 3);
    let (queue, config) = {
        let mut seen = bench.seen.lock().unwrap();
        let running = seen.running.as_mut().unwrap();
        (
            running.queues[0].interrupt.clone(),
            running.config_interrupt.clone(),
        )
    };

    queue.signal().unwrap();
    config.signal().unwrap();
    bench.write16(common::QUEUE_VECTOR, NO_VECTOR);
    queue.signal().unwrap();

    let counts: Vec<_> = bench
        .counters
        .iter()
        .map(|counter| counter.0.load(Ordering::SeqCst))
        .collect();
    assert_eq!(counts, [0, 1, 0, 1]);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let mut bench = Bench::new();

    bench.write16(common::CONFIG_VECTOR, 4);
    bench.write16(common::QUEUE_VECTOR, 0x7ff);

    assert_eq!(bench.read16(common::CONFIG_VECTOR), NO_VECTOR);
    assert_eq!(bench.read16(common::QUEUE_VECTOR), NO_VECTOR);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut bench = Bench::new();
    bench.write(common::DEVICE_STATUS, &[1]);
    bench.write(common::DEVICE_STATUS, &[3]);
    bench.write32(common::DRIVER_FEATURE_SELECT, 1);
    bench.write32(common::DRIVER_FEATURE, 1 | 1 << 2);
    bench.write(common::DEVICE_STATUS, &[11]);
    let refused = bench.status();
    bench.write32(common::DRIVER_FEATURE, 1);
    bench.write(common::DEVICE_STATUS, &[11]);

    assert_eq!((refused, bench.status()), (3, 11));
}

#[test]
fn a_driver_of_the_past_is_refused() {
    let mut bench = Bench::new();
    bench.write(common::DEVICE_STATUS, &[1]);
    bench.write(common::DEVICE_STATUS, &[3]);
    bench.write(common::DEVICE_STATUS, &[11]);

    assert_eq!(bench.status(), 3);
}

#[test]
fn ring_features_of_others_are_not_offered() {
    let mut bench = Bench::new();
    bench.write32(common::DEVICE_FEATURE_SELECT, 1);

    assert_eq!(bench.read32(common::DEVICE_FEATURE), 1);
}

#[test]
fn queues_that_are_not_all_in_ram_are_refused() {
    let good = [0x1000, 0x2000, 0x3000];
    let refused = 11 | status::NEEDS_RESET;
    let with = |part: usize, address: u64| {
        let mut addresses = good;
        addresses[part] = address;
        Bench::status_with(16, addresses)
    };

    assert_eq!(Bench::status_with(16, good), 15);
    // In the gap, across either of its edges, past the end, and wrapping.
    for part in 0..3 {
        assert_eq!(with(part, LOW_END), refused);
        assert_eq!(with(part, LOW_END - 16), refused);
        assert_eq!(with(part, HIGH_START - 16), refused);
        assert_eq!(with(part, HIGH_END), refused);
        assert_eq!(with(part, HIGH_END - 16), refused);
        assert_eq!(with(part, u64::MAX - 15), refused);
        assert_eq!(with(part, crate::layout::PCI_MMIO32_START), refused);
    }
    // Exactly at the ends.
    assert_eq!(with(0, LOW_END - 256), 15);
    assert_eq!(with(1, LOW_END - 38), 15);
    assert_eq!(with(2, LOW_END - 136), 15);
    // Not aligned.
    assert_eq!(with(0, 0x1008), refused);
    assert_eq!(with(1, 0x2001), refused);
    assert_eq!(with(2, 0x3002), refused);
}

#[test]
fn sizes_that_a_queue_cannot_have_are_ignored() {
    let mut bench = Bench::new();
    bench.negotiate();

    let sizes = [0, 3, 512, 0x8000, 0xffff, 32].map(|size| {
        bench.write16(common::QUEUE_SIZE, size);
        bench.read16(common::QUEUE_SIZE)
    });

    assert_eq!(sizes, [256, 256, 256, 256, 256, 32]);
}

#[test]
fn queues_that_do_not_exist_read_as_zero() {
    let mut bench = Bench::new();
    bench.negotiate();

    bench.set_queue(3, 16, [0x1000, 0x2000, 0x3000]);

    assert_eq!(bench.read16(common::QUEUE_SIZE), 0);
    assert_eq!(bench.read16(common::QUEUE_ENABLE), 0);
    assert_eq!(bench.read32(common::QUEUE_DESC), 0);
}

/// threats.md CVE-2026-5747: nothing of a queue can be written once it is enabled, or runs.
#[test]
fn cve_2026_5747_queue_registers_are_immutable_once_enabled() {
    let mut enabled = Bench::new();
    enabled.negotiate();
    enabled.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    let mut running = Bench::running();

    for bench in [&mut enabled, &mut running] {
        bench.set_queue(0, 256, [0x8000, 0x9000, u64::MAX]);
        bench.write16(common::QUEUE_ENABLE, 0);
        bench.write16(common::QUEUE_SELECT, 0);

        assert_eq!(bench.read16(common::QUEUE_SIZE), 16);
        assert_eq!(bench.read16(common::QUEUE_ENABLE), 1);
        assert_eq!(bench.read32(common::QUEUE_DESC), 0x1000);
        assert_eq!(bench.read32(common::QUEUE_DRIVER), 0x2000);
        assert_eq!(bench.read32(common::QUEUE_DEVICE), 0x3000);
        assert_eq!(bench.read32(common::QUEUE_DEVICE + 4), 0);
    }
}

#[test]
fn no_queue_is_enabled_while_the_device_runs() {
    let mut bench = Bench::running();

    bench.set_queue(1, 16, [0x1000, 0x2000, 0x3000]);

    assert_eq!(bench.read16(common::QUEUE_ENABLE), 0);
}

#[test]
fn a_reset_ends_the_device_and_forgets_all() {
    let mut bench = Bench::running();
    bench.transport.notify(0);

    bench.write(common::DEVICE_STATUS, &[0]);

    assert_eq!(bench.status(), 0);
    assert_eq!(bench.seen.lock().unwrap().resets, 1);
    assert_eq!(bench.read16(common::QUEUE_ENABLE), 0);
    assert_eq!(bench.read16(common::QUEUE_SIZE), 256);
    assert_eq!(bench.read16(common::QUEUE_VECTOR), NO_VECTOR);
    assert!(bench.transport.kicks[0].read().is_err());
    bench.negotiate();
    bench.driver_ok();
    assert_eq!(bench.seen.lock().unwrap().activations, 2);
}

#[test]
fn a_device_that_fails_to_start_needs_a_reset() {
    let mut bench = Bench::with(true);
    bench.negotiate();
    bench.driver_ok();
    let failed = bench.status();
    bench.driver_ok();
    let again = bench.seen.lock().unwrap().activations;
    bench.write(common::DEVICE_STATUS, &[0]);

    assert_eq!(failed, 11 | status::NEEDS_RESET);
    assert_eq!(again, 1);
    assert_eq!((bench.status(), bench.seen.lock().unwrap().resets), (0, 1));
}

#[test]
fn accesses_of_other_widths_are_ignored() {
    let mut bench = Bench::new();
    bench.negotiate();
    let mut wide = [0xaa; 8];
    let mut odd = [0xaa; 3];

    bench.write(common::QUEUE_DESC, &[0xff; 8]);
    bench.write(common::QUEUE_DESC, &[0xff; 2]);
    bench.write(common::QUEUE_SIZE, &[8, 0, 0, 0]);
    bench.write(common::QUEUE_SIZE + 1, &[8, 0]);
    bench.write(common::DEVICE_STATUS, &[0, 0, 0, 0]);
    bench.write(common::DEVICE_STATUS, &[]);
    bench.transport.read_common(0, &mut wide);
    bench.transport.read_common(0x20, &mut odd);

    assert_eq!(bench.read32(common::QUEUE_DESC), 0);
    assert_eq!(bench.read16(common::QUEUE_SIZE), 256);
    assert_eq!(bench.status(), 11);
    assert_eq!((wide, odd), ([0; 8], [0; 3]));
}

/// What a hostile driver does.
#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Status(u8),
    Negotiate,
    /// A good driver comes: reset, features, one queue, done.
    Start,
    Queue(u16, u16, [u64; 3]),
    Notify(usize),
    Config(u64, Vec<u8>),
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0..0x200_u64).prop_map(|page| page * 0x1000),
        (-300..300_i64).prop_map(|near| LOW_END.wrapping_add_signed(near)),
        (-300..300_i64).prop_map(|near| HIGH_START.wrapping_add_signed(near)),
        (-300..300_i64).prop_map(|near| HIGH_END.wrapping_add_signed(near)),
        any::<u64>(),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..10);
    let status = prop::sample::select(vec![0_u8, 1, 3, 11, 15, 15, 15, 7, 0x80, 0x8b, 0x4f]);
    let sizes = prop::sample::select(vec![0_u16, 1, 2, 8, 16, 64, 256, 257, 1024, 0xffff]);
    prop_oneof![
        4 => (0..0x60_u64, bytes()).prop_map(|(offset, data)| Op::Write(offset, data)),
        2 => (prop::sample::select((0..0x40).step_by(2).collect::<Vec<u64>>()), any::<u32>())
            .prop_map(|(offset, value)| Op::Write(offset, value.to_le_bytes().to_vec())),
        2 => (prop::sample::select((0x10..0x20).step_by(2).collect::<Vec<u64>>()), 0..4_u16)
            .prop_map(|(offset, value)| Op::Write(offset, value.to_le_bytes().to_vec())),
        1 => (any::<u64>(), 0..10_usize).prop_map(|(offset, len)| Op::Read(offset, len)),
        4 => status.prop_map(Op::Status),
        3 => Just(Op::Negotiate),
        2 => Just(Op::Start),
        6 => (0..4_u16, sizes, [address(), address(), address()])
            .prop_map(|(index, size, at)| Op::Queue(index, size, at)),
        1 => any::<usize>().prop_map(Op::Notify),
        1 => (any::<u64>(), bytes()).prop_map(|(offset, data)| Op::Config(offset, data)),
    ]
}

fn apply(bench: &mut Bench, op: Op) {
    match op {
        Op::Write(offset, data) => bench.write(offset, &data),
        Op::Read(offset, len) => bench.transport.read_common(offset, &mut vec![0; len]),
        Op::Status(status) => bench.write(common::DEVICE_STATUS, &[status]),
        Op::Negotiate => bench.negotiate(),
        Op::Start => bench.start_anew(),
        Op::Queue(index, size, addresses) => bench.set_queue(index, size, addresses),
        Op::Notify(queue) => bench.transport.notify(queue),
        Op::Config(offset, data) => bench.transport.write_device(offset, &data),
    }
}

/// Registers of every queue, and whether it is enabled.
fn queues(transport: &Transport) -> Vec<(Registers, bool)> {
    match &transport.phase {
        Phase::Configuring(configuring) => configuring
            .queues
            .iter()
            .map(|setup| (*setup.registers(), setup.is_enabled()))
            .collect(),
        Phase::Frozen(frozen) => frozen.queues.clone(),
    }
}

/// Reads every byte of a queue's parts, as a device may.
fn touch(memory: &GuestRam, active: &ActiveQueue) -> Result<(), TestCaseError> {
    let size = usize::from(active.queue.size());
    let parts = [
        (active.queue.desc_table(), 16 * size),
        (active.queue.avail_ring(), 6 + 2 * size),
        (active.queue.used_ring(), 6 + 8 * size),
    ];
    for (start, len) in parts {
        let mut data = vec![0; len];
        prop_assert!(memory.read_slice(&mut data, GuestAddress(start)).is_ok());
        prop_assert!(memory.check_range(GuestAddress(start), len));
    }
    Ok(())
}

fn check(bench: &Bench, begun_anew: bool, old: &[(Registers, bool)]) -> Result<(), TestCaseError> {
    let transport = &bench.transport;
    let status = transport.status;
    let seen = bench.seen.lock().unwrap();
    let needs = |bit: u8, earlier: u8| status & bit == 0 || status & earlier == earlier;

    prop_assert!(needs(status::DRIVER, status::ACKNOWLEDGE));
    prop_assert!(needs(status::FEATURES_OK, status::DRIVER));
    prop_assert!(needs(status::DRIVER_OK, status::FEATURES_OK));
    prop_assert_eq!(status & 0x30, 0);
    prop_assert_eq!(status & status::DRIVER_OK != 0, seen.running.is_some());
    if let Some(running) = &seen.running {
        prop_assert_eq!(running.features & !(OFFERED | VERSION_1), 0);
        prop_assert_eq!(running.features & VERSION_1, VERSION_1);
        prop_assert_eq!(running.features, transport.driver_features());
        for active in &running.queues {
            let max = QUEUES[usize::from(active.index)];
            prop_assert!(active.queue.size().is_power_of_two());
            prop_assert!(active.queue.size() <= max);
            touch(&running.memory, active)?;
        }
    }
    // Nothing that was enabled has changed, unless the driver began anew.
    for (old, new) in old.iter().zip(queues(transport)) {
        prop_assert!(begun_anew || !old.1 || *old == new);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn cve_2026_5747_no_writes_reach_a_running_queue(
        ops in prop::collection::vec(op(), 1..48),
    ) {
        let mut bench = Bench::new();
        for op in ops {
            let old = queues(&bench.transport);
            let resets = matches!(op, Op::Start | Op::Status(0))
                || matches!(&op, Op::Write(common::DEVICE_STATUS, data) if data[..] == [0]);
            apply(&mut bench, op);
            check(&bench, resets, &old)?;
        }
        bench.transport.reset();
        prop_assert!(bench.seen.lock().unwrap().running.is_none());
    }

    #[test]
    fn a_reset_always_gets_a_device_that_works(
        ops in prop::collection::vec(op(), 0..8),
    ) {
        let mut bench = Bench::new();
        for op in ops {
            apply(&mut bench, op);
        }
        bench.start_anew();

        prop_assert_eq!(bench.status(), 15);
    }
}

impl Bench {
    /// Moves the device in queue 0 to a position.
    fn advance(&self, available: u16, used: u16) {
        let mut seen = self.seen.lock().unwrap();
        let queue = &mut seen.running.as_mut().unwrap().queues[0].queue;
        queue.set_next_avail(available);
        queue.set_next_used(used);
    }

    /// Where the device goes on, and with which state.
    fn resumed(&self) -> Option<(u16, u16, Option<Vec<u8>>)> {
        let seen = self.seen.lock().unwrap();
        let activation = seen.running.as_ref()?;
        let queue = &activation.queues[0].queue;
        Some((
            queue.next_avail(),
            queue.next_used(),
            activation.resumed.clone(),
        ))
    }
}

#[test]
fn a_device_that_stood_still_goes_on_where_it_was() {
    let mut bench = Bench::running();
    bench.advance(40_000, 39_999);

    bench.transport.suspend().unwrap();
    let standing = bench.resumed();
    bench.transport.resume();

    assert_eq!(standing, None);
    assert_eq!(bench.resumed(), Some((40_000, 39_999, Some(vec![42]))));
    assert_eq!(bench.status(), 15);
}

#[test]
fn another_device_goes_on_in_its_place() {
    let mut first = Bench::running();
    first.advance(7, 5);
    let state = first.transport.suspend().unwrap();
    let mut other = Bench::new();

    other.transport.restore(state.clone()).unwrap();

    assert_eq!(other.resumed(), Some((7, 5, Some(vec![42]))));
    assert_eq!(other.status(), 15);
    // The driver may have missed an interrupt, since its used event is not where the device is.
    assert_eq!(other.counters[1].0.load(Ordering::SeqCst), 1);
    let again = other.transport.suspend().unwrap();
    assert_eq!(again.queues, state.queues);
}

#[test]
fn a_device_put_aside_twice_is_the_same_both_times() {
    let mut bench = Bench::running();
    bench.advance(7, 7);

    let first = bench.transport.suspend().unwrap();
    let second = bench.transport.suspend().unwrap();

    assert_eq!(second.queues, first.queues);
    assert_eq!(second.device, first.device);
}

#[test]
fn a_device_that_stands_still_can_be_reset() {
    let mut bench = Bench::running();
    bench.transport.suspend().unwrap();

    bench.start_anew();
    bench.transport.resume();

    assert_eq!(bench.resumed(), Some((0, 0, None)));
}

#[test]
fn a_driver_that_was_setting_up_goes_on_with_that() {
    let mut first = Bench::new();
    first.negotiate();
    first.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    let state = first.transport.suspend().unwrap();
    let mut other = Bench::new();

    other.transport.restore(state).unwrap();
    other.driver_ok();

    assert_eq!(other.status(), 15);
    assert_eq!(other.resumed(), Some((0, 0, None)));
}

#[test]
fn states_that_no_device_comes_to_are_refused() {
    let good = Bench::running().transport.suspend().unwrap();
    let refused = |change: fn(&mut TransportState)| {
        let mut bench = Bench::new();
        let mut state = good.clone();
        change(&mut state);
        let error = bench.transport.restore(state).unwrap_err();
        assert!(bench.seen.lock().unwrap().running.is_none());
        error.to_string()
    };

    assert!(refused(|state| state.device_type = 1).contains("type 42, not 1"));
    assert!(refused(|state| state.queues.truncate(1)).contains("queues"));
    assert!(refused(|state| state.queues[0].registers.size = 3).contains("queue 0"));
    assert!(refused(|state| state.queues[0].registers.size = 1024).contains("queue 0"));
    assert!(refused(|state| state.queues[0].registers.driver = LOW_END).contains("in RAM"));
    assert!(refused(|state| state.queues[0].registers.device = u64::MAX).contains("aligned"));
    assert!(refused(|state| state.driver_features |= 1 << 40).contains("offered"));
    assert!(refused(|state| state.driver_features = 0).contains("features"));
    assert!(refused(|state| state.frozen = false).contains("status"));
    assert!(refused(|state| state.status = status::DRIVER_OK).contains("status"));
}
