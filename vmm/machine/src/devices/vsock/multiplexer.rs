//! All connections: which packet is whose, which socket is whose, and whose turn it is to send.
//!
//! A connection with something for the guest stands in a line (`ready`). In its turn it says what it has to say, moves
//! at most [`BURST`] bytes of data, and goes to the end of the line if it has more; so one that never stops
//! doesn't keep the others from their turn. Without a buffer of the guest the line stands still, and nothing is
//! read from any socket: the writers on the host feel it.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::epoll::{self, EventData, EventFlags};
use vm_memory::VolatileSlice;

use super::connection::{Connection, Control, End, State};
use super::host_end::HostEnd;
use super::packet::{self, HOST_CID, Header, Op, TYPE_STREAM};
use super::ring::{self, Ring, RingError};
use super::{Connected, GuestConnections};
use crate::config::VsockConfig;
use crate::control::ConnectRefused;
use crate::memory::GuestRam;

/// Most connections at a time.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// What the guest may have on its way into one connection, as Linux has it the other way (`VSOCK_BUFFER_SIZE`).
const BUFFER: u32 = 256 * 1024;
/// The same with many connections, so that all the buffers of a guest whose host doesn't read stay below 100 MiB.
const SMALL_BUFFER: u32 = 64 * 1024;
/// From so many on.
const MANY_CONNECTIONS: usize = 128;
/// Data that a connection moves in its turn.
const BURST: u32 = 128 * 1024;
/// Turns before the guest's packets are looked at again.
const TURNS: usize = 64;
/// Resets that wait for a buffer of the guest, at most; with so many nothing more is taken from the guest, as
/// section 5.10.6.1.2 has it.
const MAX_WAITING_RESETS: usize = 256;
/// First port of the host for its own connections. Linux takes ephemeral ports from below.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Ports for that; the last number is VMADDR_PORT_ANY.
const HOST_PORTS: u32 = u32::MAX - FIRST_HOST_PORT;
/// Names of sockets to epoll start here; the device's own descriptors have names below.
pub(super) const FIRST_TOKEN: u64 = 16;

/// Whether there is more to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// All of it.
    All,
    /// Not all: others had to have a turn.
    Some,
    /// Not all: the guest has no buffer posted, and will notify of the next.
    NoBuffers,
}

/// A connection's name, until it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// Names sockets and connections; never used twice.
type Token = u64;

/// All connections of a device.
pub(super) struct Multiplexer {
    guest_cid: u64,
    guest_ports: HashSet<u32>,
    guest_connections: Arc<Mutex<GuestConnections>>,
    epoll: Arc<OwnedFd>,
    entries: HashMap<Token, Entry>,
    by_ports: HashMap<Ports, Token>,
    ready: VecDeque<Token>,
    deadlines: BTreeSet<(Instant, Token)>,
    resets: VecDeque<Header>,
    next_token: Token,
    next_port: u32,
}

struct Entry {
    ports: Ports,
    connection: Connection,
    host: HostEnd,
    /// Whoever asked for the connection and has no answer yet.
    connected: Option<Connected>,
    /// Stands in `ready`.
    in_line: bool,
    /// Stands in `deadlines`.
    deadline: Option<Instant>,
    /// Over for the guest; only what the host has not read yet is left.
    draining: bool,
}

/// Where host's ports begin, which differs from machine to machine: the guest of a clone may still hold ends of its
/// template's connections, and would take what comes from their ports for theirs.
fn any_host_port() -> u32 {
    let random = RandomState::new().hash_one(());
    let offset = random % u64::from(HOST_PORTS);
    FIRST_HOST_PORT.saturating_add(u32::try_from(offset).unwrap_or(0))
}

impl Multiplexer {
    pub(super) fn new(
        config: &VsockConfig,
        guest_connections: Arc<Mutex<GuestConnections>>,
        epoll: Arc<OwnedFd>,
    ) -> Self {
        Self {
            guest_cid: config.cid.into(),
            guest_ports: config.guest_ports.iter().copied().collect(),
            guest_connections,
            epoll,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            resets: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: any_host_port(),
        }
    }

    /// What watches all sockets.
    pub(super) fn epoll(&self) -> &Arc<OwnedFd> {
        &self.epoll
    }

    /// Asks the guest for a connection.
    pub(super) fn connect(
        &mut self,
        guest_port: u32,
        stream: UnixStream,
        connected: Connected,
        now: Instant,
    ) {
        if self.entries.len() >= MAX_CONNECTIONS {
            connected(Err(ConnectRefused::TooMany));
            return;
        }
        let ports = Ports {
            host: self.free_port(guest_port),
            guest: guest_port,
        };
        let connection = Connection::requested(self.buffer(), now);
        if let Err(connected) = self.add(ports, connection, stream, Some(connected))
            && let Some(connected) = connected
        {
            connected(Err(ConnectRefused::TooMany));
        }
    }

    /// A port of the host that no connection to this port of the guest has. There is one: there are more ports
    /// than connections.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = match host.wrapping_add(1) {
                u32::MAX | 0 => FIRST_HOST_PORT,
                next => next,
            };
            if !self.by_ports.contains_key(&Ports { host, guest })
                && !self.guest_ports.contains(&host)
            {
                return host;
            }
        }
    }

    fn buffer(&self) -> u32 {
        if self.entries.len() < MANY_CONNECTIONS {
            BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    /// Adds a connection, or returns the waiter if its socket can't be watched.
    fn add(
        &mut self,
        ports: Ports,
        connection: Connection,
        stream: UnixStream,
        connected: Option<Connected>,
    ) -> Result<(), Option<Connected>> {
        let token = self.next_token;
        // Edge-triggered, and never changed: what an event said is kept until it is used up.
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, &stream, EventData::new_u64(token), flags) {
            log::warn!("vsock: a connection's socket can't be watched: {error}");
            return Err(connected);
        }
        self.next_token += 1;
        self.by_ports.insert(ports, token);
        self.entries.insert(
            token,
            Entry {
                ports,
                connection,
                host: HostEnd::new(stream),
                connected,
                in_line: false,
                deadline: None,
                draining: false,
            },
        );
        self.settle(token);
        Ok(())
    }

    /// Whether another packet of the guest can be taken.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_WAITING_RESETS
    }

    /// Takes a packet of the guest. `data` is what its buffer has after the header.
    pub(super) fn on_packet(
        &mut self,
        header: &Header,
        mut data: Vec<VolatileSlice<'_>>,
        now: Instant,
    ) {
        let op = Op::from_number(header.op);
        if header.src_cid != self.guest_cid {
            // Nobody to answer.
            return;
        }
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        let well_formed = header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM
            && length <= packet::total(&data);
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let known = self.by_ports.get(&ports).copied();
        let (Some(op), true) = (op, well_formed) else {
            // It may be a reset that is malformed, but a reset for it does no harm: Linux takes it for a stray.
            match known.filter(|_| header.dst_cid == HOST_CID && header.kind == TYPE_STREAM) {
                Some(token) => self.violation(token),
                None => self.refuse(header),
            }
            return;
        };
        match known {
            None if op == Op::Request => self.on_request(ports, header),
            None if op == Op::Reset => {}
            None => self.refuse(header),
            Some(token) => {
                packet::truncate(&mut data, length);
                self.on_connection_packet(token, header, op, &data, now);
            }
        }
    }

    /// The guest asks for a connection.
    fn on_request(&mut self, ports: Ports, header: &Header) {
        if !self.guest_ports.contains(&ports.host) || self.entries.len() >= MAX_CONNECTIONS {
            self.refuse(header);
            return;
        }
        let (ours, theirs) = match UnixStream::pair() {
            Ok(pair) => pair,
            Err(error) => {
                log::warn!("vsock: no socket for a connection of the guest: {error}");
                self.refuse(header);
                return;
            }
        };
        let connection = Connection::accepted(self.buffer(), header);
        if self.add(ports, connection, ours, None).is_err() {
            self.refuse(header);
            return;
        }
        let guest_connections = self
            .guest_connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        guest_connections(ports.host, theirs);
    }

    fn on_connection_packet(
        &mut self,
        token: Token,
        header: &Header,
        op: Op,
        data: &[VolatileSlice<'_>],
        now: Instant,
    ) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        if entry.connection.on_packet(header, op, now) {
            match entry.host.write(data) {
                Ok(written) => entry.forwarded(written),
                Err(_) => entry.host_gone(now),
            }
        }
        self.settle(token);
    }

    fn violation(&mut self, token: Token) {
        if let Some(entry) = self.entries.get_mut(&token) {
            entry.connection.on_violation();
        }
        self.settle(token);
    }

    /// Answers a packet that is nobody's, unless it is a reset itself.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 {
            return;
        }
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }

    /// Something happened to a socket.
    pub(super) fn on_event(&mut self, token: Token, flags: EventFlags, now: Instant) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        if flags.contains(EventFlags::IN) {
            entry.host.on_readable();
        }
        if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            entry.host.on_ending();
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            entry.host_gone(now);
        } else if flags.contains(EventFlags::OUT) {
            entry.host.on_writable();
            match entry.host.flush() {
                Ok(written) => entry.forwarded(written),
                Err(_) => entry.host_gone(now),
            }
        }
        self.settle(token);
    }

    /// When [`Multiplexer::on_deadlines`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Ends what took too long.
    pub(super) fn on_deadlines(&mut self, now: Instant) {
        while let Some((deadline, token)) = self.deadlines.first().copied()
            && deadline <= now
        {
            if let Some(entry) = self.entries.get_mut(&token) {
                entry.connection.on_deadline(now);
            }
            self.settle(token);
        }
    }

    /// Sends to the guest what there is, as far as it has buffers.
    pub(super) fn send(
        &mut self,
        ring: &mut Ring,
        memory: &GuestRam,
        now: Instant,
    ) -> Result<Sent, RingError> {
        while let Some(reset) = self.resets.front() {
            let Some(place) = ring.take_place(memory)? else {
                return Ok(Sent::NoBuffers);
            };
            ring.fill(memory, &place, *reset)?;
            self.resets.pop_front();
        }
        for _ in 0..TURNS {
            let Some(token) = self.ready.front().copied() else {
                return Ok(Sent::All);
            };
            if !self.turn(token, ring, memory, now)? {
                return Ok(Sent::NoBuffers);
            }
            self.ready.pop_front();
            if let Some(entry) = self.entries.get_mut(&token) {
                entry.in_line = false;
            }
            self.settle(token);
        }
        Ok(if self.ready.is_empty() && self.resets.is_empty() {
            Sent::All
        } else {
            Sent::Some
        })
    }

    /// One connection's turn. Returns whether the guest had the buffers for it.
    fn turn(
        &mut self,
        token: Token,
        ring: &mut Ring,
        memory: &GuestRam,
        now: Instant,
    ) -> Result<bool, RingError> {
        let guest_cid = self.guest_cid;
        let Some(entry) = self.entries.get_mut(&token) else {
            return Ok(true);
        };
        while entry.connection.has_control() {
            let Some(place) = ring.take_place(memory)? else {
                return Ok(false);
            };
            match entry.connection.next_control() {
                Some(control) => ring.fill(memory, &place, entry.header(guest_cid, control, 0))?,
                None => ring.put_back(1),
            }
        }
        let room = entry.connection.room().min(BURST);
        if room == 0 || !entry.host.is_readable() {
            return Ok(true);
        }
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let places = ring.take_places(memory, room)?;
        if places.is_empty() {
            return Ok(false);
        }
        let mut data = ring::data(&places);
        packet::truncate(&mut data, room);
        let length = match entry.host.read(&data) {
            Ok(None) => 0,
            Ok(Some(0)) => {
                entry.connection.on_host_sent_all(now);
                0
            }
            Ok(Some(length)) => length,
            Err(_) => {
                entry.connection.on_host_sent_all(now);
                entry.host_gone(now);
                0
            }
        };
        ring.fill_all(memory, &places, length, |part| {
            entry.connection.on_sent(part);
            entry.header(
                guest_cid,
                Control {
                    op: Op::Data,
                    flags: 0,
                },
                part,
            )
        })?;
        Ok(true)
    }

    /// Brings all that depends on a connection's state in line with it.
    fn settle(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let state = entry.connection.state();
        if !matches!(state, State::Requested(_))
            && let Some(connected) = entry.connected.take()
        {
            connected(match state {
                State::Over(End::Deadline) => Err(ConnectRefused::TimedOut),
                State::Over(_) => Err(ConnectRefused::Reset),
                _ => Ok(()),
            });
        }
        if let State::Over(end) = state
            && !entry.draining
        {
            entry.draining = true;
            self.by_ports.remove(&entry.ports);
            // A guest that takes no packets at all gets no more resets than it could have connections.
            if end.wants_reset() && self.resets.len() < MAX_WAITING_RESETS + MAX_CONNECTIONS {
                let control = Control {
                    op: Op::Reset,
                    flags: 0,
                };
                self.resets
                    .push_back(entry.header(self.guest_cid, control, 0));
            }
        }
        if entry.draining || !entry.connection.guest_receives() {
            entry.host.stop_reading();
        }
        if entry.draining || !entry.connection.guest_sends() {
            entry.host.finish_writing();
        }
        let deadline = entry.connection.deadline();
        if deadline != entry.deadline {
            if let Some(old) = entry.deadline {
                self.deadlines.remove(&(old, token));
            }
            if let Some(new) = deadline {
                self.deadlines.insert((new, token));
            }
            entry.deadline = deadline;
        }
        if entry.draining && !entry.host.has_waiting() {
            // Closing the socket ends its being watched.
            self.entries.remove(&token);
        } else if !entry.in_line && entry.has_something() {
            entry.in_line = true;
            self.ready.push_back(token);
        }
    }

    /// Ends all connections at once: the driver is gone.
    pub(super) fn close(&mut self) {
        for (_, entry) in self.entries.drain() {
            if let Some(connected) = entry.connected {
                connected(Err(ConnectRefused::NoDriver));
            }
        }
    }
}

impl Entry {
    fn has_something(&self) -> bool {
        self.connection.has_control() || (self.connection.room() > 0 && self.host.is_readable())
    }

    fn forwarded(&mut self, count: usize) {
        self.connection
            .on_forwarded(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// The socket takes nothing more.
    fn host_gone(&mut self, now: Instant) {
        self.host.discard_waiting();
        self.connection.on_host_stops_receiving(now);
    }

    /// A header for a packet that goes to the guest now.
    fn header(&mut self, guest_cid: u64, control: Control, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.connection.tell_credit();
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op: control.op as u16,
            flags: control.flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}
