//! One queue of packets: taking chains, giving many back at once, telling the driver once for them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::{ActiveQueue, Interrupt};

/// Offset of the used and available rings' entries, after flags and index (Virtio 1.2, section 2.7.6).
const ENTRIES: u64 = 4;
const INDEX: u64 = 2;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// A chain's head, and how many bytes of it were written.
pub type Used = (u16, usize);

/// A queue.
#[derive(Debug)]
pub struct Ring {
    pub queue: Queue,
    pub kick: EventFd,
    pub interrupt: Arc<dyn Interrupt>,
    /// The used index when the driver was last told, or thought not to care.
    told: u16,
}

impl Ring {
    pub fn new(active: ActiveQueue, event_idx: bool) -> Self {
        let ActiveQueue {
            mut queue,
            kick,
            interrupt,
            ..
        } = active;
        queue.set_event_idx(event_idx);
        Self {
            told: queue.next_used(),
            queue,
            kick,
            interrupt,
        }
    }

    /// Takes the next chain. If there is none, the driver notifies of its next one.
    pub fn next<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> io::Result<Option<DescriptorChain<&'m GuestMemoryMmap>>> {
        // The second look is for a chain that came between the first and the driver's being told to notify.
        for _ in 0..2 {
            let mut chains = self.queue.iter(memory).map_err(io::Error::other)?;
            if let Some(chain) = chains.next() {
                return Ok(Some(chain));
            }
            if !self
                .queue
                .enable_notification(memory)
                .map_err(io::Error::other)?
            {
                return Ok(None);
            }
        }
        Err(io::Error::other("the available ring can't be read"))
    }

    /// Puts the last `count` chains back where they were taken from.
    pub fn put_back(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Gives chains back, all at once: a driver that finds the first buffer of a packet finds all of them
    /// (section 5.1.6.4.2), which one call of `Queue::add_used` for each would not do.
    pub fn give_back(&mut self, memory: &GuestMemoryMmap, chains: &[Used]) -> io::Result<()> {
        if chains.is_empty() {
            return Ok(());
        }
        let (ring, size) = (self.queue.used_ring(), self.queue.size());
        let mut index = self.queue.next_used();
        for (head, written) in chains {
            if *head >= size {
                return Err(io::Error::other("a chain's head is not in the table"));
            }
            let written = u32::try_from(*written).unwrap_or(u32::MAX);
            let entry = u64::from(*head) | u64::from(written) << 32;
            let at = ENTRIES + USED_ENTRY * u64::from(index % size);
            // All of the ring is in RAM, so the address does not wrap.
            memory
                .write_obj(entry.to_le(), GuestAddress(ring + at))
                .map_err(io::Error::other)?;
            index = index.wrapping_add(1);
        }
        self.queue.set_next_used(index);
        memory
            .store(index.to_le(), GuestAddress(ring + INDEX), Ordering::Release)
            .map_err(io::Error::other)
    }

    /// Tells the driver of what was given back, if it wants to know (sections 2.7.7 and 2.7.10).
    pub fn tell_driver(&mut self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let index = self.queue.next_used();
        if index == self.told {
            return Ok(());
        }
        // What was given back is seen before what the driver wants is looked at.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let load = |offset: u64| {
            memory
                .load::<u16>(GuestAddress(ring + offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(io::Error::other)
        };
        let wanted = if self.queue.event_idx_enabled() {
            let event = load(ENTRIES + AVAILABLE_ENTRY * u64::from(self.queue.size()))?;
            let since_event = index.wrapping_sub(event).wrapping_sub(1);
            since_event < index.wrapping_sub(self.told)
        } else {
            load(0)? & NO_INTERRUPT == 0
        };
        self.told = index;
        if wanted {
            self.interrupt.signal()
        } else {
            Ok(())
        }
    }

    /// Goes on where somebody else has left off: at `next_available`, and where the used ring says.
    pub fn resume(&mut self, memory: &GuestMemoryMmap, next_available: u16) -> io::Result<()> {
        let used = self
            .queue
            .used_idx(memory, Ordering::Acquire)
            .map_err(io::Error::other)?
            .0;
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(used);
        self.told = used;
        Ok(())
    }
}
