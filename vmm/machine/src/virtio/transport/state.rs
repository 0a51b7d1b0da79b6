//! A device that stands still, and goes on: in the machine that it is in, or in a clone.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Configuring, EVENT_IDX, Frozen, NO_VECTOR, Phase, Setup, StartError, Transport, VERSION_1,
};
use crate::virtio::device::{QueuePosition, Suspended};
use crate::virtio::queues::{EnabledQueue, OpenQueue, Registers};
use crate::virtio::status;

/// Offset of the available ring's entries, and the size of one (section 2.7.6).
const ENTRIES: u64 = 4;
const AVAILABLE_ENTRY: u64 = 2;

/// The registers of a transport, and its device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransportState {
    pub device_type: u32,
    pub status: u8,
    /// `DRIVER_OK` was reached: the queues can no longer be changed.
    pub frozen: bool,
    pub driver_features: u64,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub queue_select: u16,
    pub config_generation: u8,
    pub config_vector: u16,
    pub queues: Vec<QueueState>,
    /// [`Suspended::state`].
    pub device: Vec<u8>,
}

/// A queue's registers, and how far the device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    pub registers: Registers,
    pub enabled: bool,
    pub vector: u16,
    pub next_available: u16,
    pub next_used: u16,
}

/// Why a device is not what a state says.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("there is a device of type {found}, not {expected}, in its place")]
    Type { expected: u32, found: u32 },
    #[error("it has {found} queues, not {expected}")]
    Queues { expected: usize, found: usize },
    #[error("queue {0} can't have such a size")]
    QueueSize(usize),
    #[error("its driver uses the features {driver:#x}, but {offered:#x} are offered")]
    Features { driver: u64, offered: u64 },
    #[error("its status is {0:#x}")]
    Status(u8),
    #[error("going on: {0}")]
    Start(String),
}

impl Transport {
    /// Has the device stand still, if a driver is at work with it, and tells what there is to go on with.
    ///
    /// # Errors
    /// When the device can't go on, and its driver has to reset it; or when it can go on in this machine only.
    pub fn suspend(&mut self) -> std::io::Result<TransportState> {
        if self.suspended.is_none() && self.is_running() {
            self.suspended = Some(self.device.suspend()?);
        }
        let suspended = self.suspended.clone().unwrap_or_default();
        if let Some(why) = suspended.only_here {
            return Err(std::io::Error::other(why));
        }
        let queues = (0..self.kicks.len())
            .filter_map(|index| self.queue_state(index, &suspended.positions))
            .collect();
        Ok(TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            frozen: matches!(self.phase, Phase::Frozen(_)),
            driver_features: self.driver_features(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            config_generation: self.config_generation,
            config_vector: self.config_vector.load(Ordering::Acquire),
            queues,
            device: suspended.state,
        })
    }

    /// Has the device go on, if it was suspended. One that can't needs a reset by its driver.
    pub fn resume(&mut self) {
        if let Err(error) = self.go_on() {
            log::warn!(
                "virtio device {}: its driver must reset it: {error}",
                self.device.device_type()
            );
            self.status = self.status & !status::DRIVER_OK | status::NEEDS_RESET;
        }
    }

    /// Makes this transport, of a device that nobody has driven yet, what `state` says, and has the device go on.
    ///
    /// # Errors
    /// When the device is another, or the state is one that no device comes to. Nothing is at work then.
    pub fn restore(&mut self, state: TransportState) -> Result<(), RestoreError> {
        let found = self.device.device_type();
        if found != state.device_type {
            return Err(RestoreError::Type {
                expected: state.device_type,
                found,
            });
        }
        if self.kicks.len() != state.queues.len() {
            return Err(RestoreError::Queues {
                expected: state.queues.len(),
                found: self.kicks.len(),
            });
        }
        let negotiated = state.status & status::FEATURES_OK != 0;
        let acceptable = state.driver_features & VERSION_1 != 0 || !negotiated;
        if state.driver_features & !self.offered != 0 || !acceptable {
            return Err(RestoreError::Features {
                driver: state.driver_features,
                offered: self.offered,
            });
        }
        let running = state.status & status::DRIVER_OK != 0;
        if running && !(state.frozen && negotiated) {
            return Err(RestoreError::Status(state.status));
        }
        let setups = self.restored_setups(&state.queues)?;

        self.status = state.status;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        self.config_generation = state.config_generation;
        let vector = self.vector(state.config_vector);
        self.config_vector.store(vector, Ordering::Release);
        for (queue, vector) in state.queues.iter().zip(&self.queue_vectors) {
            vector.store(self.vector(queue.vector), Ordering::Release);
        }
        let configuring = Configuring {
            driver_features: state.driver_features,
            queues: setups,
        };
        if !state.frozen {
            self.phase = Phase::Configuring(configuring);
            return Ok(());
        }
        self.phase = Phase::Frozen(configuring.freeze().0);
        if !running {
            return Ok(());
        }
        self.suspended = Some(Suspended {
            positions: positions(&state.queues),
            state: state.device,
            only_here: None,
        });
        self.go_on()
            .map_err(|error| RestoreError::Start(error.to_string()))?;
        self.tell_again(&state.queues);
        Ok(())
    }

    fn is_running(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    fn go_on(&mut self) -> Result<(), StartError> {
        let Some(suspended) = self.suspended.take() else {
            return Ok(());
        };
        let Phase::Frozen(Frozen {
            driver_features,
            queues,
        }) = &self.phase
        else {
            return Ok(());
        };
        let (features, sizes) = (*driver_features, self.device.queue_max_sizes());
        let enabled: Vec<(usize, EnabledQueue)> = queues
            .iter()
            .zip(sizes)
            .enumerate()
            .filter(|(_, ((_, enabled), _))| *enabled)
            .filter_map(|(index, ((registers, _), max))| {
                Some((index, OpenQueue::with(*max, *registers)?.enable()))
            })
            .collect();
        // A notification that came before the device stood still may not have been looked at.
        for (index, _) in &enabled {
            self.notify(*index);
        }
        self.start(features, enabled, Some(suspended))
    }

    fn queue_state(&self, index: usize, positions: &[QueuePosition]) -> Option<QueueState> {
        let (registers, enabled) = match &self.phase {
            Phase::Configuring(configuring) => {
                let setup = configuring.queues.get(index)?;
                (*setup.registers(), setup.is_enabled())
            }
            Phase::Frozen(frozen) => *frozen.queues.get(index)?,
        };
        let position = positions.iter().find(|it| usize::from(it.index) == index);
        Some(QueueState {
            registers,
            enabled,
            vector: self
                .queue_vectors
                .get(index)
                .map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire)),
            next_available: position.map_or(0, |position| position.next_available),
            next_used: position.map_or(0, |position| position.next_used),
        })
    }

    fn restored_setups(&self, queues: &[QueueState]) -> Result<Vec<Setup>, RestoreError> {
        let sizes = self.device.queue_max_sizes();
        let setups = queues.iter().zip(sizes).enumerate();
        setups
            .map(|(index, (queue, max))| {
                let open =
                    OpenQueue::with(*max, queue.registers).ok_or(RestoreError::QueueSize(index))?;
                Ok(if queue.enabled {
                    Setup::Enabled(open.enable())
                } else {
                    Setup::Open(open)
                })
            })
            .collect()
    }

    /// Raises the interrupts of queues in which the driver may not have seen all. One that was on its way when
    /// the device stood still is lost; one too many does no harm.
    fn tell_again(&self, queues: &[QueueState]) {
        let event_idx = self.driver_features() & EVENT_IDX != 0;
        for (queue, vector) in queues.iter().zip(&self.queue_vectors) {
            if !queue.enabled || event_idx && self.waits_for_next(queue) {
                continue;
            }
            if let Err(error) = self.interrupt(vector).signal() {
                log::warn!("interrupting a clone's driver: {error}");
            }
        }
    }

    /// Whether the driver has seen all that was given back, and waits to be told of what comes next (section 2.7.7).
    fn waits_for_next(&self, queue: &QueueState) -> bool {
        let Registers { size, driver, .. } = queue.registers;
        // The ring is in RAM, or else the device would not run.
        let event = driver.saturating_add(ENTRIES + AVAILABLE_ENTRY * u64::from(size));
        let event: Result<u16, _> = self.memory.read_obj(GuestAddress(event));
        event.is_ok_and(|event| u16::from_le(event) == queue.next_used)
    }
}

fn positions(queues: &[QueueState]) -> Vec<QueuePosition> {
    (0..)
        .zip(queues)
        .map(|(index, queue)| QueuePosition {
            index,
            next_available: queue.next_available,
            next_used: queue.next_used,
        })
        .collect()
}
