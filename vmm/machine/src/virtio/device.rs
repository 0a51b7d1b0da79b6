//! What every virtio device is to the transport, and what it is given.
//!
//! A device is configured by the transport alone. At `DRIVER_OK` the transport
//! checks the queues, freezes them into [`ActiveQueue`]s and hands them over by
//! value: no register that the guest can still write reaches a running queue.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

/// `VIRTIO_F_INDIRECT_DESC` and `VIRTIO_F_EVENT_IDX`: what [`VirtioDevice::features`] has if the
/// device enables and disables notifications on its queues as `ActiveQueue::serve` does.
pub const RING_FEATURES: u64 = 1 << 28 | 1 << 29;

/// Raises one interrupt of one device. The transport implements it (MSI-X by irqfd).
pub trait Interrupt: Send + Sync + std::fmt::Debug {
    /// Signals the guest. Never blocks.
    fn signal(&self) -> std::io::Result<()>;

    /// An event whose signal raises the interrupt without anybody here, for a queue that the kernel serves.
    ///
    /// It is that of the vector which the driver has given to the interrupt by now: a driver that gives it
    /// another while the device runs, which Linux never does, gets it on the old one. None where there is
    /// none yet, or where no event is behind the interrupt.
    fn event(&self) -> Option<EventFd> {
        None
    }
}

/// A queue that the driver has set up and can no longer change.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its number in the device (Virtio 1.2, section 5).
    pub index: u16,
    /// Checked: all of its parts are in RAM.
    pub queue: Queue,
    /// Readable when the driver has notified this queue (ioeventfd).
    pub kick: EventFd,
    /// Signals used buffers on this queue.
    pub interrupt: Arc<dyn Interrupt>,
}

impl ActiveQueue {
    /// Where the device is in it. No request may be under way.
    pub fn position(&self) -> QueuePosition {
        QueuePosition::of(self.index, &self.queue)
    }
}

/// How far a device has come in a queue, all that it has taken being given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// The queue's number in the device.
    pub index: u16,
    /// Of the available ring, modulo 2^16: the next request to be taken.
    pub next_available: u16,
    /// Of the used ring, modulo 2^16.
    pub next_used: u16,
}

impl QueuePosition {
    pub fn of(index: u16, queue: &Queue) -> Self {
        Self {
            index,
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }
}

/// A device that stands still. It goes on when it is activated with this, in this machine or in a clone of it.
#[derive(Debug, Clone, Default)]
pub struct Suspended {
    /// Of the queues in which the device has moved; the others are where they were.
    pub positions: Vec<QueuePosition>,
    /// What the device has to remember besides, in a form of its own. The machine that it comes from need not have been
    /// this one, and is not trusted.
    pub state: Vec<u8>,
    /// Why no clone can go on with it. In this machine the device goes on all the same.
    pub only_here: Option<String>,
}

/// All that a device needs to run.
#[derive(Debug)]
pub struct Activation {
    pub memory: GuestRam,
    /// The feature bits that the driver accepted, a subset of [`VirtioDevice::features`].
    pub features: u64,
    /// The enabled queues, by rising index; those the driver left out are absent.
    pub queues: Vec<ActiveQueue>,
    /// Signals a change of the device's configuration.
    pub config_interrupt: Arc<dyn Interrupt>,
    /// [`Suspended::state`], where the driver has been at work before. None: it has just come.
    pub resumed: Option<Vec<u8>>,
}

/// A virtio device, without its transport.
pub trait VirtioDevice: Send + std::fmt::Debug {
    /// Device id (Virtio 1.2, section 5), for example 26 for a file system.
    fn device_type(&self) -> u32;

    /// Maximum size of each queue, each a power of two up to 1024.
    fn queue_max_sizes(&self) -> &[u16];

    /// Offered feature bits. `VIRTIO_F_VERSION_1` is the transport's to add.
    fn features(&self) -> u64;

    /// Reads device configuration. Bytes past its end stay zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// How often the device has changed its configuration by itself, modulo 256.
    fn config_changes(&self) -> u8 {
        0
    }

    /// Writes device configuration. Ignored unless a device says otherwise.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the device's threads. An error sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> std::io::Result<()>;

    /// Ends the device's threads and drops its queues, as [`Self::reset`] does, with all requests finished that were
    /// taken; but to the driver it only stands still. The device is then reset, or activated with what is returned.
    ///
    /// # Errors
    /// When the device can't go on later. Then it can only be reset.
    fn suspend(&mut self) -> std::io::Result<Suspended>;

    /// Ends the device's threads and drops its queues before it returns, so that no
    /// access to guest memory is under way afterwards. A device may be activated again.
    fn reset(&mut self);
}
