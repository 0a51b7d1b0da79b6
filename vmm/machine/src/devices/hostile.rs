//! Devices on the queues of a hostile driver: random descriptors, rings and indices.
//!
//! Whatever is in guest memory, a device answers or gives up, and does so soon.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::balloon::{Balloon, Reports};
use super::block::Block;
use super::console::Console;
use super::driver::{AVAILABLE, DESCRIPTORS, Driver, buffer_in};
use super::mem::{Mem, Slots};
use super::rng::Rng;
use super::worker::{Events, Handler, Readiness};
use crate::memory::with_managed;
use crate::virtio::device::VirtioDevice;

const MEMORY_END: u64 = 0x40_0000;

/// A hypervisor without memory.
#[derive(Debug)]
struct NoRoom;

impl Slots for NoRoom {
    fn add(&mut self, _: GuestAddress, _: u64, _: usize) -> io::Result<()> {
        Err(io::ErrorKind::OutOfMemory.into())
    }
}

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        6 => 0x10_0000..MEMORY_END,
        2 => 0..0x4000_u64,
        2 => MEMORY_END - 64..MEMORY_END + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        6 => 0..64_u32,
        3 => prop::sample::select(vec![16_u32, 512, 1024, 4096, 0x1_0000]),
        1 => any::<u32>(),
    ];
    let flags = prop::sample::select(vec![0_u16, 1, 1, 1, 2, 3, 3, 4, 5, 7, 0xffff]);
    (address, len, flags, 0..66_u16)
}

/// Descriptors, the available ring, and by how much its index is raised.
type Rings = (Vec<Descriptor>, Vec<u16>, u16);

fn rings() -> impl Strategy<Value = Rings> {
    let raised = prop_oneof![8 => 0..8_u16, 1 => any::<u16>()];
    (
        prop::collection::vec(descriptor(), 1..64),
        prop::collection::vec(0..66_u16, 64),
        raised,
    )
}

fn write(driver: &Driver, (descriptors, available, raised): &Rings, index: &mut u16) {
    let mut table = Vec::new();
    for (address, len, flags, next) in descriptors {
        table.extend(address.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    driver.write(DESCRIPTORS.into(), &table);
    let heads: Vec<u8> = available
        .iter()
        .flat_map(|head| head.to_le_bytes())
        .collect();
    *index = index.wrapping_add(*raised);
    driver.write(u64::from(AVAILABLE) + 4, &heads);
    driver.write(u64::from(AVAILABLE) + 2, &index.to_le_bytes());
}

/// A driver with something in memory that looks like the headers of block requests.
fn driver() -> Driver {
    let driver = Driver::new();
    for number in 0..0x200_u32 {
        let (kind, sector) = (number % 14, number % 9);
        let header = [kind.to_le_bytes(), [0; 4], sector.to_le_bytes(), [0; 4]];
        driver.write(0x10_0000 + 16 * u64::from(number), header.as_flattened());
    }
    driver
}

/// Lets a device look at one state of the rings after the other, until it gives up.
fn run(driver: &Driver, device: impl Handler, rounds: &[Rings]) {
    run_queue(driver, device, 0, rounds);
}

/// The same with the queue whose events have this token.
fn run_queue(driver: &Driver, mut device: impl Handler, token: u64, rounds: &[Rings]) {
    let events = Events::new().unwrap();
    device.start(&events).unwrap();
    let mut index = 0;
    for round in rounds {
        write(driver, round, &mut index);
        // An error ends the device's thread.
        if device.ready(&events, token, Readiness::IN).is_err() {
            return;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn rng_survives_any_rings(rounds in prop::collection::vec(rings(), 1..8)) {
        let driver = driver();
        let activation = driver.activation(&Rng::new());

        run(&driver, super::rng::Requests::new(activation).unwrap(), &rounds);
    }

    #[test]
    fn console_survives_any_rings(rounds in prop::collection::vec(rings(), 1..8)) {
        let driver = driver();
        let output = File::options().write(true).open("/dev/null").unwrap();
        let console = Console::new(output.into()).unwrap();
        let activation = driver.activation(&console);

        run(&driver, console.transmit(activation).unwrap(), &rounds);
    }

    #[test]
    fn balloon_survives_any_rings(rounds in prop::collection::vec(rings(), 1..8)) {
        let driver = driver();
        let mut activation = driver.activation(&Balloon::new());
        // The one that takes memory away: rings are in it, too.
        activation.queues.drain(..2);

        run_queue(&driver, Reports::new(activation), 2, &rounds);
    }

    #[test]
    fn mem_survives_any_rings(rounds in prop::collection::vec(rings(), 1..8)) {
        let driver = driver();
        let (_, region) = with_managed(driver.memory(), 128).unwrap();
        let mem = Mem::new(region, Box::new(NoRoom));
        mem.handle().resize(128).unwrap();
        let activation = driver.activation(&mem);

        run(&driver, mem.requests(activation).unwrap(), &rounds);
    }

    #[test]
    fn block_survives_any_rings_and_keeps_its_size(
        rounds in prop::collection::vec(rings(), 1..8),
        read_only in any::<bool>(),
    ) {
        let driver = driver();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * 512).unwrap();
        let block = Block::new(Some(file.try_clone().unwrap().into()), "disk", read_only).unwrap();
        let activation = driver.activation(&block);

        run(&driver, block.requests(activation).unwrap(), &rounds);

        prop_assert_eq!(file.metadata().unwrap().len(), 8 * 512);
    }
}

/// threats.md CVE-2026-45782: a reset waits for what is under way, and nothing comes after it.
#[test]
fn cve_2026_45782_a_driver_that_never_stops_does_not_keep_a_device_from_its_reset() {
    let driver = Driver::new();
    let mut device = Rng::new();
    driver.offer(&[buffer_in(0x10_0000, 16)]);
    device.activate(driver.activation(&device)).unwrap();
    driver.kick();
    driver.wait_for_interrupt();
    let stop = AtomicBool::new(false);

    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                driver.offer_again();
            }
        });
        device.reset();
        stop.store(true, Ordering::SeqCst);
    });
    let answered = driver.used_count();
    driver.kick();

    assert_eq!(driver.used_count(), answered);
}
