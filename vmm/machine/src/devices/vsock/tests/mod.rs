//! A driver that makes packets by hand, and what it gets for them.

mod hostile;
mod streams;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_SIZE, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::devices::driver_queue::{DriverQueue, Interrupts};
use crate::memory::GuestRam;

const GUEST_CID: u32 = 3;
const HOST_CID: u64 = packet::HOST_CID;
/// A port that the guest may connect to.
const OPEN_PORT: u32 = 1000;
/// The guest's port in most tests.
const GUEST_PORT: u32 = 5000;
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Buffers of the guest: so many, of this size, for each direction.
const BUFFERS: u64 = 64;
const BUFFER_SIZE: u64 = 0x1_1000;
const TO_GUEST: u64 = 0x10_0000;
const FROM_GUEST: u64 = TO_GUEST + BUFFERS * BUFFER_SIZE;
const MEMORY: usize = 0xa0_0000;

/// A driver.
struct Guest {
    memory: GuestRam,
    to_guest: DriverQueue,
    from_guest: DriverQueue,
    /// Which buffer each chain of `to_guest` has.
    posted: HashMap<u16, u64>,
    next_buffer: u64,
    device: Vsock,
    handle: VsockHandle,
    accepted: Receiver<(u32, UnixStream)>,
}

/// A packet as the guest gets it.
#[derive(Debug, PartialEq)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

impl Guest {
    /// With buffers posted.
    fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.post(BUFFERS);
        guest
    }

    fn without_buffers() -> Self {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (tell, accepted) = channel();
        let config = VsockConfig {
            cid: GUEST_CID,
            guest_ports: vec![OPEN_PORT],
        };
        let (device, handle) = Vsock::new(
            config,
            Box::new(move |port, stream| tell.send((port, stream)).unwrap()),
        )
        .unwrap();
        let mut guest = Self {
            to_guest: DriverQueue::new(&memory, 0, 256),
            from_guest: DriverQueue::new(&memory, 0x1_0000, 256),
            memory,
            posted: HashMap::new(),
            next_buffer: 0,
            device,
            handle,
            accepted,
        };
        guest.boot();
        guest
    }

    fn boot(&mut self) {
        self.memory
            .write_slice(&[0; 0x2_0000], GuestAddress(0))
            .unwrap();
        self.to_guest = DriverQueue::new(&self.memory, 0, 256);
        self.from_guest = DriverQueue::new(&self.memory, 0x1_0000, 256);
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.device.features(),
            queues: vec![
                self.to_guest.activate(0),
                self.from_guest.activate(1),
                DriverQueue::new(&self.memory, 0x2_0000, 16).activate(2),
            ],
            config_interrupt: Interrupts::new(),
            resumed: None,
        };
        self.device.activate(activation).unwrap();
    }

    /// Posts buffers for packets to the guest, half of them in two pieces.
    fn post(&mut self, count: u64) {
        for _ in 0..count {
            let address = TO_GUEST + self.next_buffer % BUFFERS * BUFFER_SIZE;
            let size = u32::try_from(BUFFER_SIZE).unwrap();
            let pieces = match self.next_buffer % 2 {
                0 => vec![(address, size)],
                _ => vec![(address, 44), (address + 44, size - 44)],
            };
            self.next_buffer += 1;
            let head = self.to_guest.offer(&[], &pieces);
            self.posted.insert(head, address);
        }
        self.to_guest.kick();
    }

    /// Takes the next packet, and posts its buffer again.
    fn receive(&mut self) -> Packet {
        let (head, length) = self.to_guest.wait_used();
        let address = self.posted.remove(&head).unwrap();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let data = bytes.split_off(HEADER_SIZE);
        let header = Header::from_bytes(bytes.as_slice().try_into().unwrap());
        assert_eq!(header.len as usize, data.len());
        self.post(1);
        Packet { header, data }
    }

    /// The next packet that is not about credit alone.
    fn receive_op(&mut self) -> (u16, u32) {
        loop {
            let packet = self.receive();
            if packet.header.op != Op::CreditUpdate as u16 {
                return (packet.header.op, packet.header.flags);
            }
        }
    }

    /// Sends a packet, and waits until the device has taken it.
    fn send(&mut self, header: Header, data: &[u8]) {
        self.send_raw(&[header.to_bytes().as_slice(), data].concat());
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        self.offer_raw(bytes);
        self.from_guest.wait_used();
    }

    fn offer_raw(&mut self, bytes: &[u8]) {
        let (head, data) = bytes.split_at(bytes.len().min(HEADER_SIZE));
        let places = [FROM_GUEST, FROM_GUEST + 0x1000];
        self.memory
            .write_slice(head, GuestAddress(places[0]))
            .unwrap();
        self.memory
            .write_slice(data, GuestAddress(places[1]))
            .unwrap();
        let pieces = [head, data]
            .iter()
            .zip(places)
            .filter(|(piece, _)| !piece.is_empty())
            .map(|(piece, place)| (place, u32::try_from(piece.len()).unwrap()))
            .collect::<Vec<_>>();
        self.from_guest.offer(&pieces, &[]);
        self.from_guest.kick();
    }

    /// The guest connects from a port of its own.
    fn connect(&mut self, guest_port: u32) -> UnixStream {
        self.send(from(guest_port, OPEN_PORT, Op::Request), &[]);
        let (port, stream) = self.accepted.recv_timeout(PATIENCE).unwrap();
        assert_eq!(port, OPEN_PORT);
        assert_eq!(self.receive().header.op, Op::Response as u16);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The host asks for a connection; the guest has the request, and has not answered.
    fn request(&mut self) -> (UnixStream, Receiver<Result<(), ConnectRefused>>, Header) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tell, answer) = channel();
        self.handle.connect(GUEST_PORT, theirs, teller(tell));
        let request = self.receive().header;
        assert_eq!(request.op, Op::Request as u16);
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        (ours, answer, request)
    }

    /// Whether a connection can be made and carries data both ways.
    fn works(&mut self) -> bool {
        let port = 60_000 + u32::try_from(self.next_buffer).unwrap();
        let mut stream = self.connect(port);
        self.send(data(port, 4), b"ping");
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(b"pong").unwrap();
        let answer = self.receive();
        self.send(from(port, OPEN_PORT, Op::Reset), &[]);
        &bytes == b"ping" && answer.data == b"pong"
    }
}

fn teller(tell: Sender<Result<(), ConnectRefused>>) -> Connected {
    Box::new(move |result| tell.send(result).unwrap())
}

/// A packet of the guest, with a buffer of 256 KiB.
fn from(guest_port: u32, host_port: u32, op: Op) -> Header {
    Header {
        src_cid: GUEST_CID.into(),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: packet::TYPE_STREAM,
        op: op as u16,
        buf_alloc: 256 * 1024,
        ..Header::default()
    }
}

fn data(guest_port: u32, length: usize) -> Header {
    Header {
        len: u32::try_from(length).unwrap(),
        ..from(guest_port, OPEN_PORT, Op::Data)
    }
}

fn shutdown(guest_port: u32, flags: u32) -> Header {
    Header {
        flags,
        ..from(guest_port, OPEN_PORT, Op::Shutdown)
    }
}
