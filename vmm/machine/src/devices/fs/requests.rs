//! One queue of requests, served by several threads at once.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::mapping::FileServerMemory;
use super::message;
use super::server::MessageServer;
use crate::memory::GuestRam;
use crate::virtio::device::{ActiveQueue, Interrupt, QueuePosition};

/// A queue, shared by the threads of a pool.
#[derive(Debug)]
pub(super) struct RequestQueue {
    index: u16,
    ring: Mutex<Ring>,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    memory: GuestRam,
    file_server_memory: Arc<FileServerMemory>,
}

/// What only one thread may touch at a time.
#[derive(Debug)]
struct Ring {
    queue: Queue,
    /// Requests taken and not yet given back. A driver that lies about its ring could offer the same
    /// descriptors again and again (CVE-2016-5403), so they are counted, and never more than the queue has entries.
    under_way: u16,
    /// The driver broke the rules of the ring: nothing more is taken from it until the device is reset.
    broken: bool,
}

/// What a thread finds in a queue.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    chain: DescriptorChain<&'a GuestRam>,
    /// There is more to be taken.
    pub(super) more: bool,
}

impl RequestQueue {
    pub(super) fn new(
        active: ActiveQueue,
        memory: GuestRam,
        file_server_memory: Arc<FileServerMemory>,
    ) -> Self {
        Self {
            index: active.index,
            ring: Mutex::new(Ring {
                queue: active.queue,
                under_way: 0,
                broken: false,
            }),
            kick: active.kick,
            interrupt: active.interrupt,
            memory,
            file_server_memory,
        }
    }

    /// Readable when the driver has something for this queue.
    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Where the pool is, when none of its threads serves any more.
    pub(super) fn position(&self) -> QueuePosition {
        QueuePosition::of(self.index, &self.ring().queue)
    }

    /// Takes a request. With none there, the driver's next one will be notified.
    pub(super) fn take(&self) -> Option<Taken<'_>> {
        let mut ring = self.ring();
        if ring.broken || ring.under_way >= ring.queue.size() {
            return None;
        }
        ring.take(&self.memory).unwrap_or_else(|error| {
            ring.broken = true;
            log::warn!(
                "virtio-fs: queue {} is out of order and stops: {error}",
                self.index
            );
            None
        })
    }

    /// Serves a request and gives it back. Returns whether the queue, which was full of requests under way,
    /// has more for another thread.
    pub(super) fn serve(&self, taken: &Taken<'_>, server: &dyn MessageServer) -> bool {
        let length = message::serve(&taken.chain, &self.file_server_memory, server);
        let mut ring = self.ring();
        let was_full = ring.under_way >= ring.queue.size();
        ring.under_way -= 1;
        let head = taken.chain.head_index();
        let notify = ring
            .queue
            .add_used(&self.memory, head, length)
            .and_then(|()| ring.queue.needs_notification(&self.memory))
            .unwrap_or_else(|error| {
                ring.broken = true;
                log::warn!(
                    "virtio-fs: queue {} is out of order and stops: {error}",
                    self.index
                );
                false
            });
        drop(ring);
        if notify && let Err(error) = self.interrupt.signal() {
            log::warn!(
                "virtio-fs: queue {}: interrupting the guest: {error}",
                self.index
            );
        }
        was_full
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn take<'a>(&mut self, memory: &'a GuestRam) -> io::Result<Option<Taken<'a>>> {
        // The second look is for a request that came between the first and the driver's being told to notify.
        for _ in 0..2 {
            let chain = self.queue.iter(memory).map_err(io::Error::other)?.next();
            let more = self
                .queue
                .enable_notification(memory)
                .map_err(io::Error::other)?;
            match chain {
                Some(chain) => {
                    self.under_way += 1;
                    return Ok(Some(Taken { chain, more }));
                }
                None if more => {}
                None => return Ok(None),
            }
        }
        Err(io::Error::other("the available ring can't be read"))
    }
}
