//! Drivers that break the rules: nothing of it reaches the tap, and good packets go on.

use super::*;
use crate::layout::PCI_MMIO32_START;

/// Sends a good packet, which must be the first that arrives.
fn assert_nothing_was_sent(guest: &mut Guest, host: &Host) {
    guest.send(&plain(77));
    assert_eq!(host.receive(), plain(77));
}

#[test]
fn malformed_headers_are_dropped() {
    let (mut guest, host) = Guest::new();
    let bad = [
        // Of no known kind.
        [0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // Segments of nothing.
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // A checksum past the end.
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        // Headers longer than the packet.
        [0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0],
    ];

    for header in bad {
        guest.send(&[header.to_vec(), frame(100)].concat());
    }

    assert_nothing_was_sent(&mut guest, &host);
}

#[test]
fn packets_too_short_or_too_long_are_dropped() {
    let (mut guest, host) = Guest::new();

    for length in [0, 1, 11, 12, 25] {
        guest.send_chain(&[(SENT, length)]);
    }
    guest.send_chain(&[(SENT, 65_563)]);
    guest.send_chain(&[(SENT, 0x40_0000)]);

    assert_nothing_was_sent(&mut guest, &host);
}

/// threats.md CVE-2021-3748, for sending: buffers in MMIO, in a hole, and across the end of RAM.
#[test]
fn cve_2021_3748_packets_outside_ram_are_dropped() {
    let (mut guest, host) = Guest::new();
    let end = MEMORY as u64;

    for address in [PCI_MMIO32_START, end, end - 50, u64::MAX - 50] {
        guest.send_chain(&[(SENT, 12), (address, 100)]);
    }

    assert_nothing_was_sent(&mut guest, &host);
}

#[test]
fn packets_with_room_to_write_are_dropped() {
    let (mut guest, host) = Guest::new();

    let head = guest.from_guest.offer(&[(SENT, 100)], &[(BUFFERS, 100)]);
    guest.from_guest.kick();

    assert_eq!(guest.from_guest.wait_used(), (head, 0));
    assert_nothing_was_sent(&mut guest, &host);
}

/// CVE-2021-3748: buffers that no packet may be written to come back empty, and the packet goes to the next.
#[test]
fn cve_2021_3748_buffers_outside_ram_or_too_small_come_back_empty() {
    let (mut guest, host) = Guest::new();
    let end = MEMORY as u64;
    let bad = [
        guest.to_guest.offer(&[], &[(PCI_MMIO32_START, 1526)]),
        guest.to_guest.offer(&[], &[(end - 50, 1526)]),
        guest.to_guest.offer(&[], &[(BUFFERS, 11)]),
        guest.to_guest.offer(&[], &[(BUFFERS, 0)]),
        guest.to_guest.offer(&[(BUFFERS, 1526)], &[]),
    ];
    guest.post(1, 1526);

    host.send(&plain(60));

    let returned = bad.map(|_| guest.to_guest.wait_used());
    assert_eq!(returned, bad.map(|head| (head, 0)));
    assert_eq!(guest.filled(), got(60, 1));
}

#[test]
fn bad_buffers_between_good_ones_do_not_split_a_packet() {
    let (mut guest, host) = Guest::new();
    guest.post(1, 40);
    let bad = guest.to_guest.offer(&[], &[(PCI_MMIO32_START, 1526)]);
    guest.post(1, 40);

    host.send(&plain(60));

    assert_eq!(guest.to_guest.wait_used(), (bad, 0));
    assert_eq!([guest.filled(), guest.filled()].concat(), got(60, 2));
}

/// CVE-2020-16843: a flood with no buffers froze the interface for good.
#[test]
fn cve_2020_16843_a_flood_without_buffers_goes_on_when_there_are_some() {
    let (mut guest, host) = Guest::new();
    host.socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while host.socket.send(&plain(100 + sent)).is_ok() {
        sent += 1;
    }
    assert!(sent > 4);

    for number in 0..sent {
        guest.post(1, 1526);
        assert_eq!(guest.filled(), got(100 + number, 1));
    }
    host.socket.set_nonblocking(false).unwrap();
    guest.post(1, 1526);
    host.send(&plain(60));

    assert_eq!(guest.filled(), got(60, 1));
}

/// The same with some buffers, too few for the packet: the driver must be asked for the next one.
#[test]
fn cve_2020_16843_too_few_buffers_wait_for_more() {
    let (mut guest, host) = Guest::new();
    guest.post(2, 100);
    host.send(&plain(300));
    // The other queue's turn, so that the packet has had its own.
    guest.send(&plain(60));
    host.receive();

    guest.post(1, 100);
    guest.post(1, 100);

    let parts: Vec<_> = (0..4).map(|_| guest.filled()).collect();
    assert_eq!(parts.concat(), got(300, 4));
}

#[test]
fn a_packet_that_no_ring_of_buffers_holds_is_dropped() {
    let (mut guest, host) = Guest::new();
    guest.post(256, 12);

    host.send(&plain(60_000));
    host.send(&plain(60));

    let parts: Vec<_> = (0..6).map(|_| guest.filled()).collect();
    assert_eq!(parts.concat(), got(60, 6));
}

#[test]
fn what_a_tap_should_not_give_is_dropped() {
    let (mut guest, host) = Guest::new();
    guest.post(64, 1526);

    host.send(&[0; 5]);
    host.send(&plain(13));
    host.send(&plain(65_551));
    host.send(&plain(60));

    assert_eq!(guest.filled(), got(60, 1));
}
