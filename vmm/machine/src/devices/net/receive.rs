//! Packets to the guest: from the tap into the driver's buffers (Virtio 1.2, section 5.1.6.4).
//!
//! A packet is read into a buffer here, and copied. Only then is it known how many of the driver's buffers it
//! takes: reading into them at once would need room for the longest packet to receive the shortest, which a
//! driver with few or small buffers may never have, and one that comes when there is none would be lost.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::QueueT;

use super::counters::{Counters, count};
use super::header::{self, ETHERNET, LONGEST_FRAME};
use super::limits::Limiter;
use super::ring::{Ring, Used};
use super::{PACKETS, features};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Buffers, Span};

/// Packets in one go.
const BUDGET: usize = 64;
/// Bytes of the longest packet with its header.
const LONGEST: usize = header::SIZE + LONGEST_FRAME;

/// What there is to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The tap has packets again; or still.
    Tap,
    /// The driver posts buffers: a packet is here.
    Buffers,
    /// The limits let packets through.
    Until(Instant),
    /// Nothing: the tap is of no more use.
    Broken,
}

/// The queue to the guest.
#[derive(Debug)]
pub struct Receive {
    pub ring: Ring,
    pub limiter: Limiter,
    negotiated: u64,
    /// The packet under way, with one byte more to tell one that is too long.
    packet: Box<[u8]>,
    /// Its bytes; 0 when there is none.
    length: usize,
    counters: Arc<Counters>,
}

/// One of the driver's buffers.
#[derive(Debug)]
struct Place<'m> {
    head: u16,
    room: Span<'m>,
}

/// The driver's next buffers, in their order.
#[derive(Debug, Default)]
struct Places<'m> {
    good: Vec<Place<'m>>,
    /// Heads of what no packet fits in.
    bad: Vec<u16>,
    room: usize,
}

impl Receive {
    pub fn new(ring: Ring, limiter: Limiter, negotiated: u64, counters: Arc<Counters>) -> Self {
        Self {
            ring,
            limiter,
            negotiated,
            packet: vec![0; LONGEST + 1].into(),
            length: 0,
            counters,
        }
    }

    /// Moves packets until there is something to wait for, or enough was moved, and tells the driver.
    ///
    /// # Errors
    /// When the queue is broken: nothing more can be made of it until the driver resets the device.
    pub fn run(&mut self, memory: &GuestRam, tap: BorrowedFd<'_>) -> io::Result<Pause> {
        let pause = self.move_packets(memory, tap)?;
        self.ring.tell_driver(memory)?;
        Ok(pause)
    }

    fn move_packets(&mut self, memory: &GuestRam, tap: BorrowedFd<'_>) -> io::Result<Pause> {
        for _ in 0..BUDGET {
            if self.length == 0 {
                if let Some(due) = self.limiter.pause() {
                    return Ok(Pause::Until(due));
                }
                match super::tap::receive(tap, &mut self.packet) {
                    // No packet is empty.
                    Ok(0) => return Ok(Pause::Broken),
                    Ok(length) => self.length = length,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Pause::Tap);
                    }
                    Err(error) => {
                        log::debug!("reading from a tap: {error}");
                        return Ok(Pause::Broken);
                    }
                }
            }
            if !self.deliver(memory)? {
                return Ok(Pause::Buffers);
            }
            self.length = 0;
        }
        Ok(Pause::Tap)
    }

    /// Copies the packet to as many buffers as it takes. False if there are too few of them yet; true if it is the
    /// driver's, or will never be.
    fn deliver(&mut self, memory: &GuestRam) -> io::Result<bool> {
        let packet = self.packet.get_mut(..self.length).unwrap_or_default();
        let length = packet.len();
        let header = packet
            .split_first_chunk_mut()
            .filter(|(_, frame)| (ETHERNET..=LONGEST_FRAME).contains(&frame.len()))
            .and_then(|(header, _)| header::make_known(header, self.negotiated).then_some(header));
        let Some(header) = header else {
            count(&self.counters.unwanted);
            return Ok(true);
        };
        let most = if self.negotiated & features::MRG_RXBUF != 0 {
            self.ring.queue.size()
        } else {
            1
        };
        let places = take_places(&mut self.ring, memory, length, most)?;
        if places.room < length {
            return self.postpone(memory, &places, most);
        }
        let buffers = u16::try_from(places.good.len()).map_err(io::Error::other)?;
        header::set_buffers(header, buffers);
        let mut used = empty(&places.bad);
        let mut rest = &*packet;
        for Place { head, room } in &places.good {
            let written = room.copy_from(rest);
            rest = &rest[written..];
            used.push((*head, written));
        }
        self.bad_buffers(&places);
        self.ring.give_back(memory, &used)?;
        self.limiter.charge(length - header::SIZE);
        Ok(true)
    }

    /// Leaves buffers that don't suffice to the next time, or the packet if there is nothing more to hope for.
    fn postpone(&mut self, memory: &GuestRam, places: &Places<'_>, most: u16) -> io::Result<bool> {
        if places.good.is_empty() {
            self.bad_buffers(places);
            self.ring.give_back(memory, &empty(&places.bad))?;
            return Ok(false);
        }
        self.ring.put_back(places.good.len() + places.bad.len());
        // As many buffers as the packet may have are too small for it, and so is all that can come.
        let hopeless = places.good.len() >= usize::from(most);
        if hopeless {
            count(&self.counters.unwanted);
        }
        Ok(hopeless)
    }

    fn bad_buffers(&self, places: &Places<'_>) {
        for _ in &places.bad {
            count(&self.counters.useless);
        }
    }
}

/// Buffers with nothing in them.
fn empty(heads: &[u16]) -> Vec<Used> {
    heads.iter().map(|head| (*head, 0)).collect()
}

/// Takes up to `most` buffers for `length` bytes. If they are too few, the driver notifies of its next one.
fn take_places<'m>(
    ring: &mut Ring,
    memory: &'m GuestRam,
    length: usize,
    most: u16,
) -> io::Result<Places<'m>> {
    let size = usize::from(ring.queue.size());
    let mut places = Places::default();
    while places.room < length && places.good.len() < usize::from(most) && places.bad.len() < size {
        // What is put back later is put back after this has looked, so that it is the next one of which the driver
        // notifies.
        let Some(chain) = ring.next(memory)? else {
            break;
        };
        let head = chain.head_index();
        match Buffers::resolve(memory, chain, PACKETS.into()) {
            // Each buffer has room for a header at least (section 5.1.6.3.1).
            Ok(Buffers { readable, writable })
                if readable.is_empty() && writable.len() >= header::SIZE =>
            {
                places.room = places.room.saturating_add(writable.len());
                places.good.push(Place {
                    head,
                    room: writable,
                });
            }
            _ => places.bad.push(head),
        }
    }
    Ok(places)
}
