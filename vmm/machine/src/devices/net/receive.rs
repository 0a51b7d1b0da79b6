//! Packets from the tap into the driver's buffers.
//!
//! A packet is read into a buffer here, and copied. Only then is it known how many of the driver's buffers it
//! takes: reading into them at once would need room for the longest packet to receive the shortest, which a
//! driver with few or small buffers may never have, and one that comes when there is none would be lost.

use std::io;

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::header::{F_MRG_RXBUF, HEADER_SIZE, Header, LEAST_FRAME, MOST_BYTES};
use super::tap::{self, Backend};
use super::used::{Told, Used, give_back};
use crate::virtio::buffers::{Buffers, Span};
use crate::virtio::device::ActiveQueue;

/// Packets moved before others have their turn.
const MOST_PACKETS: usize = 128;

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Packets.
    Packet,
    /// The driver's buffers: a packet is here.
    Buffers,
    /// Nothing: the tap is gone.
    Gone,
}

/// How the delivery of a packet went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    /// It is the driver's, or was dropped.
    Done,
    /// There are too few buffers yet.
    NoRoom,
}

/// The queue of packets to the guest.
#[derive(Debug)]
pub(super) struct Receive {
    queue: ActiveQueue,
    features: u64,
    /// The packet under way, with one byte more to tell one that is too long.
    packet: Box<[u8]>,
    /// Its bytes; 0 when there is none.
    length: usize,
    told: Told,
}

/// A buffer of the driver's.
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
    pub(super) fn new(queue: ActiveQueue, features: u64) -> Self {
        Self {
            told: Told::new(&queue.queue),
            queue,
            features,
            packet: vec![0; MOST_BYTES + 1].into(),
            length: 0,
        }
    }

    pub(super) fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Moves packets, up to a bound, and tells the driver.
    ///
    /// # Errors
    /// When the queue is broken.
    pub(super) fn run(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: Option<&dyn Backend>,
    ) -> io::Result<Next> {
        let next = self.move_packets(memory, tap)?;
        if self.told.is_news(&self.queue.queue, memory)? {
            self.queue.interrupt.signal()?;
        }
        Ok(next)
    }

    fn move_packets(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: Option<&dyn Backend>,
    ) -> io::Result<Next> {
        for _ in 0..MOST_PACKETS {
            if self.length == 0 {
                let Some(tap) = tap else {
                    return Ok(Next::Packet);
                };
                match tap::receive(tap.as_fd(), &mut self.packet) {
                    Ok(Some(length)) => self.length = length,
                    Ok(None) => return Ok(Next::Packet),
                    Err(error) => {
                        log::warn!("net: the tap gives no more packets: {error}");
                        return Ok(Next::Gone);
                    }
                }
            }
            if self.deliver(memory)? == Delivery::NoRoom {
                return Ok(Next::Buffers);
            }
            self.length = 0;
        }
        Ok(Next::Packet)
    }

    /// Copies the packet to as many buffers as it takes.
    fn deliver(&mut self, memory: &GuestMemoryMmap) -> io::Result<Delivery> {
        let packet = self.packet.get(..self.length).unwrap_or_default();
        let Some((header, frame)) = packet.split_first_chunk::<HEADER_SIZE>() else {
            return Ok(Delivery::Done);
        };
        if packet.len() > MOST_BYTES || frame.len() < LEAST_FRAME {
            return Ok(Delivery::Done);
        }
        let header = Header::from_bytes(*header);
        if header.received(1, self.features).is_none() {
            return Ok(Delivery::Done);
        }
        let merged = self.features & F_MRG_RXBUF != 0;
        let most = if merged { self.queue.queue.size() } else { 1 };
        let places = take_places(&mut self.queue, memory, packet.len(), most)?;
        let enough = places.room >= packet.len();
        if !enough {
            return self.postpone(memory, &places, most);
        }
        let count = u16::try_from(places.good.len()).map_err(io::Error::other)?;
        let Some(header) = header.received(count, self.features) else {
            return Ok(Delivery::Done);
        };
        self.packet[..HEADER_SIZE].copy_from_slice(&header.to_bytes());
        let mut used = empty(&places.bad);
        let mut rest = &self.packet[..self.length];
        for Place { head, room } in places.good {
            let written = room.copy_from(rest);
            rest = &rest[written..];
            used.push((head, u32::try_from(written).map_err(io::Error::other)?));
        }
        give_back(&mut self.queue.queue, memory, &used)?;
        Ok(Delivery::Done)
    }

    /// Leaves buffers that don't suffice to the next time, or the packet if there is nothing more to hope for.
    fn postpone(
        &mut self,
        memory: &GuestMemoryMmap,
        places: &Places<'_>,
        most: u16,
    ) -> io::Result<Delivery> {
        if places.good.is_empty() {
            give_back(&mut self.queue.queue, memory, &empty(&places.bad))?;
            return Ok(Delivery::NoRoom);
        }
        for _ in 0..places.good.len() + places.bad.len() {
            self.queue.queue.go_to_previous_position();
        }
        // As many buffers as the packet may have are too small for it, and so is all that can come.
        if places.good.len() >= usize::from(most) {
            Ok(Delivery::Done)
        } else {
            Ok(Delivery::NoRoom)
        }
    }
}

/// Buffers with nothing in them.
fn empty(heads: &[u16]) -> Vec<Used> {
    heads.iter().map(|head| (*head, 0)).collect()
}

/// Takes up to `most` buffers for `length` bytes. If they are too few, the driver notifies of its next one.
fn take_places<'m>(
    active: &mut ActiveQueue,
    memory: &'m GuestMemoryMmap,
    length: usize,
    most: u16,
) -> io::Result<Places<'m>> {
    let queue = &mut active.queue;
    let descriptors = usize::from(queue.max_size());
    let mut places = Places::default();
    // No more than a queue's worth, and for each a second look: it may have come between the first and the
    // driver's being told to notify.
    let mut looks = 2 * usize::from(queue.size());
    while places.room < length && places.good.len() < usize::from(most) && looks > 0 {
        looks -= 1;
        let Some(chain) = queue.iter(memory).map_err(io::Error::other)?.next() else {
            // Before anything is put back, so that it is the next one which the driver notifies of.
            if queue
                .enable_notification(memory)
                .map_err(io::Error::other)?
            {
                continue;
            }
            break;
        };
        let head = chain.head_index();
        match Buffers::resolve(memory, chain, descriptors) {
            // Each buffer has room for a header at least (section 5.1.6.3.1).
            Ok(Buffers { readable, writable })
                if readable.is_empty() && writable.len() >= HEADER_SIZE =>
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
