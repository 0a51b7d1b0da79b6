//! Whether an interface has a tap, as the device, its thread and the supervisor's requests share it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::tap::{Backend, Tap};
use crate::control::PlugRefused;

/// The link of one device. Up: it has a tap.
#[derive(Debug)]
pub(super) struct Link {
    tap: Mutex<Option<Arc<dyn Backend>>>,
    /// How often the link has gone up or down, modulo 256.
    changes: AtomicU8,
    /// Readable when a tap has come.
    bell: EventFd,
}

impl Link {
    /// One that is down.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            tap: Mutex::new(None),
            changes: AtomicU8::new(0),
            bell: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    pub(super) fn is_up(&self) -> bool {
        self.lock().is_some()
    }

    pub(super) fn changes(&self) -> u8 {
        self.changes.load(Ordering::SeqCst)
    }

    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    pub(super) fn tap(&self) -> Option<Arc<dyn Backend>> {
        self.lock().clone()
    }

    /// Brings the link up.
    ///
    /// # Errors
    /// When it is up.
    pub(super) fn plug(&self, tap: Arc<dyn Backend>) -> Result<(), PlugRefused> {
        let mut place = self.lock();
        if place.is_some() {
            return Err(PlugRefused::Plugged);
        }
        *place = Some(tap);
        self.changes.fetch_add(1, Ordering::SeqCst);
        // A counter that is full is readable, which is all that matters.
        let _ = self.bell.write(1);
        Ok(())
    }

    /// Brings the link down.
    pub(super) fn unplug(&self) {
        if self.lock().take().is_some() {
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Backend>>> {
        self.tap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Plugs a tap into a device.
#[derive(Debug, Clone)]
pub struct NetHandle(Arc<Link>);

impl NetHandle {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self(link)
    }

    /// Brings the link up, now or when there is a driver to see it.
    ///
    /// # Errors
    /// When it is up already, or the tap is no usable descriptor.
    pub fn plug(&self, tap: OwnedFd) -> Result<(), PlugRefused> {
        let tap = Tap::new(tap).map_err(|_| PlugRefused::Unusable)?;
        self.0.plug(Arc::new(tap))
    }
}
