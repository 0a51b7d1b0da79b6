//! What the tests are in: two namespaces, what is sent and received at their ends, and frames.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use hull_machine::config::TapDescriptors;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, eth, socket_with};

use super::super::*;

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(super) const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub(super) const IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub(super) const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(super) const IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

pub(super) struct World {
    pub(super) pod: Namespace,
    pub(super) node: Namespace,
}

impl World {
    /// The pod's eth0 has an address of each family, and is at the other end of the node's veth0.
    pub(super) fn new() -> Self {
        let world = Self {
            pod: Namespace::create().unwrap(),
            node: Namespace::create().unwrap(),
        };
        let pod = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            world.pod.as_fd().as_raw_fd()
        );
        ip(
            &world.node,
            &format!(
                "link add veth0 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns {pod}"
            ),
        );
        ip(&world.node, "link set veth0 up");
        ip(&world.pod, "link set eth0 mtu 1400 up");
        ip(&world.pod, "address add 10.0.0.2/24 dev eth0");
        ip(&world.pod, "address add fd00::2/64 dev eth0 nodad");
        world
    }

    pub(super) fn plug(&self) -> Result<Plugged> {
        self.plug_queues(1, VhostNet::Off)
    }

    pub(super) fn plug_queues(&self, count: u8, vhost: VhostNet) -> Result<Plugged> {
        let observed = observe(&self.pod)?;
        let mut plug = Plug::new(observed.interfaces.len(), count, vhost);
        let add = |interface| plug.add(&self.pod, interface);
        let taps = observed.interfaces.iter().map(add).collect::<Result<_>>()?;
        Ok(Plugged { plug, taps })
    }

    /// What is sent and received at the node's end.
    pub(super) fn wire(&self) -> Port {
        let socket = self.node.run(|| Ok(packet_socket("veth0"))).unwrap();
        Port {
            file: socket.into(),
            header: 0,
        }
    }
}

/// A tap for each interface.
#[derive(Debug)]
pub(super) struct Plugged {
    pub(super) plug: Plug,
    pub(super) taps: Vec<TapDescriptors>,
}

impl Plugged {
    pub(super) fn teardown(self, namespace: &Namespace) -> Result<()> {
        drop(self.taps);
        self.plug.teardown(namespace)
    }
}

pub(super) fn run(namespace: &Namespace, program: &str, arguments: &str) -> String {
    let output = namespace
        .run(|| {
            Command::new(program)
                .args(arguments.split_whitespace())
                .output()
                .doing(program)
        })
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn ip(namespace: &Namespace, arguments: &str) -> String {
    run(namespace, "ip", arguments)
}

pub(super) fn packet_socket(interface: &str) -> OwnedFd {
    let socket = socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(eth::ALL),
    )
    .unwrap();
    // SAFETY: a sockaddr_ll is plain numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = name_to_index(&socket, interface).unwrap().cast_signed();
    let size = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the descriptor is open, and the address is valid for its size during the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    socket
}

/// Where frames are sent and received.
pub(super) struct Port {
    pub(super) file: File,
    /// Length of what is before each frame.
    pub(super) header: usize,
}

impl Port {
    pub(super) fn tap(plugged: &mut Plugged) -> Self {
        let tap = plugged.taps.pop().unwrap();
        let [queue] = <[OwnedFd; 1]>::try_from(tap.queues).unwrap();
        Self::queue(queue)
    }

    pub(super) fn queue(queue: OwnedFd) -> Self {
        Self {
            file: queue.into(),
            header: 10,
        }
    }

    pub(super) fn send(&mut self, frame: &[u8]) {
        let whole = [&vec![0; self.header], frame].concat();
        assert_eq!(self.file.write(&whole).unwrap(), whole.len());
    }

    /// The next frame of those for which `wanted` holds, if there is one within the time.
    pub(super) fn receive(
        &mut self,
        wait: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Option<Vec<u8>> {
        let end = Instant::now() + wait;
        let mut buffer = [0; 2048];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap();
            let mut polled = [PollFd::new(&self.file, PollFlags::IN)];
            if poll(&mut polled, Some(&left)).unwrap() == 0 {
                return None;
            }
            let length = self.file.read(&mut buffer).unwrap();
            let frame = &buffer[self.header..length];
            if wanted(frame) {
                return Some(frame.into());
            }
        }
    }

    /// The next frame of a test's.
    pub(super) fn next(&mut self) -> Vec<u8> {
        let marked = |frame: &[u8]| frame.ends_with(MARK);
        let frame = self.receive(Duration::from_secs(20), marked);
        frame.expect("no frame has come")
    }
}

/// The end of each frame that a test sends.
pub(super) const MARK: &[u8] = b"a frame of the test's";

pub(super) fn frame(source: [u8; 6], kind: u16, content: &[u8]) -> Vec<u8> {
    let kind = kind.to_be_bytes();
    [&NODE_MAC[..], &source, &kind, content, MARK].concat()
}

pub(super) fn ipv4(mac: [u8; 6], ip: impl Into<Ipv4Addr>) -> Vec<u8> {
    let mut header = [0; 20];
    header[0] = 0x45;
    header[8..10].copy_from_slice(&[64, 253]);
    header[12..16].copy_from_slice(&ip.into().octets());
    header[16..].copy_from_slice(&NODE_IP.octets());
    frame(mac, 0x0800, &header)
}

pub(super) fn ipv6(mac: [u8; 6], ip: &str) -> Vec<u8> {
    ipv6_with(mac, ip, [253, 64], &[])
}

/// `next`: the next header and the hop limit.
pub(super) fn ipv6_with(mac: [u8; 6], ip: &str, next: [u8; 2], content: &[u8]) -> Vec<u8> {
    let ip: Ipv6Addr = ip.parse().unwrap();
    let mut header = [0; 40];
    header[0] = 0x60;
    header[6..8].copy_from_slice(&next);
    header[8..24].copy_from_slice(&ip.octets());
    frame(mac, 0x86dd, &[&header, content].concat())
}

/// Neighbour discovery from an own address about a target.
pub(super) fn discovery(from: &str, kind: u8, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    let content = [&[kind, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..]].concat();
    ipv6_with(MAC, from, [58, 255], &content)
}

pub(super) fn arp(mac: [u8; 6], sender: [u8; 6], ip: impl Into<Ipv4Addr>) -> Vec<u8> {
    let ip = ip.into().octets();
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    let content = [&fixed[..], &sender, &ip, &[0; 6], &NODE_IP.octets()].concat();
    frame(mac, 0x0806, &content)
}
