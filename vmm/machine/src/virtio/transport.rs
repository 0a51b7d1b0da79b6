//! The registers of a virtio device over PCI, and the device's life: configured, then active.
//!
//! The two are different types. [`Configuring`] holds queues that the driver may still
//! change; at `DRIVER_OK` it is consumed, its queues are checked and handed to the device
//! by value, and what stays here, [`Frozen`], can only be read.

mod state;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

pub use self::state::{QueueState, RestoreError, TransportState};
use super::device::{Activation, ActiveQueue, Interrupt, Suspended, VirtioDevice};
use super::queues::{EnabledQueue, OpenQueue, Part, QueueError, Registers};
use super::status::{self, Step};
use crate::memory::GuestRam;

/// `VIRTIO_F_VERSION_1`: the device follows Virtio 1.0 or later.
const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_INDIRECT_DESC`.
const INDIRECT_DESC: u64 = 1 << 28;
/// Feature bits of the queues and the transport (Virtio 1.2, section 6), of which this
/// transport has but the three above.
const TRANSPORT_BITS: u64 = ((1 << 50) - 1) & !((1 << 24) - 1);

/// No vector: the event raises no interrupt (section 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// Offsets in the common configuration structure (section 4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Size of the common configuration structure, without the parts of features that are not offered.
pub const COMMON_SIZE: u32 = 0x38;

/// Why a device was not started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {0}: {1}")]
    Queue(usize, QueueError),
    #[error("no descriptor for a queue: {0}")]
    Descriptor(std::io::Error),
    #[error("{0}")]
    Device(std::io::Error),
}

/// A device, and the registers that its driver sees.
#[derive(Debug)]
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    memory: GuestRam,
    offered: u64,
    kicks: Vec<EventFd>,
    vectors: Arc<[Arc<dyn Interrupt>]>,
    config_vector: Arc<AtomicU16>,
    queue_vectors: Vec<Arc<AtomicU16>>,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    config_generation: u8,
    status: u8,
    phase: Phase,
    /// What the device goes on with, while it stands still.
    suspended: Option<Suspended>,
}

#[derive(Debug)]
enum Phase {
    Configuring(Configuring),
    Frozen(Frozen),
}

/// Before `DRIVER_OK`.
#[derive(Debug)]
struct Configuring {
    driver_features: u64,
    queues: Vec<Setup>,
}

#[derive(Debug)]
enum Setup {
    Open(OpenQueue),
    Enabled(EnabledQueue),
}

/// After `DRIVER_OK`, whether the device could be started or not.
#[derive(Debug)]
struct Frozen {
    driver_features: u64,
    queues: Vec<(Registers, bool)>,
}

impl Configuring {
    fn new(device: &dyn VirtioDevice) -> Self {
        let open = |max: &u16| Setup::Open(OpenQueue::new(*max));
        Self {
            driver_features: 0,
            queues: device.queue_max_sizes().iter().map(open).collect(),
        }
    }

    /// Ends the configuration: nothing but registers to be read is left.
    fn freeze(self) -> (Frozen, Vec<(usize, EnabledQueue)>) {
        let queues = self
            .queues
            .iter()
            .map(|setup| (*setup.registers(), setup.is_enabled()))
            .collect();
        let frozen = Frozen {
            driver_features: self.driver_features,
            queues,
        };
        let enabled = self
            .queues
            .into_iter()
            .enumerate()
            .filter_map(|(index, setup)| match setup {
                Setup::Open(_) => None,
                Setup::Enabled(queue) => Some((index, queue)),
            })
            .collect();
        (frozen, enabled)
    }
}

impl Setup {
    fn registers(&self) -> &Registers {
        match self {
            Self::Open(queue) => queue.registers(),
            Self::Enabled(queue) => queue.registers(),
        }
    }

    fn is_enabled(&self) -> bool {
        matches!(self, Self::Enabled(_))
    }

    fn enable(self) -> Self {
        match self {
            Self::Open(queue) => Self::Enabled(queue.enable()),
            enabled @ Self::Enabled(_) => enabled,
        }
    }
}

/// Raises whichever vector the driver has given to an event.
#[derive(Debug)]
struct Mapped {
    vector: Arc<AtomicU16>,
    vectors: Arc<[Arc<dyn Interrupt>]>,
}

impl Interrupt for Mapped {
    fn signal(&self) -> std::io::Result<()> {
        let vector = self.vector.load(Ordering::Acquire);
        match self.vectors.get(usize::from(vector)) {
            Some(interrupt) => interrupt.signal(),
            None => Ok(()),
        }
    }

    fn event(&self) -> Option<EventFd> {
        let vector = self.vector.load(Ordering::Acquire);
        self.vectors.get(usize::from(vector))?.event()
    }
}

impl Transport {
    /// A reset device. `kicks` has one event for each queue, to be written when it is notified.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        kicks: Vec<EventFd>,
        vectors: Vec<Arc<dyn Interrupt>>,
    ) -> Self {
        let rings = EVENT_IDX | INDIRECT_DESC;
        let offered = (device.features() & (!TRANSPORT_BITS | rings)) | VERSION_1;
        let unmapped = || Arc::new(AtomicU16::new(NO_VECTOR));
        let queue_vectors = kicks.iter().map(|_| unmapped()).collect();
        let phase = Phase::Configuring(Configuring::new(&*device));
        Self {
            device,
            memory,
            offered,
            kicks,
            vectors: vectors.into(),
            config_vector: unmapped(),
            queue_vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            config_generation: 0,
            status: 0,
            phase,
            suspended: None,
        }
    }

    /// A guest's read of the common configuration. Anything but a whole field, or half of a
    /// 64-bit one, reads as zero (section 4.1.3.1).
    pub fn read_common(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match data.len() {
            1 => data.copy_from_slice(&self.read_common_u8(offset).to_le_bytes()),
            2 => data.copy_from_slice(&self.read_common_u16(offset).to_le_bytes()),
            4 => data.copy_from_slice(&self.read_common_u32(offset).to_le_bytes()),
            _ => {}
        }
    }

    /// A guest's write to the common configuration. Anything but a whole field, or half of a
    /// 64-bit one, is ignored.
    pub fn write_common(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [value] => self.write_common_u8(offset, value),
            [a, b] => self.write_common_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_common_u32(offset, u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }

    /// A guest's read of the device's own configuration.
    pub fn read_device(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// A guest's write to the device's own configuration.
    pub fn write_device(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
        self.config_generation = self.config_generation.wrapping_add(1);
    }

    /// Each queue's event, to be written when the queue is notified.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// A guest's notification that did not go through the hypervisor's doorbell.
    pub fn notify(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue)
            && let Err(error) = kick.write(1)
        {
            // A counter that is full is readable, which is all that matters.
            log::debug!("queue {queue} was notified already: {error}");
        }
    }

    /// Ends the device, as a driver's reset does.
    pub fn reset(&mut self) {
        if matches!(self.phase, Phase::Frozen(_)) {
            self.device.reset();
        }
        self.suspended = None;
        for kick in &self.kicks {
            // An error means that there was no notification to forget.
            drop(kick.read());
        }
        self.phase = Phase::Configuring(Configuring::new(&*self.device));
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.status = 0;
    }

    fn read_common_u8(&self, offset: u64) -> u8 {
        match offset {
            common::DEVICE_STATUS => self.status,
            common::CONFIG_GENERATION => {
                // Each change of either raises it (section 4.1.4.3.1).
                self.config_generation
                    .wrapping_add(self.device.config_changes())
            }
            _ => 0,
        }
    }

    fn read_common_u16(&self, offset: u64) -> u16 {
        let queue = self.selected();
        match offset {
            common::CONFIG_VECTOR => self.config_vector.load(Ordering::Acquire),
            common::NUM_QUEUES => u16::try_from(self.kicks.len()).unwrap_or(u16::MAX),
            common::QUEUE_SELECT => self.queue_select,
            common::QUEUE_SIZE => queue.map_or(0, |(registers, _)| registers.size),
            common::QUEUE_VECTOR => self
                .queue_vectors
                .get(usize::from(self.queue_select))
                .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)),
            common::QUEUE_ENABLE => queue.map_or(0, |(_, enabled)| u16::from(enabled)),
            // One doorbell for each queue, in the order of the queues.
            common::QUEUE_NOTIFY_OFF => queue.map_or(0, |_| self.queue_select),
            _ => 0,
        }
    }

    fn read_common_u32(&self, offset: u64) -> u32 {
        let address = |part| {
            self.selected().map_or(0, |(registers, _)| match part {
                Part::Descriptors => registers.descriptors,
                Part::Driver => registers.driver,
                Part::Device => registers.device,
            })
        };
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select,
            common::DEVICE_FEATURE => select(self.offered, self.device_feature_select),
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select,
            common::DRIVER_FEATURE => select(self.driver_features(), self.driver_feature_select),
            _ => match address_register(offset) {
                Some((part, high)) => select(address(part), u32::from(high)),
                None => 0,
            },
        }
    }

    fn write_common_u8(&mut self, offset: u64, value: u8) {
        if offset == common::DEVICE_STATUS {
            self.write_status(value);
        }
    }

    fn write_common_u16(&mut self, offset: u64, value: u16) {
        match offset {
            common::CONFIG_VECTOR => {
                let vector = self.vector(value);
                self.config_vector.store(vector, Ordering::Release);
            }
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_SIZE => {
                if let Some(queue) = self.open_queue() {
                    queue.set_size(value);
                }
            }
            common::QUEUE_VECTOR => {
                let vector = self.vector(value);
                if let Some(queue) = self.queue_vectors.get(usize::from(self.queue_select)) {
                    queue.store(vector, Ordering::Release);
                }
            }
            // A driver writes nothing but 1 (section 4.1.4.3.2).
            common::QUEUE_ENABLE if value == 1 => self.enable_queue(),
            _ => {}
        }
    }

    fn write_common_u32(&mut self, offset: u64, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE => self.write_driver_feature(value),
            _ => {
                if let Some((part, high)) = address_register(offset)
                    && let Some(queue) = self.open_queue()
                {
                    queue.set_address(part, high, value);
                }
            }
        }
    }

    /// A vector that doesn't exist unmaps the event, and the driver reads that back.
    fn vector(&self, value: u16) -> u16 {
        if usize::from(value) < self.vectors.len() {
            value
        } else {
            NO_VECTOR
        }
    }

    fn driver_features(&self) -> u64 {
        match &self.phase {
            Phase::Configuring(configuring) => configuring.driver_features,
            Phase::Frozen(frozen) => frozen.driver_features,
        }
    }

    /// The selected queue's registers, and whether it is enabled.
    fn selected(&self) -> Option<(Registers, bool)> {
        let index = usize::from(self.queue_select);
        match &self.phase {
            Phase::Configuring(configuring) => configuring
                .queues
                .get(index)
                .map(|setup| (*setup.registers(), setup.is_enabled())),
            Phase::Frozen(frozen) => frozen.queues.get(index).copied(),
        }
    }

    /// The queues, while the driver may set them up: after the features, before it is done
    /// (section 3.1.1).
    fn setups(&mut self) -> Option<&mut Vec<Setup>> {
        let negotiated = self.status & status::FEATURES_OK != 0;
        let given_up = self.status & (status::FAILED | status::NEEDS_RESET) != 0;
        match &mut self.phase {
            Phase::Configuring(configuring) if negotiated && !given_up => {
                Some(&mut configuring.queues)
            }
            _ => None,
        }
    }

    fn open_queue(&mut self) -> Option<&mut OpenQueue> {
        let index = usize::from(self.queue_select);
        match self.setups()?.get_mut(index)? {
            Setup::Open(queue) => Some(queue),
            Setup::Enabled(_) => None,
        }
    }

    fn enable_queue(&mut self) {
        let index = usize::from(self.queue_select);
        if let Some(setups) = self.setups()
            && index < setups.len()
        {
            let enabled = setups.remove(index).enable();
            setups.insert(index, enabled);
        }
    }

    fn write_driver_feature(&mut self, value: u32) {
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let status = self.status;
        if let Phase::Configuring(configuring) = &mut self.phase
            && status & status::DRIVER != 0
            && status & (status::FEATURES_OK | status::FAILED) == 0
        {
            let kept = configuring.driver_features & !(0xffff_ffff << shift);
            configuring.driver_features = kept | u64::from(value) << shift;
        }
    }

    fn write_status(&mut self, value: u8) {
        match status::step(self.status, value) {
            Step::None => {}
            Step::Reset => self.reset(),
            Step::Acknowledge => self.status |= status::ACKNOWLEDGE,
            Step::Driver => self.status |= status::DRIVER,
            Step::Failed => self.status |= status::FAILED,
            Step::FeaturesOk => {
                let features = self.driver_features();
                if features & !self.offered == 0 && features & VERSION_1 != 0 {
                    self.status |= status::FEATURES_OK;
                }
            }
            Step::DriverOk => self.driver_ok(),
        }
    }

    fn driver_ok(&mut self) {
        let Phase::Configuring(configuring) = &mut self.phase else {
            return;
        };
        let configuring = std::mem::replace(
            configuring,
            Configuring {
                driver_features: 0,
                queues: Vec::new(),
            },
        );
        let (frozen, enabled) = configuring.freeze();
        let features = frozen.driver_features;
        self.phase = Phase::Frozen(frozen);
        match self.start(features, enabled, None) {
            Ok(()) => self.status |= status::DRIVER_OK,
            Err(error) => {
                log::warn!(
                    "virtio device {}: its driver must reset it: {error}",
                    self.device.device_type()
                );
                self.status |= status::NEEDS_RESET;
            }
        }
    }

    fn start(
        &mut self,
        features: u64,
        enabled: Vec<(usize, EnabledQueue)>,
        suspended: Option<Suspended>,
    ) -> Result<(), StartError> {
        let event_idx = features & EVENT_IDX != 0;
        let positions = suspended
            .as_ref()
            .map_or(&[][..], |suspended| &suspended.positions);
        let mut queues = Vec::with_capacity(enabled.len());
        for (index, queue) in enabled {
            let mut queue = queue
                .check(&self.memory, event_idx)
                .map_err(|error| StartError::Queue(index, error))?;
            if let Some(position) = positions.iter().find(|it| usize::from(it.index) == index) {
                queue.set_next_avail(position.next_available);
                queue.set_next_used(position.next_used);
            }
            let kick = self.kicks[index]
                .try_clone()
                .map_err(StartError::Descriptor)?;
            queues.push(ActiveQueue {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                queue,
                kick,
                interrupt: self.interrupt(&self.queue_vectors[index]),
            });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues,
            config_interrupt: self.interrupt(&self.config_vector),
            resumed: suspended.map(|suspended| suspended.state),
        };
        self.device.activate(activation).map_err(StartError::Device)
    }

    fn interrupt(&self, vector: &Arc<AtomicU16>) -> Arc<dyn Interrupt> {
        Arc::new(Mapped {
            vector: vector.clone(),
            vectors: self.vectors.clone(),
        })
    }
}

/// The low half, the high half, or nothing.
#[expect(
    clippy::cast_possible_truncation,
    reason = "registers show 64 bits in halves"
)]
fn select(value: u64, half: u32) -> u32 {
    match half {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Which half of which queue address is at `offset`.
fn address_register(offset: u64) -> Option<(Part, bool)> {
    let (part, base) = match offset & !7 {
        common::QUEUE_DESC => (Part::Descriptors, common::QUEUE_DESC),
        common::QUEUE_DRIVER => (Part::Driver, common::QUEUE_DRIVER),
        common::QUEUE_DEVICE => (Part::Device, common::QUEUE_DEVICE),
        _ => return None,
    };
    match offset - base {
        0 => Some((part, false)),
        4 => Some((part, true)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
