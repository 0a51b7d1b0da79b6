//! A driver that makes packets by hand, with a socket in the place of a tap.

mod hostile;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::header::Header;
use super::tap::Backend;
use super::*;
use crate::control::PlugRefused;
use crate::devices::driver_queue::{DriverQueue, Interrupts};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 1500;
/// Longer than any packet takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory: queues, then a megabyte of packets of the guest's, then its buffers. A hole ends it.
const SENT: u64 = 0x10_0000;
const BUFFERS: u64 = 0x20_0000;
const MEMORY: usize = 0x80_0000;
/// A buffer's room in memory, more than the longest packet takes.
const STRIDE: u64 = 0x1_1000;

/// The end that the device has of a socket pair, which keeps packets apart as a tap does.
#[derive(Debug)]
struct Wire {
    socket: OwnedFd,
    configured: Arc<Mutex<Vec<u64>>>,
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Backend for Wire {
    fn configure(&self, features: u64) -> io::Result<()> {
        self.configured.lock().unwrap().push(features);
        Ok(())
    }
}

/// The host's end of a wire.
struct Host {
    socket: UnixDatagram,
    configured: Arc<Mutex<Vec<u64>>>,
}

impl Host {
    fn new() -> (Self, Wire) {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::io::ioctl_fionbio(&theirs, true).unwrap();
        let socket = UnixDatagram::from(ours);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let configured = Arc::new(Mutex::new(Vec::new()));
        let wire = Wire {
            socket: theirs,
            configured: Arc::clone(&configured),
        };
        (Self { socket, configured }, wire)
    }

    fn send(&self, packet: &[u8]) {
        assert_eq!(self.socket.send(packet).unwrap(), packet.len());
    }

    fn receive(&self) -> Vec<u8> {
        let mut packet = vec![0; 0x2_0000];
        let length = self.socket.recv(&mut packet).unwrap();
        packet.truncate(length);
        packet
    }
}

/// A driver and its device.
struct Guest {
    memory: GuestMemoryMmap,
    to_guest: DriverQueue,
    from_guest: DriverQueue,
    /// Where the buffer of each posted chain is.
    posted: HashMap<u16, u64>,
    buffers: u64,
    config: Arc<Interrupts>,
    device: Net,
}

impl Guest {
    /// With a wire, and all that the device offers.
    fn new() -> (Self, Host) {
        Self::with(Self::unplugged().device.features())
    }

    /// With a wire, and these features.
    fn with(features: u64) -> (Self, Host) {
        let mut guest = Self::unplugged();
        let (host, wire) = Host::new();
        guest.device.link.plug(Arc::new(wire)).unwrap();
        guest.boot(features);
        (guest, host)
    }

    /// Without a wire, and not booted.
    fn unplugged() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        Self {
            to_guest: DriverQueue::new(&memory, 0, 256),
            from_guest: DriverQueue::new(&memory, 0x1_0000, 256),
            memory,
            posted: HashMap::new(),
            buffers: 0,
            config: Interrupts::new(),
            device: Net::with_link(MAC, MTU, Link::new().unwrap()).unwrap(),
        }
    }

    fn boot(&mut self, features: u64) {
        let event_idx = features & RING_FEATURES != 0;
        let queues = [self.to_guest.activate(0), self.from_guest.activate(1)];
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues: queues
                .into_iter()
                .map(|mut active| {
                    virtio_queue::QueueT::set_event_idx(&mut active.queue, event_idx);
                    active
                })
                .collect(),
            config_interrupt: self.config.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// Sends a packet in one piece, and waits until the device is done with it.
    fn send(&mut self, packet: &[u8]) {
        self.memory.write_slice(packet, GuestAddress(SENT)).unwrap();
        let length = u32::try_from(packet.len()).unwrap();
        self.send_chain(&[(SENT, length)]);
    }

    fn send_chain(&mut self, pieces: &[(u64, u32)]) {
        let head = self.from_guest.offer(pieces, &[]);
        self.from_guest.kick();
        assert_eq!(self.from_guest.wait_used(), (head, 0));
    }

    /// Posts buffers for packets to the guest, each of so many bytes.
    fn post(&mut self, count: usize, length: u32) {
        for _ in 0..count {
            let address = BUFFERS + self.buffers % 64 * STRIDE;
            self.buffers += 1;
            let head = self.to_guest.offer(&[], &[(address, length)]);
            self.posted.insert(head, address);
        }
        self.to_guest.kick();
    }

    /// The next buffer that the device has filled.
    fn filled(&mut self) -> Vec<u8> {
        let (head, length) = self.to_guest.wait_used();
        let address = self.posted.remove(&head).unwrap();
        let mut data = vec![0; length.try_into().unwrap()];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.device.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }
}

/// A frame of so many bytes, different for each length.
fn frame(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at * 7 + length).to_le_bytes()[0])
        .collect()
}

fn packet(header: Header, length: usize) -> Vec<u8> {
    [header.to_bytes().to_vec(), frame(length)].concat()
}

fn plain(length: usize) -> Vec<u8> {
    packet(Header::default(), length)
}

/// A packet as the guest gets it, over so many buffers.
fn got(length: usize, num_buffers: u16) -> Vec<u8> {
    let header = Header {
        num_buffers,
        ..Header::default()
    };
    packet(header, length)
}

#[test]
fn the_configuration_is_told() {
    let (net, _) = Net::new(MAC, 9000, None).unwrap();

    let mut config = [0xff; 12];
    net.read_config(0, &mut config);

    assert_eq!(config, [2, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0x28, 0x23]);
}

#[test]
fn an_interface_that_cannot_be_is_refused() {
    let refused = |mac, mtu| Net::new(mac, mtu, None).unwrap_err();

    assert!(matches!(refused(MAC, 67), NetError::Mtu(67)));
    assert!(matches!(refused([1; 6], MTU), NetError::Mac(_)));
    assert!(matches!(refused([0; 6], MTU), NetError::Mac(_)));
}

#[test]
fn packets_go_out_as_they_are() {
    let (mut guest, host) = Guest::new();

    guest.send(&plain(60));
    guest.send(&plain(65_550));

    assert_eq!(host.receive(), plain(60));
    assert_eq!(host.receive(), plain(65_550));
}

#[test]
fn pieces_of_a_packet_are_put_together() {
    let (mut guest, host) = Guest::new();
    let data = plain(1000);
    guest
        .memory
        .write_slice(&data[..7], GuestAddress(SENT))
        .unwrap();
    let (second, third) = (SENT + 0x1000, SENT + 0x3000);
    guest
        .memory
        .write_slice(&data[7..500], GuestAddress(second))
        .unwrap();
    guest
        .memory
        .write_slice(&data[500..], GuestAddress(third))
        .unwrap();

    guest.send_chain(&[(SENT, 7), (second, 493), (SENT, 0), (third, 512)]);

    assert_eq!(host.receive(), data);
}

#[test]
fn packets_come_in_over_one_buffer_or_many() {
    let (mut guest, host) = Guest::new();
    guest.post(8, 1526);

    host.send(&plain(60));
    host.send(&plain(4000));

    assert_eq!(guest.filled(), got(60, 1));
    let parts = [guest.filled(), guest.filled(), guest.filled()];
    assert_eq!(
        parts.each_ref().map(Vec::len),
        [1526, 1526, 4012 - 2 * 1526]
    );
    assert_eq!(parts.concat(), got(4000, 3));
}

#[test]
fn the_longest_packet_comes_in() {
    let (mut guest, host) = Guest::new();
    guest.post(64, 1526);

    host.send(&plain(65_550));

    let parts: Vec<_> = (0..43).map(|_| guest.filled()).collect();
    assert_eq!(parts.concat(), got(65_550, 43));
}

#[test]
fn a_driver_that_does_not_merge_gets_one_buffer_a_packet() {
    let features = Guest::unplugged().device.features() & !F_MRG_RXBUF;
    let (mut guest, host) = Guest::with(features);
    guest.post(4, 1526);

    host.send(&plain(60));
    host.send(&plain(4000));
    host.send(&plain(61));

    // The one that is too long is dropped.
    assert_eq!(guest.filled(), got(60, 1));
    assert_eq!(guest.filled(), got(61, 1));
}

#[test]
fn a_tap_is_set_up_for_each_driver() {
    let (mut guest, host) = Guest::new();
    let all = guest.device.features();

    guest.device.reset();
    guest.to_guest = DriverQueue::new(&guest.memory, 0x4_0000, 256);
    guest.from_guest = DriverQueue::new(&guest.memory, 0x5_0000, 256);
    guest.boot(0);
    guest.send(&plain(60));

    assert_eq!(host.receive(), plain(60));
    assert_eq!(*host.configured.lock().unwrap(), [all, 0]);
}

#[test]
fn without_a_tap_the_link_is_down_and_packets_are_lost() {
    let mut guest = Guest::unplugged();
    guest.boot(guest.device.features());

    guest.send(&plain(60));

    assert_eq!(guest.status(), 0);
}

#[test]
fn a_tap_brings_the_link_up() {
    let mut guest = Guest::unplugged();
    guest.boot(guest.device.features());
    guest.post(4, 1526);
    let (host, wire) = Host::new();
    let before = guest.device.config_changes();

    guest.device.link.plug(Arc::new(wire)).unwrap();
    guest.config.wait();

    assert_eq!(guest.status(), LINK_UP);
    assert_ne!(guest.device.config_changes(), before);
    guest.send(&plain(60));
    assert_eq!(host.receive(), plain(60));
    host.send(&plain(70));
    assert_eq!(guest.filled(), got(70, 1));
}

#[test]
fn a_tap_before_the_driver_is_used_by_it() {
    let mut guest = Guest::unplugged();
    let (host, wire) = Host::new();

    guest.device.link.plug(Arc::new(wire)).unwrap();
    guest.boot(guest.device.features());
    guest.send(&plain(60));

    assert_eq!(guest.status(), LINK_UP);
    assert_eq!(host.receive(), plain(60));
}

#[test]
fn a_second_tap_is_refused() {
    let (guest, _host) = Guest::new();
    let (_other, wire) = Host::new();

    let refused = guest.device.link.plug(Arc::new(wire));

    assert_eq!(refused, Err(PlugRefused::Plugged));
}

#[test]
fn a_tap_that_goes_takes_the_link_down_until_the_next() {
    let (mut guest, host) = Guest::new();
    guest.post(4, 1526);

    drop(host);
    guest.config.wait();
    assert_eq!(guest.status(), 0);
    guest.send(&plain(60));
    let (host, wire) = Host::new();
    guest.device.link.plug(Arc::new(wire)).unwrap();
    guest.config.wait();

    assert_eq!(guest.status(), LINK_UP);
    host.send(&plain(70));
    assert_eq!(guest.filled(), got(70, 1));
}

impl Net {
    /// With as many packets to receive as a socket holds, which outlive the host's end.
    pub(crate) fn on_a_full_wire() -> Self {
        let (host, wire) = Host::new();
        host.socket.set_nonblocking(true).unwrap();
        while host.socket.send(&plain(60)).is_ok() {}
        let net = Self::with_link(MAC, MTU, Link::new().unwrap()).unwrap();
        net.link.plug(Arc::new(wire)).unwrap();
        net
    }
}
