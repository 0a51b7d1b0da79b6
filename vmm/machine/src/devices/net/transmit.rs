//! Packets from the driver's buffers into the tap, with no copy in between.

use std::io;

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::header::{HEADER_SIZE, Header, MOST_BYTES};
use super::tap::{self, Backend};
use crate::virtio::buffers::{Buffers, ChainError, Span};
use crate::virtio::device::ActiveQueue;

/// The queue of packets from the guest.
#[derive(Debug)]
pub(super) struct Transmit {
    queue: ActiveQueue,
    features: u64,
}

impl Transmit {
    pub(super) fn new(queue: ActiveQueue, features: u64) -> Self {
        Self { queue, features }
    }

    pub(super) fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Sends what the driver has queued, up to a queue's worth. Without a tap, and when the tap has no room,
    /// packets are lost, as on any wire.
    ///
    /// # Errors
    /// When the queue is broken.
    pub(super) fn run(
        &mut self,
        memory: &GuestMemoryMmap,
        tap: Option<&dyn Backend>,
    ) -> io::Result<()> {
        let features = self.features;
        // A chain is never longer than its queue, indirect or not (Virtio 1.2, section 2.7.5.3.1).
        let most = usize::from(self.queue.queue.max_size());
        self.queue.serve(memory, most, |packet| {
            if let (Some(tap), Some((header, frame))) = (tap, check(packet, features)) {
                // One that is not taken is lost, too: the tap's interface may be down.
                let _ = tap::send(tap.as_fd(), &header, &frame);
            }
            0
        })
    }
}

/// The packet to send, if it is one. Its header is a copy, which the driver can't change any more.
fn check(
    packet: Result<Buffers<'_>, ChainError>,
    features: u64,
) -> Option<([u8; HEADER_SIZE], Span<'_>)> {
    let Buffers {
        readable: mut frame,
        writable,
    } = packet.ok()?;
    if !writable.is_empty() || frame.len() > MOST_BYTES {
        return None;
    }
    let header = Header::from_bytes(frame.take_array()?);
    let header = header.sent(frame.len(), features)?;
    Some((header.to_bytes(), frame))
}
