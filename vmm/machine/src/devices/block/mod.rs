//! A raw disk (virtio-blk; Virtio 1.2, section 5.2). Its content is never looked at for a format.

mod disk;
mod request;
mod slot;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::memory::GuestRam;

use super::worker::{Events, Handler, Readiness, Worker, borrow};
use crate::control::DiskRefused;
use crate::virtio::device::{
    Activation, ActiveQueue, QueuePosition, RING_FEATURES, Suspended, VirtioDevice,
};

use disk::Disk;
use request::Limits;
use slot::Slot;

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [128];

/// Feature bits (section 5.2.3).
const SIZE_MAX: u64 = 1 << 1;
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of the device configuration (section 5.2.4), up to the end of what the features give meaning.
const CONFIG_SIZE: usize = 60;
/// Longest identity (section 5.2.6).
const ID_SIZE: usize = 20;

/// Bounds on one request, which the driver is told.
const LIMITS: Limits = Limits {
    // The queue's size, less the header and the status.
    segments: 126,
    segment_bytes: 1 << 20,
    ranges: 16,
    // 1 GiB; file systems give up large files in ranges of any size.
    discard_sectors: 1 << 21,
    // 16 MiB, for files whose system can't make zeroes but by writing them.
    zero_sectors: 1 << 15,
};

/// The device.
#[derive(Debug)]
pub struct Block {
    slot: Arc<Slot>,
    read_only: bool,
    id: [u8; ID_SIZE],
    worker: Option<Worker>,
}

impl Block {
    /// A disk of the whole sectors that `disk`, a regular file or a block device, has now. Without one it is a slot,
    /// of no sectors until a disk is put in; `read_only` is then each disk's own.
    /// Of `id` the first 20 bytes are shown to the guest.
    ///
    /// # Errors
    /// When the descriptor is neither, or its size can't be found.
    pub fn new(disk: Option<OwnedFd>, id: &str, read_only: bool) -> io::Result<Self> {
        let slot = match disk {
            Some(disk) => Slot::with(Disk::new(disk, read_only)?),
            None => Slot::default(),
        };
        let mut shown = [0; ID_SIZE];
        for (to, from) in shown.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            slot: Arc::new(slot),
            read_only,
            id: shown,
            worker: None,
        })
    }

    /// What changes its disk with.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle {
            slot: Arc::clone(&self.slot),
        }
    }

    pub(super) fn requests(&self, activation: Activation) -> io::Result<Requests> {
        let requests = activation
            .queues
            .into_iter()
            .next()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Requests {
            memory: activation.memory,
            requests,
            // A driver that can't flush expects writes to last (section 5.2.6.2).
            write_through: activation.features & FLUSH == 0,
            slot: Arc::clone(&self.slot),
            id: self.id,
        })
    }
}

/// Changes the disk of a device, whatever the device does.
#[derive(Debug)]
pub struct BlockHandle {
    slot: Arc<Slot>,
}

impl BlockHandle {
    /// Puts a disk into an empty slot.
    ///
    /// # Errors
    /// When there is one, or the descriptor is none of a disk.
    pub fn insert(&self, disk: OwnedFd, read_only: bool) -> Result<(), DiskRefused> {
        let disk = Disk::new(disk, read_only).map_err(|error| DiskRefused::Disk {
            errno: error.raw_os_error().unwrap_or(libc::EINVAL),
        })?;
        self.slot.insert(disk)
    }

    /// Takes the disk out. When this returns it is not written to any more.
    pub fn eject(&self) {
        self.slot.eject();
    }
}

/// How many sectors the disk had when the device was suspended.
fn known_sectors(state: &[u8]) -> io::Result<u64> {
    let sectors = state
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(u64::from_le_bytes(sectors))
}

fn config(sectors: u64) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    let mut set = |offset: usize, value: u32| {
        config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    set(8, LIMITS.segment_bytes);
    set(12, LIMITS.segments);
    set(20, disk::SECTOR);
    set(36, LIMITS.discard_sectors);
    set(40, LIMITS.ranges);
    // Discard alignment, in sectors: a page of the file's system.
    set(44, 8);
    set(48, LIMITS.zero_sectors);
    set(52, LIMITS.ranges);
    // Zeroes may be made by discarding, if the driver lets them.
    set(56, 1);
    config[..8].copy_from_slice(&sectors.to_le_bytes());
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = RING_FEATURES | SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH;
        if self.read_only {
            always | READ_ONLY
        } else {
            always | DISCARD | WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let config = config(self.slot.sectors());
        let known = config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(known) {
            *to = *from;
        }
    }

    fn config_changes(&self) -> u8 {
        self.slot.changes()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let interrupt = Arc::clone(&activation.config_interrupt);
        let known = activation.resumed.as_deref().map(known_sectors);
        let requests = self.requests(activation)?;
        self.worker = Some(Worker::start("block", requests)?);
        self.slot.driver_up(interrupt);
        if let Some(known) = known
            && known? != self.slot.sectors()
        {
            self.slot.tell();
        }
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        self.slot.driver_down();
        let worker = self.worker.take();
        Ok(Suspended {
            positions: worker.map(Worker::suspend).unwrap_or_default(),
            // A driver whose disk is another when it goes on has to hear of that.
            state: self.slot.sectors().to_le_bytes().to_vec(),
            only_here: None,
        })
    }

    fn reset(&mut self) {
        self.slot.driver_down();
        self.worker = None;
    }
}

/// Answers one request after the other, synchronously: when the worker has ended no I/O is under way.
#[derive(Debug)]
pub(super) struct Requests {
    memory: GuestRam,
    requests: ActiveQueue,
    write_through: bool,
    slot: Arc<Slot>,
    id: [u8; ID_SIZE],
}

impl Handler for Requests {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.requests.kick), 0, Readiness::IN)
    }

    fn ready(&mut self, _events: &Events, _token: u64, _readiness: Readiness) -> io::Result<()> {
        self.requests
            .serve(&self.memory, LIMITS.descriptors(), |request| {
                let disk = self.slot.disk();
                let answerer = request::Answerer {
                    disk: disk.as_ref(),
                    id: &self.id,
                    limits: &LIMITS,
                    write_through: self.write_through,
                };
                answerer.answer(request)
            })
    }

    fn rest(&mut self, _events: &Events) -> Vec<QueuePosition> {
        vec![self.requests.position()]
    }
}
