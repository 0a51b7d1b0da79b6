//! What the registers, the control queue, the queue pairs and the supervisor tell each other.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::counters::Counters;
use super::segments_udp;
use super::tap::{KernelTap, Tap};
use super::vhost::VhostNet;
use crate::config::TapDescriptors;
use crate::control::PlugRefused;
use crate::virtio::device::Interrupt;

/// The host's end of a queue pair.
#[derive(Debug)]
pub struct Backend {
    pub tap: Box<dyn Tap>,
    /// Serves the pair in the kernel.
    pub vhost: Option<VhostNet>,
}

/// The backend of each of so many queue pairs.
pub fn backends(tap: TapDescriptors, pairs: usize) -> Result<Vec<Backend>, PlugRefused> {
    let TapDescriptors { queues, vhost } = tap;
    if queues.len() != pairs || !(vhost.is_empty() || vhost.len() == pairs) {
        return Err(PlugRefused::Descriptors);
    }
    let mut vhost = vhost.into_iter();
    queues
        .into_iter()
        .map(|queue| {
            let tap = KernelTap::new(queue).map_err(|error| PlugRefused::Tap {
                errno: error.raw_os_error().unwrap_or(libc::EIO),
            })?;
            Ok(Backend {
                tap: Box::new(tap),
                vhost: vhost.next().map(VhostNet::new),
            })
        })
        .collect()
}

/// The state of an interface.
#[derive(Debug)]
pub struct Link {
    pairs: usize,
    /// The address that the interface has unless its driver takes another.
    first_mac: [u8; 6],
    /// What its driver may have negotiated, so that every tap must do it.
    udp_segmentation: bool,
    state: Mutex<State>,
    /// One for each pair: something has changed that it should look at.
    bells: Vec<EventFd>,
    pub counters: Arc<Counters>,
}

#[derive(Debug)]
struct State {
    mac: [u8; 6],
    /// One for each pair; none while the link is down.
    backends: Option<Vec<Arc<Backend>>>,
    /// How many pairs the driver uses.
    in_use: usize,
    /// How often the link has gone up or down, modulo 256.
    changes: u8,
    driver: Option<Driver>,
}

/// A driver that is to hear of changes.
#[derive(Debug)]
struct Driver {
    interrupt: Arc<dyn Interrupt>,
    /// The change up to which the driver knows.
    told: u8,
    /// The change up to which each pair's thread has gone along. Only when all have may the driver hear of it: packets
    /// that it sends at once would be lost.
    followed: Vec<u8>,
}

impl Link {
    pub fn new(
        mac: [u8; 6],
        pairs: usize,
        udp_segmentation: bool,
        backends: Option<Vec<Backend>>,
    ) -> io::Result<Self> {
        let bells = (0..pairs)
            .map(|_| EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            pairs,
            first_mac: mac,
            udp_segmentation,
            state: Mutex::new(State {
                mac,
                backends: backends.map(shared),
                in_use: 1,
                changes: 0,
                driver: None,
            }),
            bells,
            counters: Arc::default(),
        })
    }

    pub fn mac(&self) -> [u8; 6] {
        self.state().mac
    }

    pub fn set_mac(&self, mac: [u8; 6]) {
        self.state().mac = mac;
    }

    pub fn is_up(&self) -> bool {
        self.state().backends.is_some()
    }

    pub fn changes(&self) -> u8 {
        self.state().changes
    }

    /// Rings for a pair.
    pub fn bell(&self, pair: usize) -> Option<&EventFd> {
        self.bells.get(pair)
    }

    /// What serves a pair, if the driver uses that and the link is up; and the change that made it so.
    pub fn backend(&self, pair: usize) -> (Option<Arc<Backend>>, u8) {
        let state = self.state();
        let backend = state
            .backends
            .as_ref()
            .and_then(|backends| backends.get(pair))
            .filter(|_| pair < state.in_use);
        (backend.cloned(), state.changes)
    }

    /// A driver is there, has set up so many pairs, and uses one. It hears of changes by `interrupt`.
    pub fn driver_up(&self, pairs: usize, interrupt: Arc<dyn Interrupt>) {
        let mut state = self.state();
        state.in_use = 1;
        state.driver = Some(Driver {
            interrupt,
            told: state.changes,
            followed: vec![state.changes; pairs],
        });
    }

    /// The driver that was there before the device was suspended goes on: it uses so many pairs, and thinks that the
    /// link is `up`.
    pub fn driver_resumed(&self, in_use: usize, up: bool) {
        let mut state = self.state();
        let changed = up != state.backends.is_some();
        let changes = state.changes;
        if let Some(driver) = &mut state.driver {
            driver.told = if changed {
                changes.wrapping_sub(1)
            } else {
                changes
            };
            // Each pair's thread says once more that it has gone along.
            driver.followed.fill(changes.wrapping_sub(1));
            state.in_use = in_use.clamp(1, self.pairs);
        }
    }

    /// It is suspended: its pairs in use, and whether the link is up.
    pub fn driver_suspended(&self) -> (usize, bool) {
        let mut state = self.state();
        state.driver = None;
        (state.in_use, state.backends.is_some())
    }

    /// It is no longer. All is for the next as it was for it.
    pub fn driver_down(&self) {
        let mut state = self.state();
        state.in_use = 1;
        state.mac = self.first_mac;
        state.driver = None;
    }

    /// A pair's thread has gone along with a change. The last one tells the driver.
    ///
    /// # Errors
    /// When the interrupt is broken.
    pub fn follow(&self, pair: usize, change: u8) -> io::Result<()> {
        let mut state = self.state();
        let changes = state.changes;
        let Some(driver) = &mut state.driver else {
            return Ok(());
        };
        if let Some(followed) = driver.followed.get_mut(pair) {
            *followed = change;
        }
        if driver.told == changes || driver.followed.iter().any(|followed| *followed != changes) {
            return Ok(());
        }
        driver.told = changes;
        driver.interrupt.signal()
    }

    /// Gives the interface its tap.
    pub fn plug(&self, backends: Vec<Backend>) -> Result<(), PlugRefused> {
        if backends.len() != self.pairs {
            return Err(PlugRefused::Descriptors);
        }
        let mut state = self.state();
        if state.backends.is_some() {
            return Err(PlugRefused::Plugged);
        }
        state.backends = Some(shared(backends));
        self.changed(state);
        Ok(())
    }

    /// The tap is gone: `backend` is the part of it that has shown that.
    pub fn lost(&self, backend: &Arc<Backend>) {
        let mut state = self.state();
        let current = state
            .backends
            .as_ref()
            .is_some_and(|backends| backends.iter().any(|one| Arc::ptr_eq(one, backend)));
        if current {
            log::warn!("a network interface has lost its tap; its link is down");
            state.backends = None;
            self.changed(state);
        }
    }

    pub fn pairs_in_use(&self) -> usize {
        self.state().in_use
    }

    /// Uses the first `pairs` pairs from now on. Called by the first pair's thread alone.
    pub fn use_pairs(&self, pairs: usize) {
        let before = std::mem::replace(&mut self.state().in_use, pairs);
        if pairs > before {
            // Packets come to the new ones before anybody looks, and wait.
            self.arrange();
        }
        self.ring_all();
        if pairs < before {
            self.arrange();
        }
    }

    /// Takes those of the tap's queues out of use whose pairs are not used. Called by the first pair's
    /// thread alone, which is there whenever there is a driver.
    pub fn arrange(&self) {
        let state = self.state();
        let in_use = state.in_use;
        let Some(backends) = state.backends.clone() else {
            return;
        };
        drop(state);
        // The only queue of a tap can't be taken out of use.
        if backends.len() == 1 {
            return;
        }
        for (pair, backend) in backends.iter().enumerate() {
            if let Err(error) = backend.tap.set_attached(pair < in_use) {
                log::warn!("queue {pair} of a tap: {error}");
            }
        }
    }

    fn changed(&self, mut state: MutexGuard<'_, State>) {
        state.changes = state.changes.wrapping_add(1);
        drop(state);
        self.ring_all();
    }

    fn ring_all(&self) {
        for bell in &self.bells {
            // A counter that is full is readable, which is all that matters.
            drop(bell.write(1));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shared(backends: Vec<Backend>) -> Vec<Arc<Backend>> {
    backends.into_iter().map(Arc::new).collect()
}

/// Plugs the tap of an interface that has none.
#[derive(Debug, Clone)]
pub struct NetHandle(pub(super) Arc<Link>);

impl NetHandle {
    /// Gives the interface its tap, and brings its link up.
    ///
    /// # Errors
    /// When it has one, or the descriptors are not what an interface with so many queue pairs needs, or the tap can't
    /// do what was offered.
    pub fn plug(&self, tap: TapDescriptors) -> Result<(), PlugRefused> {
        if self.0.is_up() {
            return Err(PlugRefused::Plugged);
        }
        let backends = backends(tap, self.0.pairs)?;
        if self.0.udp_segmentation && !backends.first().is_some_and(segments_udp) {
            return Err(PlugRefused::Tap {
                errno: libc::EOPNOTSUPP,
            });
        }
        self.0.plug(backends)
    }
}
