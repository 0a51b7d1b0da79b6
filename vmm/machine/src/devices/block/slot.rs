//! What is behind a disk device: a disk, or nothing until the supervisor puts one in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::disk::Disk;
use crate::control::DiskRefused;
use crate::virtio::device::Interrupt;

/// A place for a disk, which the driver sees as a disk of no sectors while it is empty.
#[derive(Debug, Default)]
pub struct Slot {
    /// Read for as long as a request is worked on: a disk that has been taken out is not written to any more.
    disk: RwLock<Option<Disk>>,
    driver: Mutex<Driver>,
}

#[derive(Debug, Default)]
struct Driver {
    /// How often the disk has been changed, modulo 256.
    changes: u8,
    /// Of the driver that is to hear of changes.
    interrupt: Option<Arc<dyn Interrupt>>,
}

impl Slot {
    pub fn with(disk: Disk) -> Self {
        Self {
            disk: RwLock::new(Some(disk)),
            driver: Mutex::default(),
        }
    }

    pub fn disk(&self) -> RwLockReadGuard<'_, Option<Disk>> {
        self.disk.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn sectors(&self) -> u64 {
        self.disk().as_ref().map_or(0, Disk::sectors)
    }

    /// Puts a disk in, and tells the driver.
    pub fn insert(&self, disk: Disk) -> Result<(), DiskRefused> {
        let mut place = self.change();
        if place.is_some() {
            return Err(DiskRefused::Occupied);
        }
        *place = Some(disk);
        drop(place);
        self.tell();
        Ok(())
    }

    /// Takes the disk out, if there is one, and tells the driver. Waits for the request that is worked on.
    pub fn eject(&self) {
        let taken = self.change().take();
        if taken.is_some() {
            self.tell();
        }
    }

    pub fn changes(&self) -> u8 {
        self.driver().changes
    }

    pub fn driver_up(&self, interrupt: Arc<dyn Interrupt>) {
        self.driver().interrupt = Some(interrupt);
    }

    pub fn driver_down(&self) {
        self.driver().interrupt = None;
    }

    /// The driver is to look at the disk again.
    pub fn tell(&self) {
        let mut driver = self.driver();
        driver.changes = driver.changes.wrapping_add(1);
        if let Some(interrupt) = &driver.interrupt
            && let Err(error) = interrupt.signal()
        {
            log::warn!("block: telling the driver of another disk: {error}");
        }
    }

    fn change(&self) -> RwLockWriteGuard<'_, Option<Disk>> {
        self.disk.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
