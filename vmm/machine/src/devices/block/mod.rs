//! A raw disk (virtio-blk; Virtio 1.2, section 5.2). Its content is never looked at for a format.

mod disk;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::worker::{Events, Handler, Readiness, Worker, borrow};
use crate::virtio::device::{Activation, ActiveQueue, RING_FEATURES, VirtioDevice};

use disk::Disk;
use request::Limits;

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
    disk: Arc<Disk>,
    id: [u8; ID_SIZE],
    config: [u8; CONFIG_SIZE],
    worker: Option<Worker>,
}

impl Block {
    /// A disk of the whole sectors that `disk`, a regular file or a block device, has now.
    /// Of `id` the first 20 bytes are shown to the guest.
    ///
    /// # Errors
    /// When the descriptor is neither, or its size can't be found.
    pub fn new(disk: OwnedFd, id: &str, read_only: bool) -> io::Result<Self> {
        let disk = Disk::new(disk, read_only)?;
        let mut shown = [0; ID_SIZE];
        for (to, from) in shown.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Self {
            config: config(disk.sectors()),
            disk: Arc::new(disk),
            id: shown,
            worker: None,
        })
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
            disk: self.disk.clone(),
            id: self.id,
        })
    }
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
        if self.disk.read_only() {
            always | READ_ONLY
        } else {
            always | DISCARD | WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let known = self.config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(known) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let requests = self.requests(activation)?;
        self.worker = Some(Worker::start("block", requests)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Answers one request after the other, synchronously: when the worker has ended no I/O is under way.
#[derive(Debug)]
pub(super) struct Requests {
    memory: GuestMemoryMmap,
    requests: ActiveQueue,
    write_through: bool,
    disk: Arc<Disk>,
    id: [u8; ID_SIZE],
}

impl Handler for Requests {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.requests.kick), 0, Readiness::IN)
    }

    fn ready(&mut self, _events: &Events, _token: u64, _readiness: Readiness) -> io::Result<()> {
        let answerer = request::Answerer {
            disk: &self.disk,
            id: &self.id,
            limits: &LIMITS,
            write_through: self.write_through,
        };
        self.requests
            .serve(&self.memory, LIMITS.descriptors(), |request| {
                answerer.answer(request)
            })
    }
}
