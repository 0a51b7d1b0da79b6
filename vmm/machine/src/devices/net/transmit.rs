//! Packets of the guest: checked, and sent straight from its buffers (Virtio 1.2, section 5.1.6.2).

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::DescriptorChain;

use super::PACKETS;
use super::counters::{Counters, count};
use super::header;
use super::limits::Limiter;
use super::ring::{Ring, Used};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Buffers, Span};

/// Packets in one go.
const BUDGET: usize = 64;
/// What there is to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The driver has packets; or still has.
    Driver,
    /// The tap takes packets again.
    Tap,
    /// The limits let packets through.
    Until(Instant),
}

/// The queue from the guest.
#[derive(Debug)]
pub struct Transmit {
    pub ring: Ring,
    pub limiter: Limiter,
    negotiated: u64,
    counters: Arc<Counters>,
}

impl Transmit {
    pub fn new(ring: Ring, limiter: Limiter, negotiated: u64, counters: Arc<Counters>) -> Self {
        Self {
            ring,
            limiter,
            negotiated,
            counters,
        }
    }

    /// Sends packets until there is something to wait for, or enough were sent: the queue's own kick is
    /// written then. Without a tap they go nowhere, as on a cable that is not plugged in.
    ///
    /// # Errors
    /// When the queue is broken: nothing more can be made of it until the driver resets the device.
    pub fn run(&mut self, memory: &GuestRam, tap: Option<BorrowedFd<'_>>) -> io::Result<Pause> {
        let mut used = Vec::new();
        let pause = self.send(memory, tap, &mut used)?;
        self.ring.give_back(memory, &used)?;
        self.ring.tell_driver(memory)?;
        Ok(pause)
    }

    fn send(
        &mut self,
        memory: &GuestRam,
        tap: Option<BorrowedFd<'_>>,
        used: &mut Vec<Used>,
    ) -> io::Result<Pause> {
        for _ in 0..BUDGET {
            if tap.is_some()
                && let Some(due) = self.limiter.pause()
            {
                return Ok(Pause::Until(due));
            }
            let Some(chain) = self.ring.next(memory)? else {
                return Ok(Pause::Driver);
            };
            let head = chain.head_index();
            match (self.packet(memory, chain), tap) {
                (None, _) => count(&self.counters.malformed),
                (Some(_), None) => count(&self.counters.unsent),
                (Some((header, frame)), Some(tap)) => {
                    match super::tap::send(tap, &header, &frame) {
                        Ok(()) => self.limiter.charge(frame.len()),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.ring.put_back(1);
                            return Ok(Pause::Tap);
                        }
                        // The kernel has its own ideas of packets, and a tap that is down takes none.
                        Err(_) => count(&self.counters.unsent),
                    }
                }
            }
            used.push((head, 0));
        }
        self.ring.kick.write(1)?;
        Ok(Pause::Driver)
    }

    /// A packet's header for the host's kernel, and its frame; if it is one.
    fn packet<'m>(
        &self,
        memory: &'m GuestRam,
        chain: DescriptorChain<&'m GuestRam>,
    ) -> Option<([u8; header::SIZE], Span<'m>)> {
        let Buffers {
            mut readable,
            writable,
        } = Buffers::resolve(memory, chain, PACKETS.into()).ok()?;
        if !writable.is_empty() {
            return None;
        }
        // A copy, so that what is checked is what is sent.
        let header = readable.take_array()?;
        let header = header::check(header, readable.len(), self.negotiated)
            .inspect_err(|error| log::debug!("a packet of the guest's is dropped: {error}"))
            .ok()?;
        Some((header, readable))
    }
}
