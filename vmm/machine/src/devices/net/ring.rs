//! One queue of packets: taking chains, giving many back at once, telling the driver once for them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::virtio::device::{ActiveQueue, Interrupt, QueuePosition};

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
    index: u16,
    pub queue: Queue,
    pub kick: EventFd,
    pub interrupt: Arc<dyn Interrupt>,
    /// The used index when the driver was last told, or thought not to care.
    told: u16,
}

impl Ring {
    pub fn new(active: ActiveQueue, event_idx: bool) -> Self {
        let ActiveQueue {
            index,
            mut queue,
            kick,
            interrupt,
        } = active;
        queue.set_event_idx(event_idx);
        Self {
            index,
            told: queue.next_used(),
            queue,
            kick,
            interrupt,
        }
    }

    /// Where the device is in it.
    pub fn position(&self) -> QueuePosition {
        QueuePosition::of(self.index, &self.queue)
    }

    /// Takes the next chain. If there is none, the driver notifies of its next one.
    pub fn next<'m>(
        &mut self,
        memory: &'m GuestRam,
    ) -> io::Result<Option<DescriptorChain<&'m GuestRam>>> {
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
    pub fn give_back(&mut self, memory: &GuestRam, chains: &[Used]) -> io::Result<()> {
        if chains.is_empty() {
            return Ok(());
        }
        let (ring, size) = (self.queue.used_ring(), self.queue.size());
        if chains.iter().any(|(head, _)| *head >= size) {
            return Err(io::Error::other("a chain's head is not in the table"));
        }
        let mut index = self.queue.next_used();
        for (head, written) in chains {
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
    pub fn tell_driver(&mut self, memory: &GuestRam) -> io::Result<()> {
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

    /// Goes on where somebody else has left off, who gives chains back in their order: where the used ring says. Chains
    /// that were taken and not given back, as the kernel does with packets for a tap that is gone, are taken again:
    /// nobody else would give them back.
    pub fn resume(&mut self, memory: &GuestRam) -> io::Result<()> {
        let used = self
            .queue
            .used_idx(memory, Ordering::Acquire)
            .map_err(io::Error::other)?
            .0;
        self.queue.set_next_avail(used);
        self.queue.set_next_used(used);
        self.told = used;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver_queue::DriverQueue;

    /// Where the driver of these tests, with a ring of 8, writes what it wants to be told of.
    const USED_EVENT: u64 = 8 * 16 + ENTRIES + 8 * AVAILABLE_ENTRY;
    const FLAGS: u64 = 8 * 16;

    fn driver(event_idx: bool) -> (GuestRam, DriverQueue, Ring) {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let driver = DriverQueue::new(&memory, 0, 8);
        let ring = Ring::new(driver.activate(0), event_idx);
        (memory, driver, ring)
    }

    fn all(driver: &mut DriverQueue) -> Vec<Used> {
        let used = std::iter::from_fn(|| driver.take_used());
        used.map(|(head, written)| (head, written.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn chains_come_back_in_order_and_round_the_ring() {
        let (memory, mut driver, mut ring) = driver(true);
        let (first, second) = (
            [(5, 10), (6, 11), (7, 12), (0, 13), (1, 14), (2, 15)],
            [(3, 16), (4, 17), (5, 18), (6, 19)],
        );

        ring.give_back(&memory, &first).unwrap();
        let came_first = all(&mut driver);
        ring.give_back(&memory, &second).unwrap();

        assert_eq!(came_first, first);
        assert_eq!(all(&mut driver), second);
    }

    #[test]
    fn with_a_head_that_is_none_nothing_comes_back() {
        let (memory, mut driver, mut ring) = driver(true);

        let refused = ring.give_back(&memory, &[(1, 0), (8, 0), (2, 0)]);

        assert!(refused.is_err());
        assert_eq!(all(&mut driver), []);
    }

    #[test]
    fn the_driver_is_told_when_what_it_waits_for_is_among_many() {
        let (memory, driver, mut ring) = driver(true);
        let mut is_told_of = |event: u16, count: u16| {
            memory
                .write_obj(event.to_le(), GuestAddress(USED_EVENT))
                .unwrap();
            let chains: Vec<_> = (0..count).map(|head| (head, 0)).collect();
            ring.give_back(&memory, &chains).unwrap();
            ring.tell_driver(&memory).unwrap();
            driver.interrupts.take()
        };

        // The first of three, the middle one, the last one, one that is past, one to come, nothing at all.
        assert!(is_told_of(0, 3));
        assert!(is_told_of(4, 3));
        assert!(is_told_of(8, 3));
        assert!(!is_told_of(8, 3));
        assert!(!is_told_of(20, 3));
        assert!(!is_told_of(15, 0));
    }

    #[test]
    fn a_driver_without_events_is_told_unless_it_says_otherwise() {
        let (memory, driver, mut ring) = driver(false);
        let mut is_told_with = |flags: u16| {
            memory.write_obj(flags, GuestAddress(FLAGS)).unwrap();
            ring.give_back(&memory, &[(1, 0)]).unwrap();
            ring.tell_driver(&memory).unwrap();
            driver.interrupts.take()
        };

        assert!(is_told_with(0));
        assert!(!is_told_with(NO_INTERRUPT));
    }
}
