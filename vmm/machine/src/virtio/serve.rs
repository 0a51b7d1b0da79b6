//! Takes requests off a queue, has them answered, and tells the driver.

use std::io;

use virtio_queue::{QueueOwnedT, QueueT};

use super::buffers::{Buffers, ChainError};
use super::device::ActiveQueue;
use crate::memory::GuestRam;

impl ActiveQueue {
    /// Answers what the driver has made available: `answer` gets the buffers of each request
    /// (of at most `most` descriptors) and returns how many bytes it has written to them.
    ///
    /// At most one queue's worth of requests is answered; if there are more the queue's own
    /// kick is written, so that a driver that never stops can't hold the thread here.
    ///
    /// # Errors
    /// When the queue is broken: nothing more can be made of it until the driver resets the device.
    pub fn serve(
        &mut self,
        memory: &GuestRam,
        most: usize,
        mut answer: impl FnMut(Result<Buffers<'_>, ChainError>) -> u32,
    ) -> io::Result<()> {
        // A kick that was read already, or is still to come, does no harm.
        drop(self.kick.read());
        let mut budget = self.queue.size();
        loop {
            self.queue
                .disable_notification(memory)
                .map_err(io::Error::other)?;
            while budget > 0 {
                let Some(chain) = self.queue.iter(memory).map_err(io::Error::other)?.next() else {
                    break;
                };
                budget -= 1;
                let head = chain.head_index();
                let written = answer(Buffers::resolve(memory, chain, most));
                self.complete(memory, head, written)?;
            }
            let more = self
                .queue
                .enable_notification(memory)
                .map_err(io::Error::other)?;
            if !more {
                return Ok(());
            }
            if budget == 0 {
                return self.kick.write(1);
            }
        }
    }

    fn complete(&mut self, memory: &GuestRam, head: u16, written: u32) -> io::Result<()> {
        self.queue
            .add_used(memory, head, written)
            .map_err(io::Error::other)?;
        let wanted = self
            .queue
            .needs_notification(memory)
            .map_err(io::Error::other)?;
        if wanted {
            self.interrupt.signal()
        } else {
            Ok(())
        }
    }
}
