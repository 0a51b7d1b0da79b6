//! Gives buffers back to the driver, many at once.
//!
//! `Queue::add_used` shows the driver each by itself. One that looks meanwhile would find the first buffers of a
//! packet without the rest, and take it for broken.

use std::io;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Flags and index before a ring's entries, and bytes of an entry of either (Virtio 1.2, section 2.7).
const RING_HEADER: u64 = 4;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// What the driver was last told of.
#[derive(Debug)]
pub(super) struct Told(Wrapping<u16>);

/// A chain's head, and how many bytes were written to it.
pub(super) type Used = (u16, u32);

/// Gives all of these back; the driver sees all or none.
///
/// # Errors
/// When a head is none; nothing is given back then.
pub(super) fn give_back(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    buffers: &[Used],
) -> io::Result<()> {
    let Some(((head, written), before)) = buffers.split_last() else {
        return Ok(());
    };
    if buffers.iter().any(|(head, _)| *head >= queue.size()) {
        return Err(io::Error::other(
            virtio_queue::Error::InvalidDescriptorIndex,
        ));
    }
    let mut next = queue.next_used();
    for (head, written) in before {
        let slot = u64::from(next % queue.size());
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
        entry[4..].copy_from_slice(&written.to_le_bytes());
        let address = queue
            .used_ring()
            .checked_add(RING_HEADER + USED_ENTRY * slot)
            .ok_or_else(|| io::Error::other(virtio_queue::Error::AddressOverflow))?;
        memory
            .write_slice(&entry, GuestAddress(address))
            .map_err(io::Error::other)?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    // The last one brings the index up to date, and it is the index that the driver looks at.
    queue
        .add_used(memory, *head, *written)
        .map_err(io::Error::other)
}

impl Told {
    pub(super) fn new(queue: &Queue) -> Self {
        Self(Wrapping(queue.next_used()))
    }

    /// Whether to interrupt the driver for what was given back since the last call, less than 2^16 buffers
    /// (section 2.7.10). `Queue::needs_notification` knows of the last buffer of each packet only.
    ///
    /// # Errors
    /// When the available ring can't be read.
    pub(super) fn is_news(&mut self, queue: &Queue, memory: &GuestMemoryMmap) -> io::Result<bool> {
        let new = Wrapping(queue.next_used());
        let old = std::mem::replace(&mut self.0, new);
        if new == old || !queue.event_idx_enabled() {
            return Ok(new != old);
        }
        // The driver writes its wish, then looks at the index: here it is the other way round.
        fence(Ordering::SeqCst);
        let address = queue
            .avail_ring()
            .checked_add(RING_HEADER + AVAILABLE_ENTRY * u64::from(queue.size()))
            .ok_or_else(|| io::Error::other(virtio_queue::Error::AddressOverflow))?;
        let event: u16 = memory
            .load(GuestAddress(address), Ordering::Relaxed)
            .map_err(io::Error::other)?;
        Ok(new - Wrapping(u16::from_le(event)) - Wrapping(1) < new - old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver_queue::DriverQueue;

    /// Where the driver of these tests, with a ring of 8, writes what it wants to be told of.
    const USED_EVENT: u64 = 8 * 16 + 4 + 8 * 2;

    fn driver() -> (GuestMemoryMmap, DriverQueue, Queue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let driver = DriverQueue::new(&memory, 0, 8);
        let mut queue = driver.queue();
        queue.set_event_idx(true);
        (memory, driver, queue)
    }

    fn all(driver: &mut DriverQueue) -> Vec<Used> {
        std::iter::from_fn(|| driver.take_used()).collect()
    }

    #[test]
    fn buffers_come_back_in_order_and_round_the_ring() {
        let (memory, mut driver, mut queue) = driver();
        let (first, second) = (
            [(5, 10), (6, 11), (7, 12), (0, 13), (1, 14), (2, 15)],
            [(3, 16), (4, 17), (5, 18), (6, 19)],
        );

        give_back(&mut queue, &memory, &first).unwrap();
        assert_eq!(all(&mut driver), first);
        give_back(&mut queue, &memory, &second).unwrap();

        assert_eq!(all(&mut driver), second);
    }

    #[test]
    fn with_a_head_that_is_none_nothing_comes_back() {
        let (memory, mut driver, mut queue) = driver();

        let refused = give_back(&mut queue, &memory, &[(1, 0), (8, 0), (2, 0)]);

        assert!(refused.is_err());
        assert_eq!(all(&mut driver), []);
    }

    #[test]
    fn the_driver_is_told_when_what_it_waits_for_is_among_many() {
        let (memory, _driver, mut queue) = driver();
        let mut told = Told::new(&queue);
        let mut news_of = |event: u16, count: u16| {
            memory
                .write_obj(event.to_le(), GuestAddress(USED_EVENT))
                .unwrap();
            let buffers: Vec<_> = (0..count).map(|head| (head, 0)).collect();
            give_back(&mut queue, &memory, &buffers).unwrap();
            told.is_news(&queue, &memory).unwrap()
        };

        // The first of three, the middle one, the last one, one that is past, one to come, nothing at all.
        assert!(news_of(0, 3));
        assert!(news_of(4, 3));
        assert!(news_of(8, 3));
        assert!(!news_of(8, 3));
        assert!(!news_of(20, 3));
        assert!(!news_of(15, 0));
    }
}
