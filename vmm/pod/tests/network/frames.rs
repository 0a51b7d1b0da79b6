//! Packets as a hostile guest makes them, and as they arrive.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use hull_pod::network::Namespace;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::world::inside;

/// `struct virtio_net_hdr`: nothing is to be done for the packet.
const HEADER: [u8; 10] = [0; 10];
const OWN: [u8; 4] = [10, 0, 0, 2];
const OTHER: [u8; 4] = [10, 0, 0, 9];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
const OWN6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const OTHER6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Packets with a name.
pub type Named = (&'static str, Vec<u8>);

/// Packets that aren't the guest's to send.
pub fn spoofed(mac: [u8; 6]) -> Vec<Named> {
    let tag = [0x81, 0, 0, 5];
    let plain = v4(mac, OWN, 1);
    let tagged = [&plain[..12], &tag, &plain[12..]].concat();
    let behind_options = [&[ICMPV6, 0, 1, 4, 0, 0, 0, 0][..], &icmp(136, OTHER6)].concat();
    vec![
        ("IPv4 of another", v4(mac, OTHER, 2)),
        ("another's hardware address", v4(OTHER_MAC, OWN, 3)),
        ("ARP of another", arp(mac, mac, OTHER)),
        ("ARP for another", arp(mac, OTHER_MAC, OWN)),
        ("IPv6 of another", v6(mac, OTHER6, UDP, &[0; 8])),
        (
            "IPv6 with another's hardware address",
            v6(OTHER_MAC, OWN6, UDP, &[0; 8]),
        ),
        (
            "an advertisement of another's address",
            v6(mac, OWN6, ICMPV6, &icmp(136, OTHER6)),
        ),
        (
            "a router advertisement",
            v6(mac, OWN6, ICMPV6, &icmp(134, OWN6)),
        ),
        ("a redirect", v6(mac, OWN6, ICMPV6, &icmp(137, OTHER6))),
        (
            "an advertisement behind destination options",
            v6(mac, OWN6, 60, &behind_options),
        ),
        (
            "an advertisement behind hop-by-hop options",
            v6(mac, OWN6, 0, &behind_options),
        ),
        (
            "a question for another's address",
            v6(mac, [0; 16], ICMPV6, &icmp(135, OTHER6)),
        ),
        ("a VLAN tag", tagged),
        ("another protocol", ethernet(mac, 0x88cc, &[0; 46])),
        (
            "a packet that ends early",
            ethernet(mac, 0x0800, &[0x45; 8]),
        ),
    ]
}

/// Packets that are.
pub fn own(mac: [u8; 6]) -> Vec<Named> {
    vec![
        ("ARP", arp(mac, mac, OWN)),
        ("IPv6", v6(mac, OWN6, UDP, &[0; 8])),
        ("an advertisement", v6(mac, OWN6, ICMPV6, &icmp(136, OWN6))),
        ("a question", v6(mac, OWN6, ICMPV6, &icmp(135, OTHER6))),
        (
            "a question without a source",
            v6(mac, [0; 16], ICMPV6, &icmp(135, OWN6)),
        ),
        ("IPv4", v4(mac, OWN, 9)),
    ]
}

fn ethernet(mac: [u8; 6], protocol: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &mac[..], &protocol.to_be_bytes(), payload].concat()
}

fn v4(mac: [u8; 6], source: [u8; 4], id: u8) -> Vec<u8> {
    let start = [0x45, 0, 0, 28, 0, id, 0, 0, 64, UDP, 0, 0];
    ethernet(
        mac,
        0x0800,
        &[&start[..], &source, &[10, 0, 0, 1], &[0; 8]].concat(),
    )
}

fn arp(mac: [u8; 6], sender_mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let start = [0, 1, 8, 0, 6, 4, 0, 1];
    let addresses = [&sender_mac[..], &sender, &[0; 6], &[10, 0, 0, 1]].concat();
    ethernet(mac, 0x0806, &[&start[..], &addresses].concat())
}

fn v6(mac: [u8; 6], source: [u8; 16], next: u8, behind: &[u8]) -> Vec<u8> {
    let length = u8::try_from(behind.len()).unwrap();
    let start = [0x60, 0, 0, 0, 0, length, next, 255];
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    ethernet(
        mac,
        0x86dd,
        &[&start[..], &source, &all_nodes, behind].concat(),
    )
}

fn icmp(kind: u8, target: [u8; 16]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target].concat()
}

pub fn send(queue: &OwnedFd, frame: &[u8]) {
    rustix::io::write(queue, &[&HEADER, frame].concat()).unwrap();
}

/// All that arrives in a namespace.
pub struct Capture(OwnedFd);

impl Capture {
    pub fn open(namespace: &Namespace) -> Self {
        let all = i32::from(0x0003_u16.to_be());
        let socket = inside(namespace, || {
            // SAFETY: no memory is passed.
            let socket = unsafe {
                libc::socket(
                    libc::AF_PACKET,
                    libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                    all,
                )
            };
            assert!(socket >= 0);
            // SAFETY: it is new, and nobody else's.
            Ok(unsafe { OwnedFd::from_raw_fd(socket) })
        });
        Self(socket.unwrap())
    }

    /// What has come up to and with a packet.
    pub fn until(&self, last: &[u8]) -> Vec<Vec<u8>> {
        let timeout = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let mut seen: Vec<Vec<u8>> = Vec::new();
        let mut frame = vec![0; 1 << 16];
        while seen.last().is_none_or(|frame| frame != last) {
            match rustix::io::read(&self.0, &mut frame[..]) {
                Ok(length) => seen.push(frame[..length].to_vec()),
                Err(_) => {
                    let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout));
                    assert_eq!(ready, Ok(1), "the last packet is lost");
                }
            }
        }
        seen
    }
}

/// A tap in the calling thread's network namespace.
pub fn tap(name: &str) -> OwnedFd {
    let tun = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is an `ifreq`: a name and, at 16 of its 40 bytes, flags.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(done, 0);
    tun.into()
}
