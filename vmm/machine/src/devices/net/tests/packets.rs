//! Packets on their way, both ways.

use std::time::Duration;

use super::*;

#[test]
fn packets_of_the_guest_reach_the_tap_with_a_clean_header() {
    let (mut interface, host) = running(LINUX);
    let mut header = [0xff; HEADER];
    header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);

    interface.send(header, &[0x5a; 3000]);
    let (passed, frame) = host.receive();

    assert_eq!(passed[..10], header[..10]);
    assert_eq!(passed[10..], [0, 0]);
    assert_eq!(frame, [0x5a; 3000]);
    assert_eq!(host.told.lock().unwrap().offload.last(), Some(&0x67));
}

#[test]
fn packets_of_the_host_reach_the_guest() {
    let (mut interface, host) = running(LINUX);
    let head = interface.post(BUFFERS, 2048);

    host.send([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0], &[0x5a; 100]);
    let used = interface.queues[0].wait_used();

    assert_eq!(used, (head, 112));
    let packet = interface.read(BUFFERS, 113);
    assert_eq!(packet[..12], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 1, 0]);
    assert_eq!(packet[12..112], [0x5a; 100]);
    assert_eq!(packet[112], 0);
}

#[test]
fn flags_mean_nothing_to_a_driver_that_takes_no_checksums() {
    let (mut interface, host) = running(features::MRG_RXBUF);
    interface.post(BUFFERS, 2048);

    host.send([2, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0x5a; 100]);
    interface.queues[0].wait_used();

    assert_eq!(interface.read(BUFFERS, 1), [0]);
    assert_eq!(host.told.lock().unwrap().offload.last(), Some(&0));
}

#[test]
fn a_long_packet_is_spread_over_buffers() {
    let (mut interface, host) = running(LINUX);
    let heads: Vec<u16> = (0..4)
        .map(|number| interface.post(BUFFERS + 0x1000 * number, 1000))
        .collect();
    let frame: Vec<u8> = (0..2500_u32).map(|byte| (byte % 251) as u8).collect();

    host.send([0; 10], &frame);
    let used: Vec<_> = (0..3).map(|_| interface.queues[0].wait_used()).collect();

    assert_eq!(used, [(heads[0], 1000), (heads[1], 1000), (heads[2], 512)]);
    assert_eq!(interface.read(BUFFERS + 10, 2), [3, 0]);
    let mut received = interface.read(BUFFERS + 12, 988);
    received.extend(interface.read(BUFFERS + 0x1000, 1000));
    received.extend(interface.read(BUFFERS + 0x2000, 512));
    assert_eq!(received, frame);
}

#[test]
fn a_packet_longer_than_what_is_posted_waits_for_more() {
    let (mut interface, host) = running(LINUX);
    interface.post(BUFFERS, 1000);
    host.send([0; 10], &[7; 1500]);
    host.send([0; 10], &[8; 60]);
    std::thread::sleep(Duration::from_millis(20));

    let before = interface.queues[0].take_used();
    interface.post(BUFFERS + 0x1000, 1000);
    interface.post(BUFFERS + 0x2000, 1000);
    let used: Vec<_> = (0..3).map(|_| interface.queues[0].wait_used().1).collect();

    assert_eq!(before, None);
    assert_eq!(used, [1000, 512, 72]);
    assert_eq!(interface.read(BUFFERS + 12, 988), [7; 988]);
    assert_eq!(interface.read(BUFFERS + 0x1000, 512), [7; 512]);
    assert_eq!(interface.read(BUFFERS + 0x2000 + 12, 60), [8; 60]);
}

#[test]
fn a_packet_longer_than_the_one_buffer_it_may_have_is_dropped() {
    let (mut interface, host) = running(0);
    interface.post(BUFFERS, 1000);

    host.send([0; 10], &[7; 1500]);
    host.send([0; 10], &[8; 60]);
    let (_, length) = interface.queues[0].wait_used();

    assert_eq!(length, 72);
    assert_eq!(interface.counted(), [0, 0, 1, 0]);
}

/// threats.md CVE-2020-16843: with the ring empty and the tap full nothing came through ever again.
#[test]
fn cve_2020_16843_traffic_resumes_when_buffers_come() {
    let (mut interface, host) = running(LINUX);
    host.socket.set_nonblocking(true).unwrap();
    let packet = |number: u16| {
        let mut packet = [0; 100];
        packet[HEADER..HEADER + 2].copy_from_slice(&number.to_le_bytes());
        packet
    };
    let sent = (0..u16::MAX)
        .take_while(|number| host.socket.send(&packet(*number)).is_ok())
        .count();

    let mut received = Vec::new();
    for _ in 0..sent {
        interface.post(BUFFERS, 2048);
        interface.queues[0].wait_used();
        received.push(interface.read(BUFFERS + 12, 2));
    }
    host.socket.send(&packet(0xfefe)).unwrap();
    interface.post(BUFFERS, 2048);
    interface.queues[0].wait_used();

    let numbers = (0..u16::MAX).map(|number| number.to_le_bytes().to_vec());
    assert_eq!(received, numbers.take(sent).collect::<Vec<_>>());
    assert_eq!(interface.read(BUFFERS + 12, 2), [0xfe; 2]);
}

#[test]
fn a_tap_that_is_full_keeps_the_guest_waiting() {
    let (mut interface, host) = running(LINUX);
    interface.write(BUFFERS, &[0; HEADER]);
    for _ in 0..100 {
        interface.queues[1].offer(&[(BUFFERS, 12 + 1000)], &[]);
    }
    interface.queues[1].kick();

    let lengths: Vec<_> = (0..100).map(|_| host.receive().1.len()).collect();
    for _ in 0..100 {
        interface.queues[1].wait_used();
    }

    assert_eq!(lengths, [1000; 100]);
    assert_eq!(interface.counted(), [0; 4]);
}
