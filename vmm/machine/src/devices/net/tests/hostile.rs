//! A driver that breaks every rule: what it sends is dropped and counted, never more.

use proptest::prelude::*;

use super::*;
use crate::devices::worker::{Events, Handler, Readiness};
use crate::layout::PCI_MMIO32_START;

const MEMORY_END: u64 = 0x40_0000;

/// Sends a chain of the guest's, then a good packet, and expects that alone to come.
fn is_dropped(readable: &[(u64, u32)], writable: &[(u64, u32)]) {
    let (mut interface, host) = running(LINUX);
    interface.write(BUFFERS, &[0; HEADER]);

    interface.queues[1].offer(readable, writable);
    interface.queues[1].kick();
    interface.queues[1].wait_used();
    interface.send([0; HEADER], &[9; 60]);

    assert_eq!(host.receive().1, [9; 60]);
    host.receive_none();
    assert_eq!(interface.counted(), [1, 0, 0, 0]);
}

#[test]
fn chains_that_are_no_packet_are_dropped() {
    is_dropped(&[(BUFFERS, 0)], &[]);
    is_dropped(&[(BUFFERS, 11)], &[]);
    is_dropped(&[(BUFFERS, 12)], &[]);
    is_dropped(&[(BUFFERS, 12 + 13)], &[]);
    is_dropped(&[(BUFFERS, 12 + 65_554)], &[]);
    is_dropped(&[(BUFFERS, 0x10_0000); 3], &[]);
}

#[test]
fn mixed_chains_are_dropped() {
    is_dropped(&[(BUFFERS, 72)], &[(BUFFERS, 60)]);
    is_dropped(&[], &[(BUFFERS, 72)]);
}

/// threats.md, DMA re-entrancy: nothing but RAM is sent.
#[test]
fn chains_outside_ram_are_dropped() {
    is_dropped(&[(BUFFERS, 12), (MEMORY_END - 30, 60)], &[]);
    is_dropped(&[(BUFFERS, 12), (MEMORY_END, 60)], &[]);
    is_dropped(&[(PCI_MMIO32_START, 72)], &[]);
    is_dropped(&[(BUFFERS, 12), (u64::MAX - 3, 60)], &[]);
    is_dropped(&[(BUFFERS, u32::MAX)], &[]);
}

/// threats.md, DPDK CVE-2024-11614, through the device.
#[test]
fn cve_2024_11614_malformed_headers_are_dropped() {
    let (mut interface, host) = running(LINUX);
    let headers: [[u8; HEADER]; 6] = [
        // a checksum outside
        [1, 0, 0, 0, 0, 0, 34, 0, 25, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        // segments of nothing, without a checksum, of unknown kinds, longer headers than all
        [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        [0, 1, 54, 0, 1, 0, 34, 0, 16, 0, 0, 0],
        [1, 0x7f, 54, 0, 1, 0, 34, 0, 16, 0, 0, 0],
        [1, 4, 61, 0, 1, 0, 34, 0, 16, 0, 0, 0],
    ];

    for header in headers {
        interface.send(header, &[1; 60]);
    }
    interface.send([0; HEADER], &[9; 60]);

    assert_eq!(host.receive().1, [9; 60]);
    host.receive_none();
    assert_eq!(interface.counted(), [6, 0, 0, 0]);
}

/// threats.md CVE-2021-3748: buffers for merging in odd regions are given back, and those after them used.
#[test]
fn cve_2021_3748_useless_buffers_are_given_back() {
    let (mut interface, host) = running(LINUX);
    let useless: [&[(u64, u32)]; 6] = [
        &[(BUFFERS, 11)],
        &[(BUFFERS, 0)],
        &[(PCI_MMIO32_START, 2048)],
        &[(MEMORY_END - 12, 13)],
        &[(u64::MAX, 2048)],
        &[(BUFFERS, 1000), (MEMORY_END, 1000)],
    ];

    for writable in useless {
        interface.queues[0].offer(&[], writable);
    }
    interface.queues[0].offer(&[(BUFFERS, 12)], &[(BUFFERS, 2048)]);
    let head = interface.post(BUFFERS + 0x1000, 2048);
    host.send([0; 10], &[5; 60]);
    let used: Vec<_> = (0..8).map(|_| interface.queues[0].wait_used()).collect();

    assert!(used[..7].iter().all(|(_, length)| *length == 0));
    assert_eq!(used[7], (head, 72));
    assert_eq!(interface.read(BUFFERS + 0x1000 + 12, 60), [5; 60]);
    assert_eq!(interface.counted(), [0, 0, 0, 7]);
}

/// The same, where the odd one comes in the middle of a packet: it does not split it.
#[test]
fn cve_2021_3748_a_useless_buffer_in_the_middle_is_given_back_before() {
    let (mut interface, host) = running(LINUX);
    let first = interface.queues[0].offer(&[], &[(BUFFERS, 1000)]);
    let useless = interface.queues[0].offer(&[], &[(PCI_MMIO32_START, 1000)]);
    let second = interface.post(BUFFERS + 0x1000, 1000);

    host.send([0; 10], &[5; 1500]);
    let used: Vec<_> = (0..3).map(|_| interface.queues[0].wait_used()).collect();

    assert_eq!(used, [(useless, 0), (first, 1000), (second, 512)]);
    assert_eq!(interface.read(BUFFERS + 12, 988), [5; 988]);
    assert_eq!(interface.read(BUFFERS + 0x1000, 512), [5; 512]);
    assert_eq!(interface.counted(), [0, 0, 0, 1]);
}

#[test]
fn a_packet_that_no_ring_of_buffers_holds_is_dropped() {
    let (mut interface, host) = running(LINUX);
    for _ in 0..256 {
        interface.queues[0].offer(&[], &[(BUFFERS, 12)]);
    }
    interface.queues[0].kick();

    host.send([0; 10], &[5; 60_000]);
    host.send([0; 10], &[6; 60]);
    let used: Vec<_> = (0..6).map(|_| interface.queues[0].wait_used().1).collect();

    assert_eq!(used, [12; 6]);
    assert_eq!(interface.counted(), [0, 0, 1, 0]);
}

#[test]
fn what_a_tap_should_not_give_is_dropped() {
    let (mut interface, host) = running(LINUX);
    interface.post(BUFFERS, 2048);

    host.socket.send(&[0; 5]).unwrap();
    host.send([0; 10], &[1; 13]);
    host.send([0; 10], &[1; header::LONGEST_FRAME + 1]);
    // Segments of a kind that is not negotiated.
    host.send([1, 3, 54, 0, 0xa8, 5, 34, 0, 16, 0], &[1; 100]);
    host.send([0; 10], &[2; 60]);
    let (_, length) = interface.queues[0].wait_used();

    assert_eq!(length, 72);
    assert_eq!(interface.counted(), [0, 0, 4, 0]);
}

#[test]
fn buffers_of_many_tiny_pieces_are_filled() {
    let (mut interface, host) = running(LINUX);
    for number in 0..4 {
        let pieces: Vec<_> = (0..64)
            .map(|at| (BUFFERS + 0x100 * number + 3 * at, 3))
            .collect();
        interface.queues[0].offer(&[], &pieces);
    }
    interface.queues[0].kick();

    host.send([0; 10], &[5; 500]);
    let used: Vec<_> = (0..3).map(|_| interface.queues[0].wait_used().1).collect();

    assert_eq!(used, [192, 192, 128]);
}

/// A head outside of the table ends the device until it is reset, and nothing else.
#[test]
fn a_head_outside_the_table_stops_the_queue_alone() {
    let (mut interface, host) = running(LINUX);
    interface.queues[1].make_available(9999);
    interface.queues[1].kick();
    std::thread::sleep(Duration::from_millis(20));

    interface.net.reset();

    host.receive_none();
}

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        6 => BUFFERS..MEMORY_END,
        1 => 0..0x4000_u64,
        2 => MEMORY_END - 64..MEMORY_END + 64,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => 0..64_u32,
        4 => prop::sample::select(vec![12_u32, 72, 1526, 4096, 0x1_0000]),
        1 => any::<u32>(),
    ];
    let flags = prop::sample::select(vec![0_u16, 1, 1, 2, 2, 3, 3, 4, 5, 0xffff]);
    (address, length, flags, 0..66_u16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_rings_are_survived(
        rounds in prop::collection::vec(
            (
                prop::collection::vec(descriptor(), 1..64),
                prop::collection::vec(0..66_u16, 256),
                prop_oneof![8 => 0..8_u16, 1 => any::<u16>()],
                prop::sample::select(vec![60_usize, 1500, 60_000]),
            ),
            1..6,
        ),
        taken in any::<u64>(),
    ) {
        let (backend, host) = tap(true);
        let interface = Interface::new(&config(1, NetLimits::default()), Some(vec![backend]));
        host.socket.set_nonblocking(true).unwrap();
        let activation = interface.activation(interface.net.features() & taken | features::CTRL_VQ);
        let mut pair = interface.net.queue_pairs(activation).unwrap().pop().unwrap();
        let events = Events::new().unwrap();
        pair.start(&events).unwrap();
        let mut index = 0_u16;

        'rounds: for (descriptors, available, raised, length) in rounds {
            index = index.wrapping_add(raised);
            let mut table = Vec::new();
            for (address, length, flags, next) in &descriptors {
                table.extend(address.to_le_bytes());
                table.extend(length.to_le_bytes());
                table.extend(flags.to_le_bytes());
                table.extend(next.to_le_bytes());
            }
            let heads: Vec<u8> = available.iter().flat_map(|head| head.to_le_bytes()).collect();
            for (base, size) in [(0x1000, 256), (0x5000, 256), (0x9000, 64)] {
                let ring = base + 16 * size as u64;
                interface.write(base, &table);
                interface.write(ring + 4, &heads[..2 * size]);
                interface.write(ring + 2, &index.to_le_bytes());
            }
            // The buffer of the socket may be full.
            let _ = host.socket.send(&vec![0; length]);
            for token in [0, 1, 5, 2] {
                // An error ends the device's thread.
                if pair.ready(&events, token, Readiness::IN).is_err() {
                    break 'rounds;
                }
            }
            let mut packet = vec![0; 70_000];
            while let Ok(length @ 1..) = host.socket.recv(&mut packet) {
                prop_assert!((HEADER + 14..=HEADER + header::LONGEST_FRAME).contains(&length));
            }
        }
    }
}
