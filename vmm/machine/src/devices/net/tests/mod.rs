//! The device with a socket pair for a tap: a packet is a datagram there, with its header before it.

mod changes;
mod hostile;
mod packets;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::link::Backend;
use super::tap::Tap;
use super::*;
use crate::config::NetLimits;
use crate::devices::driver_queue::{DriverQueue, Interrupts};
use crate::memory::GuestRam;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: usize = header::SIZE;
/// Where the driver's buffers start, after its queues.
const BUFFERS: u64 = 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(60);

/// What a tap was told.
#[derive(Debug, Default)]
struct Told {
    offload: Vec<u32>,
    attached: Vec<bool>,
}

/// A tap that is a socket.
#[derive(Debug)]
struct SocketTap {
    socket: UnixDatagram,
    segments_udp: bool,
    told: Arc<Mutex<Told>>,
}

impl AsFd for SocketTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Tap for SocketTap {
    fn set_offload(&self, flags: u32) -> io::Result<()> {
        if flags & features::TUN_USO != 0 && !self.segments_udp {
            return Err(ErrorKind::InvalidInput.into());
        }
        self.told.lock().unwrap().offload.push(flags);
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.told.lock().unwrap().attached.push(attached);
        Ok(())
    }
}

/// The host's end of a tap.
struct Host {
    socket: UnixDatagram,
    told: Arc<Mutex<Told>>,
}

impl Host {
    fn send(&self, header: [u8; 10], frame: &[u8]) {
        let mut packet = header.to_vec();
        packet.extend([0xee; 2]);
        packet.extend(frame);
        self.socket.send(&packet).unwrap();
    }

    /// The next packet's header and frame.
    fn receive(&self) -> (Vec<u8>, Vec<u8>) {
        let mut packet = vec![0; 70_000];
        let length = self.socket.recv(&mut packet).unwrap();
        packet.truncate(length);
        let frame = packet.split_off(HEADER);
        (packet, frame)
    }

    fn receive_none(&self) {
        self.socket.set_nonblocking(true).unwrap();
        let error = self.socket.recv(&mut [0; 16]).unwrap_err();
        self.socket.set_nonblocking(false).unwrap();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
}

fn tap(segments_udp: bool) -> (Backend, Host) {
    // These tell one end that the other is gone, as datagrams would not.
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
    let [ours, theirs] = [ours, theirs].map(UnixDatagram::from);
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let told = Arc::<Mutex<Told>>::default();
    let backend = Backend {
        tap: Box::new(SocketTap {
            socket: ours,
            segments_udp,
            told: told.clone(),
        }),
        vhost: None,
    };
    let host = Host {
        socket: theirs,
        told,
    };
    (backend, host)
}

fn config(queue_pairs: u8, limits: NetLimits) -> NetConfig {
    NetConfig {
        udp_segmentation: false,
        mac: MAC,
        mtu: 1500,
        queue_pairs,
        tap: None,
        limits,
    }
}

/// An interface and its driver. The queues of both directions and the control queue are the driver's.
struct Interface {
    net: Net,
    handle: NetHandle,
    memory: GuestRam,
    queues: Vec<DriverQueue>,
    config_interrupts: Arc<Interrupts>,
}

impl Interface {
    fn new(config: &NetConfig, backends: Option<Vec<Backend>>) -> Self {
        let (net, handle) = Net::with_backends(config, backends).unwrap();
        // Ends with RAM, then a hole.
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap();
        let queues = (0_u64..)
            .zip(net.queue_max_sizes())
            .map(|(index, size)| DriverQueue::new(&memory, 0x1000 + 0x4000 * index, *size))
            .collect();
        Self {
            net,
            handle,
            memory,
            queues,
            config_interrupts: Interrupts::new(),
        }
    }

    fn activation(&self, features: u64) -> Activation {
        let queues = (0_u16..)
            .zip(&self.queues)
            .map(|(index, queue)| queue.activate(index))
            .collect();
        Activation {
            memory: self.memory.clone(),
            features,
            queues,
            config_interrupt: self.config_interrupts.clone(),
            resumed: None,
        }
    }

    fn start(&mut self, features: u64) {
        let activation = self.activation(features);
        self.net.activate(activation).unwrap();
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    fn config(&self) -> [u8; 16] {
        let mut config = [0; 16];
        self.net.read_config(0, &mut config);
        config
    }

    /// Sends a packet of the guest's.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        self.write(BUFFERS, &header);
        self.write(BUFFERS + 0x1000, frame);
        let length = u32::try_from(frame.len()).unwrap();
        let queue = &mut self.queues[1];
        queue.offer(&[(BUFFERS, 12), (BUFFERS + 0x1000, length)], &[]);
        queue.kick();
        queue.wait_used();
    }

    /// Posts a buffer for packets.
    fn post(&mut self, address: u64, length: u32) -> u16 {
        let head = self.queues[0].offer(&[], &[(address, length)]);
        self.queues[0].kick();
        head
    }

    /// Has a command carried out, and returns its status.
    fn command(&mut self, queue: usize, command: &[u8]) -> u8 {
        self.write(BUFFERS + 0x8000, command);
        self.write(BUFFERS + 0x9000, &[0xff]);
        let length = u32::try_from(command.len()).unwrap();
        let queue = &mut self.queues[queue];
        queue.offer(&[(BUFFERS + 0x8000, length)], &[(BUFFERS + 0x9000, 1)]);
        queue.kick();
        queue.wait_used();
        self.read(BUFFERS + 0x9000, 1)[0]
    }

    fn counted(&self) -> [u64; 4] {
        let counters = &self.handle.0.counters;
        [
            &counters.malformed,
            &counters.unsent,
            &counters.unwanted,
            &counters.useless,
        ]
        .map(|counter| counter.load(Ordering::Relaxed))
    }
}

/// An interface of one queue pair on a tap, running with these features.
fn running(features: u64) -> (Interface, Host) {
    let (backend, host) = tap(true);
    let mut interface = Interface::new(&config(1, NetLimits::default()), Some(vec![backend]));
    interface.start(features);
    (interface, host)
}

/// All that a driver like Linux's takes.
const LINUX: u64 = RING_FEATURES | features::ALWAYS | features::UDP_SEGMENTATION;

#[test]
fn the_configuration_says_what_there_is() {
    let (backend, _host) = tap(false);
    let up = Interface::new(&config(1, NetLimits::default()), Some(vec![backend]));
    let down = Interface::new(&config(4, NetLimits::default()), None);

    assert_eq!(
        up.config(),
        *b"\x02\0\0\0\0\x01\x01\0\x01\0\xdc\x05\0\0\0\0"
    );
    assert_eq!(
        down.config(),
        *b"\x02\0\0\0\0\x01\0\0\x04\0\xdc\x05\0\0\0\0"
    );
    assert_eq!(up.net.features() & features::MQ, 0);
    assert_eq!(down.net.features() & features::MQ, features::MQ);
    assert_eq!(down.net.queue_max_sizes().len(), 9);
}

#[test]
fn udp_segmentation_is_offered_where_the_tap_has_it() {
    let offered = [true, false].map(|segments_udp| {
        let (backend, _host) = tap(segments_udp);
        let interface = Interface::new(&config(1, NetLimits::default()), Some(vec![backend]));
        interface.net.features() & features::UDP_SEGMENTATION
    });

    assert_eq!(offered, [features::UDP_SEGMENTATION, 0]);
}

#[test]
fn impossible_interfaces_are_refused() {
    let make = |mtu, queue_pairs| {
        let mut config = config(queue_pairs, NetLimits::default());
        config.mtu = mtu;
        Net::new(&config, 4, None).map(drop)
    };

    let with_mac = |mac| {
        let mut config = config(1, NetLimits::default());
        config.mac = mac;
        Net::new(&config, 4, None).map(drop)
    };

    assert!(matches!(with_mac([1; 6]), Err(NetError::Mac(_))));
    assert!(matches!(with_mac([0; 6]), Err(NetError::Mac(_))));
    assert!(matches!(make(67, 1), Err(NetError::Mtu(67))));
    assert!(matches!(
        make(68, 0),
        Err(NetError::QueuePairs { pairs: 0, most: 4 })
    ));
    assert!(matches!(
        make(68, 5),
        Err(NetError::QueuePairs { pairs: 5, most: 4 })
    ));
    assert!(make(65_535, 4).is_ok());
}

#[test]
fn what_is_no_tap_is_refused() {
    let (socket, _other) = UnixDatagram::pair().unwrap();
    let tap = TapDescriptors {
        queues: vec![socket.into()],
        vhost: vec![],
    };
    let none = TapDescriptors {
        queues: vec![],
        vhost: vec![],
    };
    let interface = Interface::new(&config(1, NetLimits::default()), None);

    assert!(matches!(
        interface.handle.plug(tap),
        Err(PlugRefused::Tap { .. })
    ));
    assert_eq!(interface.handle.plug(none), Err(PlugRefused::Descriptors));
}

#[test]
fn a_reset_device_is_quiet_and_runs_again() {
    let (mut interface, host) = running(LINUX);
    interface.send([0; HEADER], &[1; 60]);
    host.receive();
    interface.net.reset();

    interface.queues[1].offer(&[(BUFFERS, 72)], &[]);
    interface.queues[1].kick();
    host.receive_none();
    let queues = (0_u64..).zip([256, 256, 64]);
    interface.queues = queues
        .map(|(index, size)| DriverQueue::new(&interface.memory, 0x2_0000 + 0x4000 * index, size))
        .collect();
    interface.start(LINUX);
    interface.send([0; HEADER], &[2; 60]);

    assert_eq!(host.receive().1, [2; 60]);
}
