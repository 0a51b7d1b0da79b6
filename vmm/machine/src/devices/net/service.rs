//! The device's thread: gives the queues and the tap their turns.

use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::link::Link;
use super::receive::{Next, Receive};
use super::tap::Backend;
use super::transmit::Transmit;
use crate::devices::worker::{Events, Handler, Readiness, borrow};
use crate::virtio::device::{Activation, Interrupt};

/// Names of the sources; the first two are the queues' numbers, too.
pub(crate) const RECEIVE: u64 = 0;
pub(crate) const TRANSMIT: u64 = 1;
const TAP: u64 = 2;
const BELL: u64 = 3;

/// What the thread owns.
#[derive(Debug)]
pub(crate) struct Service {
    memory: GuestMemoryMmap,
    features: u64,
    config_interrupt: Arc<dyn Interrupt>,
    link: Arc<Link>,
    tap: Option<Arc<dyn Backend>>,
    /// Packets are waited for; not while one waits for buffers.
    watching: bool,
    receive: Receive,
    transmit: Transmit,
}

impl Service {
    pub(super) fn new(activation: Activation, link: Arc<Link>) -> io::Result<Self> {
        let mut queues = activation.queues.into_iter();
        let (Some(receive), Some(transmit)) = (
            queues
                .next()
                .filter(|queue| u64::from(queue.index) == RECEIVE),
            queues
                .next()
                .filter(|queue| u64::from(queue.index) == TRANSMIT),
        ) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the network driver left out a queue",
            ));
        };
        let features = activation.features;
        Ok(Self {
            memory: activation.memory,
            features,
            config_interrupt: activation.config_interrupt,
            link,
            tap: None,
            watching: false,
            receive: Receive::new(receive, features),
            transmit: Transmit::new(transmit, features),
        })
    }

    /// Takes the tap that the link has, if it is new. Returns whether it is.
    fn take_tap(&mut self, events: &Events) -> io::Result<bool> {
        if self.tap.is_some() {
            return Ok(false);
        }
        let Some(tap) = self.link.tap() else {
            return Ok(false);
        };
        if let Err(error) = tap.configure(self.features) {
            log::warn!("net: the tap can't be set up for the driver: {error}");
            self.link.unplug();
            return Ok(true);
        }
        events.add(&tap, TAP, Readiness::IN)?;
        self.watching = true;
        self.tap = Some(tap);
        Ok(true)
    }

    fn lose_tap(&mut self, events: &Events) -> io::Result<()> {
        if let Some(tap) = self.tap.take() {
            events.remove(&tap)?;
            self.watching = false;
            self.link.unplug();
            self.config_interrupt.signal()?;
        }
        Ok(())
    }

    fn receive(&mut self, events: &Events) -> io::Result<()> {
        let next = self.receive.run(&self.memory, self.tap.as_deref())?;
        if next == Next::Gone {
            return self.lose_tap(events);
        }
        let watch = next == Next::Packet;
        if let Some(tap) = &self.tap
            && watch != self.watching
        {
            let readiness = if watch {
                Readiness::IN
            } else {
                Readiness::empty()
            };
            events.modify(tap, TAP, readiness)?;
            self.watching = watch;
        }
        Ok(())
    }
}

impl Handler for Service {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.receive.queue().kick), RECEIVE, Readiness::IN)?;
        events.add(borrow(&self.transmit.queue().kick), TRANSMIT, Readiness::IN)?;
        events.add(borrow(self.link.bell()), BELL, Readiness::IN)?;
        self.take_tap(events)?;
        Ok(())
    }

    fn ready(&mut self, events: &Events, token: u64, readiness: Readiness) -> io::Result<()> {
        match token {
            RECEIVE => {
                // Before the buffers are looked at; one that was read already does no harm.
                drop(self.receive.queue().kick.read());
                self.receive(events)
            }
            TRANSMIT => self.transmit.run(&self.memory, self.tap.as_deref()),
            // These come whether they are waited for or not, and again and again.
            TAP if readiness.intersects(Readiness::ERR | Readiness::HUP) => {
                log::warn!("net: the tap is gone");
                self.lose_tap(events)
            }
            TAP => self.receive(events),
            _ => {
                drop(self.link.bell().read());
                if self.take_tap(events)? {
                    self.config_interrupt.signal()?;
                }
                Ok(())
            }
        }
    }
}
