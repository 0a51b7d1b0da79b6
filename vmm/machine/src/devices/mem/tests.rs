use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::request::{Plugged, RESPONSE_SIZE};
use super::*;
use crate::devices::driver::{Driver, buffer_in, buffer_out};
use crate::memory::{CHUNK, with_managed};

const MIB: u64 = 1 << 20;
/// Four chunks.
const REGION_MIB: u64 = 512;
const START: u64 = 0x1_0000_0000;
/// Where the driver has its request, and its answer.
const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x20_0000;
#[expect(clippy::cast_possible_truncation, reason = "a block is 2 MiB")]
const LENGTH: usize = BLOCK as usize;

/// A hypervisor that takes so many pieces.
#[derive(Debug)]
struct Room(Arc<AtomicUsize>);

impl Slots for Room {
    fn add(&mut self, _start: GuestAddress, size: u64, _host: usize) -> io::Result<()> {
        assert_eq!(size, CHUNK);
        let take = |left: usize| left.checked_sub(1);
        let taken = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        taken
            .map(drop)
            .map_err(|_| io::ErrorKind::OutOfMemory.into())
    }
}

/// A machine with a device, which may add all of its memory.
struct Guest {
    memory: GuestRam,
    device: Mem,
    handle: MemHandle,
    room: Arc<AtomicUsize>,
}

impl Guest {
    fn new() -> Self {
        let ram = crate::memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let (memory, region) = with_managed(&ram, REGION_MIB).unwrap();
        let room = Arc::new(AtomicUsize::new(usize::MAX));
        let device = Mem::new(region, Box::new(Room(Arc::clone(&room))));
        let handle = device.handle();
        handle.resize(REGION_MIB).unwrap();
        Self {
            memory,
            device,
            handle,
            room,
        }
    }

    fn ask(&self, request: Request) -> Answer {
        lock(&self.device.shared).answer(request)
    }

    fn plug(&self, block: u64, blocks: u16) -> Answer {
        self.ask(Request::Plug(run(block, blocks)))
    }

    fn unplug(&self, block: u64, blocks: u16) -> Answer {
        self.ask(Request::Unplug(run(block, blocks)))
    }

    fn state(&self, block: u64, blocks: u16) -> Answer {
        self.ask(Request::State(run(block, blocks)))
    }

    fn plugged(&self) -> u64 {
        self.handle.added().plugged_mib
    }

    fn write(&self, block: u64, value: u64) {
        self.memory.write_obj(value, place(block)).unwrap();
    }

    fn read(&self, block: u64) -> u64 {
        self.memory.read_obj(place(block)).unwrap()
    }

    fn config(&self, offset: u64) -> u64 {
        let mut value = [0; 8];
        self.device.read_config(offset, &mut value);
        u64::from_le_bytes(value)
    }
}

fn place(block: u64) -> GuestAddress {
    GuestAddress(START + block * BLOCK)
}

fn run(block: u64, blocks: u16) -> Run {
    Run {
        address: place(block).0,
        blocks,
    }
}

#[test]
fn the_driver_is_told_of_the_region() {
    let guest = Guest::new();

    guest.handle.resize(6).unwrap();
    guest.plug(0, 2);

    let fields = [0, 8, 16, 24, 32, 40, 48].map(|offset| guest.config(offset));
    let size = REGION_MIB * MIB;
    assert_eq!(fields, [BLOCK, 0, START, size, size, 4 * MIB, 6 * MIB]);
    assert_eq!(guest.config(56), 0);
    assert_eq!(guest.config(u64::MAX), 0);
}

#[test]
fn what_is_plugged_is_memory_of_its_own_and_empty() {
    let guest = Guest::new();

    assert_eq!(guest.plug(1, 3), Answer::Ack);

    for block in 1..4 {
        assert_eq!(guest.read(block), 0);
        guest.write(block, block);
    }
    assert_eq!([1, 2, 3].map(|block| guest.read(block)), [1, 2, 3]);
    assert_eq!(guest.plugged(), 6);
}

#[test]
fn nothing_of_a_chunk_is_there_before_something_in_it_is_plugged() {
    let guest = Guest::new();
    let (chunk, length) = (CHUNK_BLOCKS as u64, CHUNK_BLOCKS * LENGTH);

    guest.plug(chunk, 1);

    for address in [START, START + CHUNK - 8, START + 2 * CHUNK] {
        let address = GuestAddress(address);
        assert!(guest.memory.write_obj(1_u64, address).is_err());
        assert!(guest.memory.read_obj::<u64>(address).is_err());
        assert!(guest.memory.load::<u16>(address, Ordering::SeqCst).is_err());
        assert!(guest.memory.get_slice(address, 8).is_err());
        assert!(guest.memory.get_host_address(address).is_err());
        assert!(!guest.memory.check_range(address, 8));
    }
    let edge = GuestAddress(START + CHUNK - 4);
    assert!(guest.memory.get_slice(edge, 8).is_err());
    assert!(guest.memory.get_slice(place(chunk), length).is_ok());
    assert!(guest.memory.get_slice(place(chunk), length + 1).is_err());
}

#[test]
fn blocks_that_are_not_plugged_are_all_the_same_one() {
    let guest = Guest::new();
    guest.plug(0, 4);
    for block in 0..4 {
        guest.write(block, 7);
    }

    assert_eq!(guest.unplug(1, 2), Answer::Ack);

    assert_eq!([0, 3].map(|block| guest.read(block)), [7, 7]);
    assert_eq!([1, 2, 63].map(|block| guest.read(block)), [0, 0, 0]);
    guest.write(63, 9);
    assert_eq!([1, 2, 40].map(|block| guest.read(block)), [9, 9, 9]);
    // And one that is plugged again has nothing of what it was.
    guest.plug(1, 1);
    assert_eq!(guest.read(1), 0);
    assert_eq!(guest.plugged(), 6);
}

#[test]
fn more_than_was_asked_for_is_not_plugged() {
    let guest = Guest::new();
    guest.handle.resize(8).unwrap();

    assert_eq!(guest.plug(0, 5), Answer::Nack);
    assert_eq!(guest.plug(0, 3), Answer::Ack);
    assert_eq!(guest.plug(3, 2), Answer::Nack);
    assert_eq!(guest.plug(3, 1), Answer::Ack);
    assert_eq!(guest.plug(4, 1), Answer::Nack);

    // Nor does what is too much make room.
    guest.handle.resize(2).unwrap();
    assert_eq!(guest.unplug(0, 2), Answer::Ack);
    assert_eq!(guest.plug(0, 1), Answer::Nack);
    assert_eq!(guest.unplug(2, 2), Answer::Ack);
    assert_eq!(guest.plug(0, 1), Answer::Ack);
}

#[test]
fn runs_that_are_none_are_errors() {
    let guest = Guest::new();
    let blocks = REGION_MIB / 2;
    guest.plug(8, 1);

    for run in [
        run(0, 0),
        run(blocks, 1),
        run(blocks - 1, 2),
        run(0, u16::MAX),
        Run {
            address: START - BLOCK,
            blocks: 1,
        },
        Run {
            address: START + 4096,
            blocks: 1,
        },
        Run {
            address: 0,
            blocks: 1,
        },
        Run {
            address: u64::MAX - BLOCK + 1,
            blocks: u16::MAX,
        },
    ] {
        for request in [
            Request::Plug(run),
            Request::Unplug(run),
            Request::State(run),
        ] {
            assert_eq!(guest.ask(request), Answer::Error, "{request:?}");
        }
    }
    assert_eq!(guest.plug(7, 2), Answer::Error);
    assert_eq!(guest.unplug(7, 2), Answer::Error);
    assert_eq!(guest.plugged(), 2);
}

#[test]
fn what_may_be_used_follows_what_is_asked_for() {
    let ram = crate::memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let (_, region) = with_managed(&ram, 8 << 10).unwrap();
    let mut blocks = Blocks::new(region.start.raw_value(), region.size);
    assert_eq!(blocks.usable(), 0);
    assert_eq!(blocks.pluggable(run(0, 1)), Err(Answer::Error));

    let usable = [512, 3 << 10, 512, 0, 8 << 10].map(|mib| {
        blocks.request(mib * MIB);
        blocks.usable() / MIB
    });

    assert_eq!(usable, [2 << 10, 4 << 10, 4 << 10, 4 << 10, 8 << 10]);
}

#[test]
fn a_state_is_told() {
    let guest = Guest::new();
    guest.plug(2, 2);

    let states = [(2, 2), (0, 2), (1, 2), (3, 1), (4, 1)].map(|(block, n)| guest.state(block, n));

    let expected = [
        Plugged::All,
        Plugged::None,
        Plugged::Some,
        Plugged::All,
        Plugged::None,
    ];
    assert_eq!(states, expected.map(Answer::State));
}

#[test]
fn all_is_unplugged_at_once() {
    let guest = Guest::new();
    guest.plug(0, 1);
    guest.plug(62, 100);

    assert_eq!(guest.ask(Request::UnplugAll), Answer::Ack);

    assert_eq!(guest.plugged(), 0);
    assert_eq!(guest.state(0, 256), Answer::State(Plugged::None));
    assert_eq!(guest.ask(Request::UnplugAll), Answer::Ack);
}

#[test]
fn sizes_that_can_not_be_are_refused() {
    let guest = Guest::new();
    let region_mib = REGION_MIB;

    for mib in [region_mib + 2, u64::MAX] {
        let refused = guest.handle.resize(mib);
        assert_eq!(refused, Err(MemoryRefused::TooMuch { region_mib }));
    }
    assert_eq!(guest.handle.resize(3), Err(MemoryRefused::Blocks));
    assert_eq!(guest.handle.added().requested_mib, REGION_MIB);
}

#[test]
fn where_the_host_has_no_room_nothing_changes() {
    let guest = Guest::new();
    guest.room.store(1, Ordering::SeqCst);

    // The second chunk finds none.
    assert_eq!(guest.plug(60, 8), Answer::Nack);

    assert_eq!(guest.plugged(), 0);
    assert_eq!(guest.state(0, 256), Answer::State(Plugged::None));
    assert!(guest.memory.get_slice(place(64), 1).is_err());
    guest.room.store(1, Ordering::SeqCst);
    assert_eq!(guest.plug(60, 8), Answer::Ack);
    guest.write(64, 5);
    guest.write(68, 6);
    assert_eq!([64, 65, 69].map(|block| guest.read(block)), [5, 0, 6]);
}

/// A driver, and a device whose region is not in its memory.
fn driven() -> (Driver, Guest) {
    (Driver::new(), Guest::new())
}

fn message(kind: u16, run: Run) -> Vec<u8> {
    let mut bytes = u64::from(kind).to_le_bytes().to_vec();
    bytes.extend(run.address.to_le_bytes());
    bytes.extend(u64::from(run.blocks).to_le_bytes());
    bytes
}

fn serve(driver: &Driver, guest: &Guest) {
    let activation = driver.activation(&guest.device);
    let mut requests = guest.device.requests(activation).unwrap();
    let events = Events::new().unwrap();
    requests.start(&events).unwrap();
    requests.ready(&events, 0, Readiness::IN).unwrap();
}

#[test]
fn a_request_comes_through_the_queue_in_any_pieces() {
    let (driver, guest) = driven();
    driver.write(REQUEST, &message(0, run(3, 2)));

    driver.offer(&[
        buffer_out(REQUEST, 3),
        buffer_out(REQUEST + 3, 21),
        buffer_in(RESPONSE, 9),
        buffer_in(RESPONSE + 9, 100),
    ]);
    serve(&driver, &guest);

    assert_eq!(driver.used(), [(0, 10)]);
    assert_eq!(driver.read(RESPONSE, RESPONSE_SIZE), [0; RESPONSE_SIZE]);
    assert_eq!(guest.state(3, 2), Answer::State(Plugged::All));
}

#[test]
fn what_is_no_request_is_answered_so() {
    for (bytes, length) in [
        (vec![], 7),
        (message(4, run(0, 1)), 24),
        (message(0, run(0, 1)), 23),
    ] {
        let (driver, guest) = driven();
        driver.write(REQUEST, &bytes);

        driver.offer(&[buffer_out(REQUEST, length), buffer_in(RESPONSE, 10)]);
        serve(&driver, &guest);

        assert_eq!(driver.used(), [(0, 10)]);
        assert_eq!(driver.read(RESPONSE, 2), [3, 0]);
        assert_eq!(guest.plugged(), 0);
    }
}

#[test]
fn a_request_without_room_for_its_answer_does_nothing() {
    let (driver, guest) = driven();
    driver.write(REQUEST, &message(0, run(0, 1)));

    driver.offer(&[buffer_out(REQUEST, 24), buffer_in(RESPONSE, 9)]);
    serve(&driver, &guest);

    assert_eq!(driver.used(), [(0, 0)]);
    assert_eq!(guest.plugged(), 0);
}

#[test]
fn a_driver_hears_of_another_size_and_what_is_plugged_outlives_its_reset() {
    let (driver, mut guest) = driven();
    let activation = driver.activation(&guest.device);
    guest.device.activate(activation).unwrap();
    driver.write(REQUEST, &message(0, run(0, 4)));
    driver.offer(&[buffer_out(REQUEST, 24), buffer_in(RESPONSE, 10)]);
    driver.kick();
    driver.wait_for_interrupt();
    assert_eq!(guest.plugged(), 8);

    let before = guest.device.config_changes();
    guest.handle.resize(2).unwrap();
    driver.wait_for_interrupt();
    assert_ne!(guest.device.config_changes(), before);
    guest.device.reset();
    // Nobody is there to hear.
    guest.handle.resize(4).unwrap();

    assert_eq!(guest.plugged(), 8);
    assert_eq!(guest.config(40), 8 * MIB);
    let activation = driver.activation(&guest.device);
    guest.device.activate(activation).unwrap();
    assert_eq!(guest.unplug(0, 1), Answer::Ack);
    guest.device.reset();
    assert_eq!(guest.plugged(), 6);
}

#[test]
fn a_driver_that_goes_on_hears_of_what_was_asked_for_meanwhile() {
    let (driver, mut guest) = driven();
    let activation = driver.activation(&guest.device);
    guest.device.activate(activation).unwrap();
    let suspended = guest.device.suspend().unwrap();
    let before = guest.device.config_changes();
    let resumed = || Activation {
        resumed: Some(suspended.state.clone()),
        ..driver.activation(&guest.device)
    };

    let (same, other) = (resumed(), resumed());
    guest.device.activate(same).unwrap();
    assert_eq!(guest.device.config_changes(), before);
    guest.device.suspend().unwrap();
    guest.handle.resize(4).unwrap();
    guest.device.activate(other).unwrap();

    driver.wait_for_interrupt();
    guest.device.reset();
}

#[test]
fn a_state_that_is_none_is_refused() {
    let (driver, mut guest) = driven();
    let activation = Activation {
        resumed: Some(vec![0; 7]),
        ..driver.activation(&guest.device)
    };

    assert!(guest.device.activate(activation).is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Resize(u64),
    Plug(u64, u16),
    Unplug(u64, u16),
    UnplugAll,
    Fails(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let run = || (0..260_u64, 0..140_u16);
    prop_oneof![
        3 => (0..258_u64).prop_map(|blocks| Step::Resize(2 * blocks)),
        6 => run().prop_map(|(block, blocks)| Step::Plug(block, blocks)),
        6 => run().prop_map(|(block, blocks)| Step::Unplug(block, blocks)),
        1 => Just(Step::UnplugAll),
        1 => (0..3_usize).prop_map(Step::Fails),
    ]
}

proptest! {
    // Each maps memory for good.
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever a driver asks for: it has what the device says, no more than was asked for, and one block more.
    #[test]
    fn no_requests_give_more_than_was_asked_for(steps in prop::collection::vec(step(), 1..24)) {
        let guest = Guest::new();
        guest.handle.resize(0).unwrap();
        for step in steps {
            let before = guest.plugged();
            match step {
                Step::Resize(mib) => drop(guest.handle.resize(mib)),
                Step::Plug(block, blocks) => {
                    let answer = guest.plug(block, blocks);
                    let grown = guest.plugged() - before;
                    let expected = if answer == Answer::Ack { 2 * u64::from(blocks) } else { 0 };
                    prop_assert_eq!(grown, expected);
                    prop_assert!(grown == 0 || guest.plugged() <= guest.handle.added().requested_mib);
                }
                Step::Unplug(block, blocks) => {
                    let answer = guest.unplug(block, blocks);
                    let expected = if answer == Answer::Ack { 2 * u64::from(blocks) } else { 0 };
                    prop_assert_eq!(before - guest.plugged(), expected);
                }
                Step::UnplugAll => prop_assert_eq!(guest.ask(Request::UnplugAll), Answer::Ack),
                Step::Fails(room) => guest.room.store(room, Ordering::SeqCst),
            }
            let reached: Vec<u64> = (0..REGION_MIB / 2)
                .filter(|block| guest.memory.write_obj(*block, place(*block)).is_ok())
                .collect();
            let own = reached.iter().filter(|block| guest.read(**block) == **block).count() as u64;
            let plugged = guest.plugged() / 2;
            // The last one that was written is what is in the scrap.
            let scrap = u64::from(reached.len() as u64 > plugged);
            prop_assert_eq!(own, plugged + scrap);
        }
    }
}
