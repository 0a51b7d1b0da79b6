//! One queue of packets: taking buffers, giving them back, telling the driver once for many.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::VolatileSlice;

use super::packet::{self, Buffer, HEADER_SIZE, Header};
use crate::memory::GuestRam;
use crate::virtio::device::{Interrupt, QueuePosition};

/// Most buffers that one read from a socket fills.
const MAX_BATCH: usize = 32;

/// The driver broke the rules of a ring, or the transport can't interrupt it.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    #[error("a ring of the driver is invalid")]
    Invalid(#[from] virtio_queue::Error),
    #[error("the available ring can't be read")]
    Unreadable,
    #[error("interrupting the guest")]
    Interrupt(#[source] std::io::Error),
}

/// A queue.
#[derive(Debug)]
pub(super) struct Ring {
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
    /// Buffers were given back since the driver was last told.
    untold: bool,
}

/// A buffer of the guest for one packet.
#[derive(Debug)]
pub(super) struct Place<'m> {
    descriptor: u16,
    header: Vec<VolatileSlice<'m>>,
    data: Vec<VolatileSlice<'m>>,
}

impl Place<'_> {
    fn capacity(&self) -> usize {
        packet::total(&self.data)
    }
}

impl Ring {
    pub(super) fn new(queue: Queue, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            queue,
            interrupt,
            untold: false,
        }
    }

    /// Where the device is in it, as queue `index`.
    pub(super) fn position(&self, index: u16) -> QueuePosition {
        QueuePosition::of(index, &self.queue)
    }

    /// Takes the next buffer. If there is none, the driver notifies of its next one.
    pub(super) fn next<'m>(
        &mut self,
        memory: &'m GuestRam,
    ) -> Result<Option<DescriptorChain<&'m GuestRam>>, RingError> {
        // The second look is for a buffer that came between the first and the driver's being told to notify.
        for _ in 0..2 {
            if let Some(chain) = self.queue.iter(memory)?.next() {
                return Ok(Some(chain));
            }
            if !self.queue.enable_notification(memory)? {
                return Ok(None);
            }
        }
        Err(RingError::Unreadable)
    }

    /// Gives a buffer back, with so many bytes written.
    pub(super) fn give_back(
        &mut self,
        memory: &GuestRam,
        descriptor: u16,
        written: usize,
    ) -> Result<(), RingError> {
        self.untold = true;
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        Ok(self.queue.add_used(memory, descriptor, written)?)
    }

    /// Tells the driver of the buffers given back, if it wants to know.
    pub(super) fn tell_driver(&mut self, memory: &GuestRam) -> Result<(), RingError> {
        if std::mem::take(&mut self.untold) && self.queue.needs_notification(memory)? {
            self.interrupt.signal().map_err(RingError::Interrupt)?;
        }
        Ok(())
    }

    /// Takes a place for a packet. `None` when the guest has no buffer posted.
    pub(super) fn take_place<'m>(
        &mut self,
        memory: &'m GuestRam,
    ) -> Result<Option<Place<'m>>, RingError> {
        while let Some(chain) = self.next(memory)? {
            let descriptor = chain.head_index();
            if let Some(place) = place(memory, chain) {
                return Ok(Some(place));
            }
            self.give_back(memory, descriptor, 0)?;
        }
        Ok(None)
    }

    /// Takes places for `length` bytes of data, or for as many as there are and fit one batch.
    pub(super) fn take_places<'m>(
        &mut self,
        memory: &'m GuestRam,
        length: usize,
    ) -> Result<Vec<Place<'m>>, RingError> {
        let (mut places, mut capacity) = (Vec::new(), 0_usize);
        while capacity < length && places.len() < MAX_BATCH {
            let Some(chain) = self.next(memory)? else {
                break;
            };
            let descriptor = chain.head_index();
            match place(memory, chain) {
                Some(place) if place.capacity() > 0 => {
                    capacity = capacity.saturating_add(place.capacity());
                    places.push(place);
                }
                // Of no use for data. First in line it is given back; later it waits, so that what is put
                // back lies together.
                _ if places.is_empty() => self.give_back(memory, descriptor, 0)?,
                _ => {
                    self.put_back(1);
                    break;
                }
            }
        }
        Ok(places)
    }

    /// Puts the last `count` buffers back where they were taken from.
    pub(super) fn put_back(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Writes a packet without data.
    pub(super) fn fill(
        &mut self,
        memory: &GuestRam,
        place: &Place<'_>,
        header: Header,
    ) -> Result<(), RingError> {
        packet::write_header(&place.header, header);
        self.give_back(memory, place.descriptor, HEADER_SIZE)
    }

    /// Writes the headers of packets whose `length` bytes of data lie in `places`, and puts back the places that
    /// were not needed. `header` makes a header for so many bytes.
    pub(super) fn fill_all(
        &mut self,
        memory: &GuestRam,
        places: &[Place<'_>],
        length: usize,
        mut header: impl FnMut(u32) -> Header,
    ) -> Result<(), RingError> {
        let mut left = length;
        let mut filled = 0;
        for place in places {
            let part = left.min(place.capacity());
            if part == 0 {
                break;
            }
            packet::write_header(
                &place.header,
                header(u32::try_from(part).unwrap_or(u32::MAX)),
            );
            self.give_back(memory, place.descriptor, HEADER_SIZE + part)?;
            left -= part;
            filled += 1;
        }
        self.put_back(places.len() - filled);
        Ok(())
    }
}

/// All the room for data in some places, in order.
pub(super) fn data<'m>(places: &[Place<'m>]) -> Vec<VolatileSlice<'m>> {
    places
        .iter()
        .flat_map(|place| place.data.iter().cloned())
        .collect()
}

fn place<'m>(memory: &'m GuestRam, chain: DescriptorChain<&'m GuestRam>) -> Option<Place<'m>> {
    let descriptor = chain.head_index();
    let (header, data) = Buffer::new(memory, chain, true)?.split()?;
    Some(Place {
        descriptor,
        header,
        data,
    })
}
