//! Packets to the guest: from the tap straight into the driver's buffers (Virtio 1.2, section 5.1.6.3).
//!
//! How long a packet is shows when it is read. Room for the longest is gathered from what the driver has
//! posted, and where that is less, the read ends in a buffer of ours. A packet that went there waits until
//! the driver has posted enough, and nothing more is read; so nothing is read while nothing is posted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::counters::{Counters, count};
use super::features;
use super::header::{self, ETHERNET, LONGEST_FRAME, VLAN_TAG};
use super::limits::Limiter;
use super::ring::{Ring, Used};
use crate::virtio::buffers::{Buffers, Span};

/// Packets and bad chains in one go.
const BUDGET: usize = 64;
/// Descriptors of a buffer.
const MOST_DESCRIPTORS: usize = 64;
/// Pieces of guest memory for one read, of the 1024 that the kernel takes.
const MOST_PIECES: usize = 512;
const LONGEST: usize = header::SIZE + LONGEST_FRAME;

/// What there is to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The tap has packets again; or still.
    Tap,
    /// The driver posts buffers.
    Buffers,
    /// The limits let packets through.
    Until(Instant),
    /// Nothing: the tap is of no more use.
    Broken,
}

/// What the driver of a queue wants.
#[derive(Debug, Clone, Copy)]
pub struct Wishes {
    /// Packets may be spread over several buffers.
    mergeable: bool,
    /// Bytes of the longest packet that may come, with its header.
    longest: usize,
    /// The header's flags mean something.
    flags: bool,
}

impl Wishes {
    pub fn new(negotiated: u64, mtu: u16) -> Self {
        Self {
            mergeable: negotiated & features::MRG_RXBUF != 0,
            longest: if negotiated & features::LONG_PACKETS != 0 {
                LONGEST
            } else {
                header::SIZE + usize::from(mtu) + ETHERNET + VLAN_TAG
            },
            flags: negotiated & features::GUEST_CSUM != 0,
        }
    }
}

/// The queue to the guest.
#[derive(Debug)]
pub struct Receive {
    pub ring: Ring,
    pub limiter: Limiter,
    wishes: Wishes,
    /// The rest of a packet that had no room.
    spill: Vec<u8>,
    /// A packet that waits for room.
    pending: Option<Vec<u8>>,
    counters: Arc<Counters>,
}

/// One of the driver's buffers.
#[derive(Debug)]
struct Place<'m> {
    head: u16,
    /// Where the header goes if a packet starts here.
    header: Span<'m>,
    rest: Span<'m>,
    capacity: usize,
}

/// Buffers that were taken and not used yet, in the driver's order.
#[derive(Debug, Default)]
struct Room<'m> {
    places: VecDeque<Place<'m>>,
    capacity: usize,
    pieces: usize,
    /// There can't be more before some of it is used.
    closed: bool,
}

impl<'m> Place<'m> {
    /// None where a packet can't even have its header.
    fn new(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
    ) -> Option<Self> {
        let head = chain.head_index();
        let Buffers { readable, writable } =
            Buffers::resolve(memory, chain, MOST_DESCRIPTORS).ok()?;
        if !readable.is_empty() {
            return None;
        }
        let capacity = writable.len();
        let mut rest = writable;
        let header = rest.take_front(header::SIZE)?;
        Some(Self {
            head,
            header,
            rest,
            capacity,
        })
    }

    fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.header.pieces().chain(self.rest.pieces())
    }
}

impl<'m> Room<'m> {
    fn push(&mut self, place: Place<'m>) {
        self.capacity = self.capacity.saturating_add(place.capacity);
        self.pieces += place.pieces().count();
        self.places.push_back(place);
    }

    fn pop(&mut self) -> Option<Place<'m>> {
        let place = self.places.pop_front()?;
        self.capacity -= place.capacity;
        self.pieces -= place.pieces().count();
        self.closed = false;
        Some(place)
    }

    fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.places.iter().flat_map(Place::pieces)
    }

    /// Copies a packet in, which has room.
    fn write(&self, packet: &[u8]) {
        let mut left = packet;
        for piece in self.pieces() {
            let (part, rest) = left.split_at(left.len().min(piece.len()));
            piece.copy_from(part);
            left = rest;
        }
    }

    /// Copies out what was read into it.
    fn read(&self) -> Vec<u8> {
        let mut packet = vec![0; self.capacity];
        let mut done = 0;
        for piece in self.pieces() {
            done += piece.copy_to(&mut packet[done..]);
        }
        packet
    }
}

impl Receive {
    pub fn new(ring: Ring, limiter: Limiter, wishes: Wishes, counters: Arc<Counters>) -> Self {
        Self {
            ring,
            limiter,
            wishes,
            // Costs nothing until a packet goes there.
            spill: vec![0; LONGEST],
            pending: None,
            counters,
        }
    }

    /// Moves packets until there is something to wait for, or enough was moved.
    ///
    /// # Errors
    /// When the queue is broken: nothing more can be made of it until the driver resets the device.
    pub fn run(&mut self, memory: &GuestMemoryMmap, tap: BorrowedFd<'_>) -> io::Result<Pause> {
        let mut room = Room::default();
        let mut used = Vec::new();
        let pause = self.fill(memory, tap, &mut room, &mut used)?;
        self.ring.put_back(room.places.len());
        self.ring.give_back(memory, &used)?;
        self.ring.tell_driver(memory)?;
        Ok(pause)
    }

    fn fill<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        tap: BorrowedFd<'_>,
        room: &mut Room<'m>,
        used: &mut Vec<Used>,
    ) -> io::Result<Pause> {
        for _ in 0..BUDGET {
            if let Some(due) = self.limiter.pause() {
                return Ok(Pause::Until(due));
            }
            let wanted = self.pending.as_ref().map_or(self.wishes.longest, Vec::len);
            if !self.gather(memory, wanted, room, used)? {
                // A bad chain was given back. That is work, too.
                continue;
            }
            if room.places.is_empty() {
                return Ok(Pause::Buffers);
            }
            let length = match self.pending.take() {
                Some(packet) if packet.len() <= room.capacity => {
                    room.write(&packet);
                    packet.len()
                }
                Some(_) if self.is_all_there_can_be(room) => {
                    count(&self.counters.too_long);
                    continue;
                }
                Some(packet) => {
                    self.pending = Some(packet);
                    return Ok(Pause::Buffers);
                }
                None => match super::tap::receive(tap, room.pieces(), &mut self.spill) {
                    Ok(length) if length > room.capacity => {
                        let mut packet = room.read();
                        let rest = length - room.capacity;
                        packet.extend_from_slice(self.spill.get(..rest).unwrap_or(&self.spill));
                        self.pending = Some(packet);
                        continue;
                    }
                    Ok(length) => length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Pause::Tap);
                    }
                    Err(error) => {
                        log::debug!("reading from a tap: {error}");
                        return Ok(Pause::Broken);
                    }
                },
            };
            if length < header::SIZE {
                // No tap does that.
                return Ok(Pause::Broken);
            }
            self.limiter.charge(length - header::SIZE);
            finish(room, length, self.wishes.flags, used);
        }
        if self.pending.is_some() {
            // Nobody else would come back for it.
            self.ring.kick.write(1)?;
            return Ok(Pause::Buffers);
        }
        Ok(Pause::Tap)
    }

    /// Takes chains until there is room for `wanted` bytes, or as much as there can be. False, when a bad
    /// chain, the first in line, was given back instead.
    fn gather<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        wanted: usize,
        room: &mut Room<'m>,
        used: &mut Vec<Used>,
    ) -> io::Result<bool> {
        while room.capacity < wanted && !self.is_all_there_can_be(room) {
            let Some(chain) = self.ring.next(memory)? else {
                break;
            };
            let head = chain.head_index();
            match Place::new(memory, chain) {
                Some(place) if room.pieces + place.pieces().count() <= MOST_PIECES => {
                    room.push(place);
                }
                None if room.places.is_empty() => {
                    count(&self.counters.useless);
                    used.push((head, 0));
                    return Ok(false);
                }
                // It stays first in line, so that what is put back lies together.
                _ => {
                    self.ring.put_back(1);
                    room.closed = true;
                }
            }
        }
        Ok(true)
    }

    fn is_all_there_can_be(&self, room: &Room<'_>) -> bool {
        room.closed
            || room.places.len() >= usize::from(self.ring.queue.size())
            || (!self.wishes.mergeable && !room.places.is_empty())
    }
}

/// Takes out what a packet of `length` bytes fills, and says in its header how many buffers that is.
fn finish(room: &mut Room<'_>, length: usize, flags: bool, used: &mut Vec<Used>) {
    let mut header = Span::default();
    let mut left = length;
    let mut buffers = 0_u16;
    while left > 0
        && let Some(place) = room.pop()
    {
        let part = left.min(place.capacity);
        used.push((place.head, part));
        left -= part;
        if buffers == 0 {
            header = place.header;
        }
        // At most a queue's worth.
        buffers = buffers.saturating_add(1);
    }
    if let Some(number) = header.take_back(2) {
        number.copy_from(&buffers.to_le_bytes());
    }
    if !flags {
        // Section 5.1.6.3.1: all zero unless the driver can make something of them.
        header.copy_from(&[0]);
    }
}
