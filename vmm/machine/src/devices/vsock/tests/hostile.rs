//! What a guest may send, and what must come of it.

use std::time::Instant;

use proptest::prelude::*;
use rustix::event::epoll::{self, CreateFlags};

use super::multiplexer::Multiplexer;
use super::*;

#[test]
fn the_guest_reaches_only_ports_that_are_open() {
    let mut guest = Guest::new();

    guest.send(from(GUEST_PORT, OPEN_PORT + 1, Op::Request), &[]);

    let refusal = guest.receive().header;
    assert_eq!(refusal.op, Op::Reset as u16);
    assert_eq!(
        (refusal.src_port, refusal.dst_port),
        (OPEN_PORT + 1, GUEST_PORT)
    );
    assert!(guest.accepted.try_recv().is_err());
    assert!(guest.works());
}

#[test]
fn malformed_packets_are_dropped_or_reset_and_harm_nothing() {
    let mut guest = Guest::new();
    let good = from(GUEST_PORT, OPEN_PORT, Op::Request);
    let resets = [
        Header {
            dst_cid: 77,
            ..good
        },
        Header { kind: 2, ..good },
        Header { op: 99, ..good },
        Header { op: 0, ..good },
        Header {
            op: Op::Data as u16,
            ..good
        },
        Header {
            op: Op::Response as u16,
            ..good
        },
        Header {
            op: Op::CreditRequest as u16,
            ..good
        },
        Header {
            op: Op::Shutdown as u16,
            flags: BOTH,
            ..good
        },
        Header { len: 10, ..good },
        Header {
            len: u32::MAX,
            ..good
        },
    ];

    // To be dropped: somebody else's packets, a stray reset, less than a header.
    guest.send(Header { src_cid: 4, ..good }, &[]);
    guest.send(from(GUEST_PORT, OPEN_PORT, Op::Reset), &[]);
    guest.send_raw(&good.to_bytes()[..HEADER_SIZE - 1]);
    let answers: Vec<_> = resets
        .iter()
        .map(|header| {
            guest.send(*header, &[]);
            guest.receive().header.op
        })
        .collect();

    assert_eq!(answers, [Op::Reset as u16; 10]);
    assert!(guest.accepted.try_recv().is_err());
    assert!(guest.works());
}

#[test]
fn packets_that_do_not_fit_a_connections_state_end_it() {
    for bad in [Op::Request, Op::Response] {
        let mut guest = Guest::new();
        let mut stream = guest.connect(GUEST_PORT);

        guest.send(from(GUEST_PORT, OPEN_PORT, bad), &[]);

        assert_eq!(guest.receive().header.op, Op::Reset as u16);
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        assert!(guest.works());
    }
    let mut guest = Guest::new();
    let (_stream, answer, request) = guest.request();
    guest.send(from(GUEST_PORT, request.src_port, Op::Shutdown), &[]);
    assert_eq!(
        answer.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectRefused::Reset)
    );
}

#[test]
fn data_after_the_guest_shut_its_half_ends_the_connection() {
    let mut guest = Guest::new();
    let _stream = guest.connect(GUEST_PORT);
    guest.send(shutdown(GUEST_PORT, SHUTDOWN_SEND), &[]);

    guest.send(data(GUEST_PORT, 1), b"x");

    assert_eq!(guest.receive_op(), (Op::Reset as u16, 0));
}

#[test]
fn cve_2019_18960_buffers_that_are_not_all_in_memory_are_not_touched() {
    let mut guest = Guest::without_buffers();
    let end = MEMORY as u64;
    let edges = [
        (end - 44, 45),
        (end - 1, 44),
        (end, 44),
        (end + 1, 44),
        (u64::MAX - 43, 44),
        (u64::MAX, 2),
        (0, u32::MAX),
        (0, 43),
    ];

    for edge in edges {
        guest.to_guest.offer(&[], &[edge]);
        guest.from_guest.offer(&[edge], &[]);
        guest.from_guest.kick();
        guest.from_guest.wait_used();
    }
    // Buffers of the wrong direction, too.
    guest.to_guest.offer(&[(TO_GUEST, 0x1000)], &[]);
    guest.from_guest.offer(&[], &[(FROM_GUEST, 0x1000)]);
    guest.from_guest.kick();
    guest.from_guest.wait_used();
    guest.post(BUFFERS);
    guest.send(from(GUEST_PORT, OPEN_PORT + 1, Op::Request), &[]);
    let refused: Vec<_> = (0..=edges.len())
        .map(|_| guest.to_guest.wait_used().1)
        .collect();

    assert_eq!(refused, [0; 9]);
    assert_eq!(guest.receive().header.op, Op::Reset as u16);
    assert!(guest.works());
}

#[test]
fn no_more_resets_wait_than_may() {
    let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
    let config = VsockConfig {
        cid: GUEST_CID,
        guest_ports: vec![],
    };
    let nobody: GuestConnections = Box::new(|_, _| {});
    let mut multiplexer = Multiplexer::new(&config, Arc::new(Mutex::new(nobody)), Arc::new(epoll));
    let stray = from(GUEST_PORT, OPEN_PORT, Op::Request);

    let mut taken = 0;
    while taken < 1000 && multiplexer.takes_packets() {
        multiplexer.on_packet(&stray, vec![], Instant::now());
        taken += 1;
    }

    assert_eq!(taken, 256);
}

#[test]
fn packets_that_waited_for_buffers_are_answered_when_there_are_some() {
    let mut guest = Guest::without_buffers();
    let stray = from(GUEST_PORT, OPEN_PORT + 1, Op::Request).to_bytes();

    // More strays than resets may wait: the rest stays in the ring until there are buffers.
    let mut taken = 0;
    for _ in 0..200 {
        guest.send_raw(&stray);
        taken += 1;
    }
    for _ in 0..100 {
        guest.offer_raw(&stray);
    }
    while taken < 256 {
        guest.from_guest.wait_used();
        taken += 1;
    }
    guest.post(BUFFERS);
    let answers = (0..300)
        .filter(|_| guest.receive().header.op == Op::Reset as u16)
        .count();

    assert_eq!(answers, 300);
    while taken < 300 {
        guest.from_guest.wait_used();
        taken += 1;
    }
    assert!(guest.works());
}

#[test]
fn connections_are_limited_and_their_places_used_again() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..1024).map(|port| guest.connect(port)).collect();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (tell, answer) = channel();

    guest.handle.connect(GUEST_PORT, theirs, teller(tell));
    guest.send(from(GUEST_PORT, OPEN_PORT, Op::Request), &[]);
    let refused = guest.receive().header.op;
    guest.send(from(17, OPEN_PORT, Op::Reset), &[]);
    streams[17] = guest.connect(17);
    guest.send(data(1000, 4), b"data");
    let mut bytes = [0; 4];
    streams[1000].read_exact(&mut bytes).unwrap();

    assert_eq!(
        answer.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectRefused::TooMany)
    );
    assert_eq!(refused, Op::Reset as u16);
    assert_eq!(&bytes, b"data");
}

#[test]
fn a_driver_that_comes_again_finds_no_connections() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);

    guest.device.reset();
    let end = stream.read(&mut [0; 1]).unwrap();
    guest.boot();
    guest.posted.clear();
    guest.post(BUFFERS);

    assert_eq!(end, 0);
    guest.send(data(GUEST_PORT, 1), b"x");
    assert_eq!(guest.receive().header.op, Op::Reset as u16);
    assert!(guest.works());
}

fn any_header() -> impl Strategy<Value = Header> {
    let port = prop_oneof![
        Just(OPEN_PORT),
        Just(GUEST_PORT),
        Just(GUEST_PORT + 1),
        any::<u32>()
    ];
    let cid = prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()];
    (
        (cid, port.clone(), port, 0_u32..300),
        (
            prop_oneof![8 => Just(1_u16), 1 => any::<u16>()],
            0_u16..9,
            0_u32..4,
            any::<u32>(),
            any::<u32>(),
        ),
    )
        .prop_map(
            |((dst_cid, src_port, dst_port, len), (kind, op, flags, buf_alloc, fwd_cnt))| Header {
                src_cid: GUEST_CID.into(),
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, ..ProptestConfig::default() })]

    /// Any packets at all leave the device at work.
    #[test]
    fn any_packets_leave_the_device_at_work(
        packets in prop::collection::vec((any_header(), 0_usize..300), 1..60)
    ) {
        let mut guest = Guest::new();
        for (header, length) in packets {
            guest.send(header, &vec![0; length]);
        }

        guest.device.reset();
        drop(guest.accepted.try_iter().collect::<Vec<_>>());
        guest.boot();
        guest.posted.clear();
        guest.post(BUFFERS);

        prop_assert!(guest.works());
    }
}
