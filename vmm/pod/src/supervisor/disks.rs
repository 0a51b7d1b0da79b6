//! The slots of a machine for root file systems on disks. There are as many as it was started with.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_machine::client::{DiskError, Machine};

/// As many as a machine can have: each is a device on its bus.
pub const MAX_SLOTS: u8 = 16;

#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    #[error(
        "all {0} places for root file systems on block devices are taken; a pod can't have more at a time"
    )]
    Full(usize),
    #[error(
        "the machine was started without places for root file systems on block devices, as the pod's first container \
         has its own elsewhere"
    )]
    None,
    #[error("giving the machine a disk")]
    Insert(#[source] DiskError),
}

/// What the guest sees the disk of a slot as: its serial number.
#[must_use]
pub fn serial(slot: u8) -> String {
    format!("hull-root-{slot}")
}

/// The slots of one machine.
#[derive(Debug)]
pub struct Disks {
    machine: Arc<Machine>,
    taken: Mutex<Vec<bool>>,
}

/// A disk in a slot, until it is given to [`Disks::eject`].
#[derive(Debug)]
pub struct Inserted {
    slot: u8,
}

impl Inserted {
    #[must_use]
    pub fn serial(&self) -> String {
        serial(self.slot)
    }
}

impl Disks {
    pub(super) fn new(machine: Arc<Machine>, slots: u8) -> Self {
        Self {
            machine,
            taken: Mutex::new(vec![false; slots.into()]),
        }
    }

    /// Puts a disk, a regular file or a block device, into a free slot.
    ///
    /// # Errors
    /// When there is none, or `hull-vmm` doesn't take it.
    pub async fn insert(&self, disk: impl AsFd, read_only: bool) -> Result<Inserted, DisksError> {
        let slot = self.take()?;
        let inserted = self
            .machine
            .insert_disk(slot, disk.as_fd(), read_only)
            .await;
        match inserted {
            Ok(()) => Ok(Inserted { slot }),
            Err(error) => {
                self.free(slot);
                Err(DisksError::Insert(error))
            }
        }
    }

    /// Takes a disk out, which the guest has unmounted. When this returns it is not written to any more.
    pub async fn eject(&self, inserted: Inserted) {
        match self.machine.eject_disk(inserted.slot).await {
            Ok(()) => self.free(inserted.slot),
            // The slot stays taken. With its machine it is gone anyway.
            Err(error) => tracing::debug!(
                slot = inserted.slot,
                error = crate::text::chain(&error),
                "taking a disk out"
            ),
        }
    }

    fn take(&self) -> Result<u8, DisksError> {
        let mut taken = self.taken();
        let all = taken.len();
        for (slot, is_taken) in (0..).zip(taken.iter_mut()) {
            if !*is_taken {
                *is_taken = true;
                return Ok(slot);
            }
        }
        Err(match all {
            0 => DisksError::None,
            all => DisksError::Full(all),
        })
    }

    fn free(&self, slot: u8) {
        if let Some(taken) = self.taken().get_mut(usize::from(slot)) {
            *taken = false;
        }
    }

    fn taken(&self) -> MutexGuard<'_, Vec<bool>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
