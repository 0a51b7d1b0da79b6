//! Whole requests, as a driver makes them, good and bad.

use std::io::{Read, Seek, Write};

use super::*;
use crate::devices::driver::{Buffer, Driver, buffer_in, buffer_out};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x20_0000;
/// Not a status that the device gives.
const UNANSWERED: u8 = 0xaa;

/// A disk of eight sectors, each full of its number plus one.
fn file() -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 1..=8 {
        file.write_all(&[sector; 512]).unwrap();
    }
    file
}

fn content(file: &mut std::fs::File) -> Vec<u8> {
    file.rewind().unwrap();
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    content
}

/// Puts a header, and offers it with `data` and a status.
fn offer(driver: &Driver, kind: u32, sector: u64, data: &[Buffer]) {
    driver.write(HEADER, &kind.to_le_bytes());
    driver.write(HEADER + 8, &sector.to_le_bytes());
    let mut buffers = vec![buffer_out(HEADER, 16)];
    buffers.extend(data);
    buffers.push(buffer_in(STATUS, 1));
    offer_raw(driver, &buffers);
}

fn offer_raw(driver: &Driver, buffers: &[Buffer]) {
    driver.write(STATUS, &[UNANSWERED]);
    driver.offer(buffers);
}

/// Serves what was offered; the status byte, and the bytes used by the last request.
fn serve(driver: &Driver, file: &std::fs::File, read_only: bool) -> (u8, u32) {
    let mut requests = Requests {
        memory: driver.memory().clone(),
        requests: driver.active_queue(0),
        write_through: true,
        slot: Arc::new(Slot::with(
            Disk::new(file.try_clone().unwrap().into(), read_only).unwrap(),
        )),
        id: *b"identity of the disk",
    };
    let events = Events::new().unwrap();
    requests.ready(&events, 0, Readiness::IN).unwrap();
    (driver.read(STATUS, 1)[0], driver.used().last().unwrap().1)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

#[test]
fn sectors_are_read_into_many_buffers() {
    let driver = Driver::new();
    let data = [buffer_in(DATA, 500), buffer_in(DATA + 0x1000, 524)];
    offer(&driver, 0, 1, &data);

    let answer = serve(&driver, &file(), true);

    assert_eq!(answer, (0, 1025));
    assert_eq!(driver.read(DATA, 500), [2; 500]);
    assert_eq!(driver.read(DATA + 0x1000, 12), [2; 12]);
    assert_eq!(driver.read(DATA + 0x100c, 512), [3; 512]);
}

#[test]
fn sectors_are_written_and_no_others() {
    let driver = Driver::new();
    let mut file = file();
    driver.write(DATA, &[0xee; 1024]);
    offer(&driver, 1, 6, &[buffer_out(DATA, 1024)]);

    let answer = serve(&driver, &file, false);

    let content = content(&mut file);
    assert_eq!(answer, (0, 1));
    assert_eq!(content[5 * 512..6 * 512], [6; 512]);
    assert_eq!(content[6 * 512..], [0xee; 1024]);
}

#[test]
fn a_header_in_pieces_is_a_header() {
    let driver = Driver::new();
    driver.write(HEADER, &[0; 16]);
    offer_raw(
        &driver,
        &[
            buffer_out(HEADER, 3),
            buffer_out(HEADER + 3, 13),
            buffer_in(DATA, 512),
            buffer_in(STATUS, 1),
        ],
    );

    assert_eq!(serve(&driver, &file(), true), (0, 513));
    assert_eq!(driver.read(DATA, 512), [1; 512]);
}

#[test]
fn flush_and_identity_are_answered() {
    let driver = Driver::new();
    let file = file();
    offer(&driver, 4, 0, &[]);
    let flushed = serve(&driver, &file, false);
    let other = Driver::new();
    offer(&other, 8, 0, &[buffer_in(DATA, 20)]);
    let identified = serve(&other, &file, false);

    assert_eq!(flushed, (0, 1));
    assert_eq!(identified, (0, 21));
    assert_eq!(other.read(DATA, 20), b"identity of the disk");
}

/// threats.md CVE-2020-2025 and CVE-2020-28914: read-only means that nothing is ever written.
#[test]
fn cve_2020_2025_a_read_only_disk_refuses_every_change() {
    let mut file = file();
    let before = content(&mut file);

    let statuses = [1, 11, 13].map(|kind| {
        let driver = Driver::new();
        driver.write(DATA, &range(0, 1, 0));
        let len = if kind == 1 { 512 } else { 16 };
        offer(&driver, kind, 0, &[buffer_out(DATA, len)]);
        serve(&driver, &file, true).0
    });

    assert_eq!(statuses, [1, 1, 1]);
    assert_eq!(content(&mut file), before);
}

#[test]
fn sectors_outside_the_disk_are_refused() {
    let outside = [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512)];

    let statuses = outside.map(|(sector, len)| {
        let driver = Driver::new();
        offer(&driver, 0, sector, &[buffer_in(DATA, len)]);
        serve(&driver, &file(), true).0
    });

    assert_eq!(statuses, [1; 4]);
}

#[test]
fn lengths_that_are_no_sectors_or_too_much_are_refused() {
    let statuses = [1, 511, 513, (1 << 20) + 512].map(|len| {
        let driver = Driver::new();
        offer(&driver, 0, 0, &[buffer_in(DATA, len)]);
        serve(&driver, &file(), true).0
    });

    assert_eq!(statuses, [1; 4]);
}

#[test]
fn nothing_to_read_or_write_is_done_at_once() {
    let driver = Driver::new();
    offer(&driver, 0, 0, &[buffer_in(DATA, 0)]);

    assert_eq!(serve(&driver, &file(), true), (0, 1));
}

#[test]
fn a_type_that_is_not_known_is_unsupported() {
    let driver = Driver::new();
    offer(&driver, 0x1234, 0, &[]);

    assert_eq!(serve(&driver, &file(), false), (2, 1));
}

/// threats.md CVE-2023-3180: lengths are checked before anything is written.
#[test]
fn cve_2023_3180_a_request_without_a_status_or_header_is_given_back() {
    let driver = Driver::new();
    offer_raw(&driver, &[buffer_out(HEADER, 16), buffer_out(DATA, 512)]);
    let no_status = serve(&driver, &file(), false);
    let other = Driver::new();
    offer_raw(&other, &[buffer_out(HEADER, 15), buffer_in(STATUS, 1)]);
    let no_header = serve(&other, &file(), false);

    assert_eq!(no_status, (UNANSWERED, 0));
    assert_eq!(no_header, (1, 1));
}

#[test]
fn mixed_up_buffers_are_given_back() {
    let driver = Driver::new();
    let mixed = [
        buffer_out(HEADER, 16),
        buffer_in(STATUS, 1),
        buffer_out(DATA, 512),
    ];
    offer_raw(&driver, &mixed);
    let mixed = serve(&driver, &file(), false);

    assert_eq!(mixed, (UNANSWERED, 0));
}

/// threats.md DMA re-entrancy: only RAM is read and written.
#[test]
fn buffers_outside_ram_are_given_back() {
    let driver = Driver::new();
    let doorbell = crate::layout::PCI_MMIO32_START + 0x8000;
    offer(&driver, 0, 0, &[buffer_in(doorbell, 512)]);

    assert_eq!(serve(&driver, &file(), false), (UNANSWERED, 0));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let driver = Driver::new();
    let mut file = file();
    driver.write(DATA, &[range(0, 1, 0), range(2, 2, 1)].concat());
    offer(&driver, 13, 0, &[buffer_out(DATA, 32)]);
    let zeroed = serve(&driver, &file, false);
    let other = Driver::new();
    other.write(DATA, &range(7, 1, 0));
    offer(&other, 11, 0, &[buffer_out(DATA, 16)]);
    let discarded = serve(&other, &file, false);

    let content = content(&mut file);
    let zero = |sector: usize| content[sector * 512..][..512] == [0; 512];
    assert_eq!((zeroed, discarded), ((0, 1), (0, 1)));
    assert_eq!(content.len(), 8 * 512);
    assert_eq!(
        [0, 1, 2, 3, 4, 5, 6, 7].map(zero),
        [true, false, true, true, false, false, false, true]
    );
}

#[test]
fn bad_ranges_are_refused_before_anything_is_touched() {
    let mut file = file();
    let before = content(&mut file);
    let bad = [
        (11, [range(0, 1, 0), range(8, 1, 0)].concat(), 1),
        (11, range(u64::MAX, u32::MAX, 0), 1),
        (11, range(0, 1, 1), 2),
        (13, range(0, 1, 2), 2),
        (13, range(0, 1 << 16, 0), 1),
        (13, range(0, 1, 0)[..15].to_vec(), 1),
        (13, Vec::new(), 1),
        (13, range(0, 0, 0).repeat(17), 1),
    ];

    let answers = bad.clone().map(|(kind, ranges, _)| {
        let driver = Driver::new();
        driver.write(DATA, &ranges);
        let len = ranges.len().try_into().unwrap();
        offer(&driver, kind, 0, &[buffer_out(DATA, len)]);
        serve(&driver, &file, false).0
    });

    assert_eq!(answers, bad.map(|(_, _, status)| status));
    assert_eq!(content(&mut file), before);
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let block = Block::new(Some(file().into()), "disk", false).unwrap();
    let mut capacity = [0; 8];
    let mut segments = [0; 4];
    let mut past = [0; 16];

    block.read_config(0, &mut capacity);
    block.read_config(12, &mut segments);
    block.read_config(56, &mut past);
    block.read_config(u64::MAX, &mut []);

    assert_eq!(u64::from_le_bytes(capacity), 8);
    assert_eq!(u32::from_le_bytes(segments), 126);
    assert_eq!(past[4..], [0; 12]);
}

#[test]
fn a_running_disk_answers_and_stops_and_runs_again() {
    let driver = Driver::new();
    let mut block = Block::new(Some(file().into()), "disk", true).unwrap();
    offer(&driver, 0, 0, &[buffer_in(DATA, 512)]);

    block.activate(driver.activation(&block)).unwrap();
    driver.kick();
    driver.wait_for_interrupt();
    block.reset();
    let first = driver.used();
    let other = Driver::new();
    offer(&other, 0, 1, &[buffer_in(DATA, 512)]);
    block.activate(other.activation(&block)).unwrap();
    other.kick();
    other.wait_for_interrupt();
    block.reset();

    assert_eq!((first, other.used()), (vec![(0, 513)], vec![(0, 513)]));
    assert_eq!(other.read(DATA, 512), [2; 512]);
}

/// Serves what was offered with what is in a slot.
fn serve_slot(driver: &Driver, slot: &Arc<Slot>) -> u8 {
    let mut requests = Requests {
        memory: driver.memory().clone(),
        requests: driver.active_queue(0),
        write_through: true,
        slot: Arc::clone(slot),
        id: *b"identity of the slot",
    };
    let events = Events::new().unwrap();
    requests.ready(&events, 0, Readiness::IN).unwrap();
    driver.read(STATUS, 1)[0]
}

#[test]
fn a_slot_has_what_is_put_in() {
    let driver = Driver::new();
    let block = Block::new(None, "slot", false).unwrap();
    let handle = block.handle();
    let sectors = || {
        let mut sectors = [0xff; 8];
        block.read_config(0, &mut sectors);
        u64::from_le_bytes(sectors)
    };
    let read = || {
        offer(&driver, 0, 1, &[buffer_in(DATA, 512)]);
        serve_slot(&driver, &block.slot)
    };
    assert_eq!((sectors(), read()), (0, 1));

    handle.insert(file().into(), true).unwrap();

    assert_eq!((sectors(), read()), (8, 0));
    assert_eq!(driver.read(DATA, 512), [2; 512]);
    offer(&driver, 1, 1, &[buffer_out(DATA, 512)]);
    assert_eq!(serve_slot(&driver, &block.slot), 1, "it is read-only");
    let second = handle.insert(file().into(), false);
    assert_eq!(second, Err(DiskRefused::Occupied));
    handle.eject();
    handle.eject();
    assert_eq!((sectors(), read()), (0, 1));
    assert_eq!(block.config_changes(), 2);
    let (pipe, _) = std::io::pipe().unwrap();
    let refused = handle.insert(pipe.into(), false);
    assert!(
        matches!(refused, Err(DiskRefused::Disk { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_driver_hears_of_another_disk() {
    let driver = Driver::new();
    let slot = Slot::default();
    let interrupt = driver.active_queue(0).interrupt;

    slot.insert(Disk::new(file().into(), false).unwrap())
        .unwrap();
    slot.driver_up(interrupt);
    slot.eject();

    driver.wait_for_interrupt();
}
