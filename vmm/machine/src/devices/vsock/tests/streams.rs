//! Connections as programs have them.

use std::io::ErrorKind;
use std::net::Shutdown;

use super::*;

#[test]
fn a_connection_of_the_host_carries_data_both_ways() {
    let mut guest = Guest::new();
    let (mut stream, answer, request) = guest.request();

    guest.send(from(GUEST_PORT, request.src_port, Op::Response), &[]);
    assert_eq!(answer.recv_timeout(PATIENCE).unwrap(), Ok(()));
    stream.write_all(b"to the guest").unwrap();
    let packet = guest.receive();
    let reply = Header {
        len: 5,
        ..from(GUEST_PORT, request.src_port, Op::Data)
    };
    guest.send(reply, b"reply");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();

    assert_eq!(packet.data, b"to the guest");
    assert_eq!(&bytes, b"reply");
    assert_eq!(
        (
            packet.header.src_cid,
            packet.header.dst_cid,
            packet.header.dst_port
        ),
        (HOST_CID, GUEST_CID.into(), GUEST_PORT)
    );
}

#[test]
fn nothing_is_sent_before_the_guest_accepts() {
    let mut guest = Guest::new();
    let (mut stream, _answer, request) = guest.request();
    stream.write_all(b"early").unwrap();

    guest.send(from(GUEST_PORT, request.src_port, Op::Response), &[]);

    assert_eq!(guest.receive().data, b"early");
}

#[test]
fn a_request_that_the_guest_resets_is_refused() {
    let mut guest = Guest::new();
    let (mut stream, answer, request) = guest.request();

    guest.send(from(GUEST_PORT, request.src_port, Op::Reset), &[]);

    assert_eq!(
        answer.recv_timeout(PATIENCE).unwrap(),
        Err(ConnectRefused::Reset)
    );
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(guest.works());
}

#[test]
fn without_a_driver_a_request_is_refused_at_once() {
    let mut guest = Guest::new();
    let (_stream, pending, _request) = guest.request();
    guest.device.reset();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (tell, answer) = channel();

    guest.handle.connect(GUEST_PORT, theirs, teller(tell));

    assert_eq!(answer.try_recv().unwrap(), Err(ConnectRefused::NoDriver));
    assert_eq!(pending.try_recv().unwrap(), Err(ConnectRefused::NoDriver));
}

#[test]
fn the_host_shuts_one_half_and_reads_on() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);
    stream.write_all(b"last").unwrap();

    stream.shutdown(Shutdown::Write).unwrap();
    let last = guest.receive();
    let told = guest.receive_op();
    guest.send(data(GUEST_PORT, 5), b"still");
    guest.send(shutdown(GUEST_PORT, SHUTDOWN_SEND), &[]);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();

    assert_eq!(last.data, b"last");
    assert_eq!(told, (Op::Shutdown as u16, SHUTDOWN_SEND));
    assert_eq!(rest, "still");
    // Both directions have ended now: the host takes leave.
    assert_eq!(guest.receive_op(), (Op::Shutdown as u16, BOTH));
}

#[test]
fn the_guest_shuts_one_half_and_reads_on() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);
    guest.send(data(GUEST_PORT, 4), b"last");

    guest.send(shutdown(GUEST_PORT, SHUTDOWN_SEND), &[]);
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    stream.write_all(b"still").unwrap();

    assert_eq!(all, "last");
    assert_eq!(guest.receive().data, b"still");
}

#[test]
fn a_guest_that_stops_receiving_is_felt_by_the_writer() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);

    guest.send(shutdown(GUEST_PORT, SHUTDOWN_RECEIVE), &[]);
    guest.send(data(GUEST_PORT, 5), b"still");
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes).unwrap();

    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    assert_eq!(&bytes, b"still");
    drop(stream);
    assert_eq!(guest.receive_op(), (Op::Shutdown as u16, BOTH));
}

#[test]
fn a_guest_that_shuts_both_halves_gets_a_reset_and_its_data_arrives() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);
    let sent = vec![7; 200 * 1024];
    for part in sent.chunks(0xf000) {
        guest.send(data(GUEST_PORT, part.len()), part);
    }

    guest.send(shutdown(GUEST_PORT, BOTH), &[]);
    let told = guest.receive_op();
    let again = guest.connect(GUEST_PORT);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();

    assert_eq!(told, (Op::Reset as u16, 0));
    assert!(received == sent, "data is lost or changed");
    drop(again);
}

#[test]
fn a_host_that_goes_tells_the_guest_after_the_last_data() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);
    let sent = vec![9; 150 * 1024];
    stream.write_all(&sent).unwrap();

    drop(stream);
    let (mut received, mut shut) = (Vec::new(), 0);
    while shut & SHUTDOWN_SEND == 0 {
        let packet = guest.receive();
        received.extend(packet.data);
        shut |= packet.header.flags;
    }
    guest.send(data(GUEST_PORT, 4), b"late");
    guest.send(from(GUEST_PORT, OPEN_PORT, Op::Reset), &[]);

    assert_eq!(shut, BOTH);
    assert!(received == sent, "data is lost or changed");
    assert!(guest.works());
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_a_guest_that_goes_on_is_cut_off() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);
    let part = vec![5; 0x8000];
    let (mut sent, mut forwarded) = (0, 0);
    let window = 256 * 1024;

    // The socket takes some, the device's buffer takes the rest, and then there is no credit.
    let ask = from(GUEST_PORT, OPEN_PORT, Op::CreditRequest);
    while sent + part.len() <= forwarded + window {
        guest.send(data(GUEST_PORT, part.len()), &part);
        sent += part.len();
        guest.send(ask, &[]);
        forwarded = guest.receive().header.fwd_cnt as usize;
    }
    let stuck = sent;
    let mut some = vec![0; 0x4_0000];
    stream.read_exact(&mut some).unwrap();
    let update = guest.receive().header;
    let room = update.fwd_cnt as usize + window - sent;
    guest.send(data(GUEST_PORT, room + 1), &vec![5; room + 1]);

    assert!(
        stuck < 2 << 20,
        "more than socket and buffer can hold was taken"
    );
    assert!(update.fwd_cnt as usize > forwarded);
    assert_eq!(guest.receive_op(), (Op::Reset as u16, 0));
    assert!(guest.works());
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let request = Header {
        buf_alloc: 1000,
        ..from(GUEST_PORT, OPEN_PORT, Op::Request)
    };
    guest.send(request, &[]);
    let (_, mut stream) = guest.accepted.recv_timeout(PATIENCE).unwrap();
    assert_eq!(guest.receive().header.op, Op::Response as u16);

    stream.write_all(&[1; 2500]).unwrap();
    let first = guest.receive().data.len();
    let update = |fwd_cnt| Header {
        buf_alloc: 1000,
        fwd_cnt,
        ..from(GUEST_PORT, OPEN_PORT, Op::CreditUpdate)
    };
    guest.send(update(400), &[]);
    let second = guest.receive().data.len();
    guest.send(update(1400), &[]);
    let third = guest.receive().data.len();
    guest.send(update(2400), &[]);
    let fourth = guest.receive().data.len();

    assert_eq!([first, second, third, fourth], [1000, 400, 1000, 100]);
}

#[test]
fn a_connection_that_never_stops_does_not_starve_another() {
    let mut guest = Guest::new();
    let big = Header {
        buf_alloc: u32::MAX,
        ..from(GUEST_PORT, OPEN_PORT, Op::Request)
    };
    guest.send(big, &[]);
    let (_, mut flood) = guest.accepted.recv_timeout(PATIENCE).unwrap();
    let mut quiet = guest.connect(GUEST_PORT + 1);
    let flooding = std::thread::spawn(move || while flood.write_all(&[0; 0x1_0000]).is_ok() {});
    (0..100).for_each(|_| drop(guest.receive()));

    quiet.write_all(b"here").unwrap();
    let before_quiet = (0..10_000)
        .position(|_| guest.receive().header.dst_port == GUEST_PORT + 1)
        .unwrap();

    // What lay in the guest's buffers already, and a turn or two.
    assert!(before_quiet <= 200, "{before_quiet} packets went first");
    guest.device.reset();
    flooding.join().unwrap();
}

#[test]
fn much_data_goes_both_ways_at_once_unchanged() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(GUEST_PORT);
    let pattern: Vec<u8> = (0..8_u32 << 20)
        .map(|number| (number % 251).to_le_bytes()[0])
        .collect();
    let mut reader = stream.try_clone().unwrap();
    let (to_send, to_expect) = (pattern.clone(), pattern.clone());
    let writing = std::thread::spawn(move || stream.write_all(&to_send).unwrap());
    let reading = std::thread::spawn(move || {
        let mut received = vec![0; to_expect.len()];
        reader.read_exact(&mut received).unwrap();
        received == to_expect
    });

    // The guest keeps to its credit, and passes on what it gets at once.
    let (mut sent, mut received, mut credit) = (0, Vec::new(), 256 * 1024);
    while received.len() < pattern.len() || sent < pattern.len() {
        while sent < pattern.len() && sent + 0x4000 <= credit {
            let part = &pattern[sent..sent + 0x4000];
            let header = Header {
                fwd_cnt: u32::try_from(received.len()).unwrap(),
                ..data(GUEST_PORT, part.len())
            };
            guest.send(header, part);
            sent += part.len();
        }
        if received.len() == pattern.len() && sent == pattern.len() {
            break;
        }
        let packet = guest.receive();
        received.extend(packet.data);
        credit = packet.header.fwd_cnt as usize + 256 * 1024;
        let update = Header {
            fwd_cnt: u32::try_from(received.len()).unwrap(),
            ..from(GUEST_PORT, OPEN_PORT, Op::CreditUpdate)
        };
        guest.send(update, &[]);
    }

    assert!(
        received == pattern,
        "what the guest got is not what was sent"
    );
    assert!(
        reading.join().unwrap(),
        "what the host got is not what was sent"
    );
    writing.join().unwrap();
}

#[test]
fn the_configuration_is_the_context_id() {
    let (device, _handle) = Vsock::new(
        VsockConfig {
            cid: 0x0102_0304,
            guest_ports: vec![],
        },
        Box::new(|_, _| {}),
    )
    .unwrap();
    let mut space = [0xff; 10];

    device.read_config(0, &mut space);

    assert_eq!(space, [4, 3, 2, 1, 0, 0, 0, 0, 0xff, 0xff]);
}
