//! Says how this machine's kernel numbers TCP connections: for each of a few connections, always the same, the sequence number
//! that its SYN begins with and the offset of its timestamps, both without the clock that they are counted from.
//!
//! Connections are to nobody, by the loopback, and are seen by a raw socket: needs `CAP_NET_RAW`. A connection a line,
//! each `SEQUENCE OFFSET`.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test helper reports by panicking"
)]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, connect, ipproto, recv, socket_with,
    sockopt,
};
use rustix::time::{ClockId, clock_gettime};

const FROM: u16 = 40_000;
const TO: u16 = 50_000;
const CONNECTIONS: u16 = 4;
const SYN: u8 = 2;
const TIMESTAMPS: u8 = 8;
/// Linux counts a connection's first number up every 64 ns, of real time.
const TICK_SHIFT: u32 = 6;

fn main() {
    let raw = socket_with(
        AddressFamily::INET,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(ipproto::TCP),
    )
    .expect("a raw socket: CAP_NET_RAW");
    for number in 0..CONNECTIONS {
        let real = nanoseconds(ClockId::Realtime);
        let milliseconds = nanoseconds(ClockId::Monotonic) / 1_000_000;
        let (sequence, timestamp) = attempt(&raw, FROM + number);
        println!(
            "{} {}",
            sequence.wrapping_sub(low(real >> TICK_SHIFT)),
            timestamp.wrapping_sub(low(milliseconds))
        );
    }
}

fn nanoseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).expect("after 1970");
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).expect("nanoseconds")
}

fn low(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).expect("32 bits")
}

/// Connects to where nobody listens; the number and the timestamp of the SYN.
fn attempt(raw: &OwnedFd, port: u16) -> (u32, u32) {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket");
    sockopt::set_socket_reuseaddr(&socket, true).expect("SO_REUSEADDR");
    let place = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    bind(&socket, &place(port)).expect("the port is free");
    let refused = connect(&socket, &place(TO));
    assert_eq!(refused, Err(rustix::io::Errno::CONNREFUSED));
    loop {
        let mut packet = [0; 256];
        let (count, _) = recv(raw, &mut packet[..], RecvFlags::empty()).expect("a packet");
        if let Some(found) = first_of(&packet[..count], port) {
            return found;
        }
    }
}

/// Sequence number and timestamp of a SYN that is from this port. None: it is something else.
fn first_of(packet: &[u8], port: u16) -> Option<(u32, u32)> {
    let header = usize::from(packet.first()? & 0xF) * 4;
    let segment = packet.get(header..)?;
    let source = u16::from_be_bytes(*segment.first_chunk()?);
    let flags = *segment.get(13)?;
    if source != port || flags != SYN {
        return None;
    }
    let number = |at: usize| -> Option<u32> {
        let bytes = segment.get(at..)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes))
    };
    let mut option = 20;
    loop {
        match *segment.get(option)? {
            TIMESTAMPS => return Some((number(4)?, number(option + 2)?)),
            1 => option += 1,
            _ => option += usize::from(*segment.get(option + 1)?).max(2),
        }
    }
}
