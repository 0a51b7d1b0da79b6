//! The PCI root: one bus, reached through memory-mapped configuration space alone.
//!
//! A host bridge at 0:0.0 and a virtio device on each slot after it, one function each.
//! No bridges, no INTx, no configuration ports, nothing that comes or goes.

mod config_space;
mod function;
mod msix;
pub mod platform;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::layout::{PCI_ECAM_SIZE, PCI_ECAM_START, PCI_MMIO32_START};
use crate::memory::GuestRam;
use crate::virtio::device::VirtioDevice;
use crate::virtio::transport::RestoreError;

use config_space::ConfigSpace;
pub use config_space::Identity;
pub use function::FunctionState;
use function::{BAR_SIZE, Place, VirtioFunction};
use platform::Platform;

/// Slots of a bus, the host bridge's among them.
const SLOTS: u8 = 32;

/// QEMU's PCI Express host bridge: known to every kernel, and to none as in need of anything.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_00_00,
    revision: 0,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Why a device can't be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    #[error("the PCI bus has no slot left: a machine has at most 31 devices")]
    Full,
    #[error("virtio device type {device_type} has no PCI device id")]
    DeviceType { device_type: u32 },
    #[error(
        "virtio device type {device_type} has too many queues, or one of a size that is no power of two"
    )]
    Queues { device_type: u32 },
    #[error("the capabilities don't fit in configuration space")]
    Capabilities,
    #[error("cannot set up a queue's doorbell: {0}")]
    Doorbell(#[source] std::io::Error),
    #[error("cannot set up an interrupt line: {0}")]
    Line(#[source] std::io::Error),
}

/// The bus as it is put aside.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BusState {
    /// The host bridge's configuration space.
    pub bridge: Vec<u8>,
    /// Slot 1 and on.
    pub functions: Vec<FunctionState>,
}

/// Why a device doesn't stand still.
#[derive(Debug, thiserror::Error)]
#[error("the device in slot {slot} can't stand still: {source}")]
pub struct SuspendError {
    slot: u8,
    source: std::io::Error,
}

/// Why a bus is not what a state says.
#[derive(Debug, thiserror::Error)]
pub enum RestoreBusError {
    #[error("the machine has {found} devices, not {expected}")]
    Devices { expected: usize, found: usize },
    #[error("the device in slot {slot}")]
    Device { slot: u8, source: RestoreError },
    #[error("connecting the devices' interrupts")]
    Interrupts(#[source] std::io::Error),
}

/// A function of the bus, as the guest finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionInfo {
    pub slot: u8,
    pub identity: Identity,
    /// First address and size of its BAR.
    pub bar: Option<(u64, u64)>,
}

/// The bus and all on it. Shared by all processors' threads.
#[derive(Debug)]
pub struct PciRoot {
    memory: GuestRam,
    platform: Arc<dyn Platform>,
    bridge: Mutex<ConfigSpace>,
    /// Slot 1 and on.
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    place: Arc<Place>,
    function: Mutex<VirtioFunction>,
}

impl PciRoot {
    /// A bus with a host bridge. Devices reach `memory`, and nothing else of the guest's address space.
    #[must_use]
    pub fn new(memory: GuestRam, platform: Arc<dyn Platform>) -> Self {
        Self {
            memory,
            platform,
            bridge: Mutex::new(ConfigSpace::new(&HOST_BRIDGE)),
            slots: Vec::new(),
        }
    }

    /// Puts a device on the next slot, and returns which that is.
    ///
    /// # Errors
    /// When the bus is full, or the platform has no interrupt or doorbell for it.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8, PciError> {
        let slot = u8::try_from(self.slots.len() + 1)
            .ok()
            .filter(|slot| *slot < SLOTS)
            .ok_or(PciError::Full)?;
        let address = u64::from(slot) * u64::from(BAR_SIZE) + PCI_MMIO32_START;
        let address = u32::try_from(address).map_err(|_| PciError::Full)?;
        let (memory, platform) = (self.memory.clone(), self.platform.clone());
        let function = VirtioFunction::new(device, memory, platform, address)?;
        self.slots.push(Slot {
            place: function.place(),
            function: Mutex::new(function),
        });
        Ok(slot)
    }

    /// A guest's read of an address where there is no RAM. What nobody answers reads as ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some((slot, register)) = ecam(address) {
            match slot {
                Some(0) => lock(&self.bridge).read(register, data),
                Some(slot) => match self.function(slot) {
                    Some(mut function) => function.read_config(register, data),
                    None => data.fill(0xff),
                },
                None => data.fill(0xff),
            }
        } else if let Some((mut function, offset)) = self.bar(address, data.len()) {
            function.read_bar(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A guest's write to an address where there is no RAM. What nobody takes is ignored.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((slot, register)) = ecam(address) {
            match slot {
                Some(0) => lock(&self.bridge).write(register, data),
                Some(slot) => {
                    if let Some(mut function) = self.function(slot) {
                        function.write_config(register, data);
                    }
                }
                None => {}
            }
        } else if let Some((mut function, offset)) = self.bar(address, data.len()) {
            function.write_bar(offset, data);
        }
    }

    /// Has every device stand still: none touches the guest's memory until [`Self::resume`]. No processor may run.
    ///
    /// # Errors
    /// When one can't. Those before it stand still.
    pub fn suspend(&self) -> Result<BusState, SuspendError> {
        let suspend = |(number, slot): (u8, &Slot)| {
            let state = lock(&slot.function).suspend();
            state.map_err(|source| SuspendError {
                slot: number,
                source,
            })
        };
        Ok(BusState {
            bridge: lock(&self.bridge).bytes().to_vec(),
            functions: (1..)
                .zip(&self.slots)
                .map(suspend)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Has every device go on that was suspended.
    pub fn resume(&self) {
        for slot in &self.slots {
            lock(&slot.function).resume();
        }
    }

    /// Makes a bus that no guest has seen yet what `state` says; its devices go on.
    ///
    /// # Errors
    /// When they are other devices, or can't be what is said of them. The bus is to be stopped then.
    pub fn restore(&self, state: BusState) -> Result<(), RestoreBusError> {
        if state.functions.len() != self.slots.len() {
            return Err(RestoreBusError::Devices {
                expected: state.functions.len(),
                found: self.slots.len(),
            });
        }
        lock(&self.bridge).restore(&state.bridge);
        self.platform.hold();
        for (slot, state) in self.slots.iter().zip(&state.functions) {
            lock(&slot.function).restore(state);
        }
        let connected = self.platform.connect_held();
        connected.map_err(RestoreBusError::Interrupts)?;
        for ((number, slot), state) in (1..).zip(&self.slots).zip(state.functions) {
            let restored = lock(&slot.function).restore_device(state.transport);
            restored.map_err(|source| RestoreBusError::Device {
                slot: number,
                source,
            })?;
        }
        Ok(())
    }

    /// Resets every device: none has a thread or touches the guest's memory afterwards.
    pub fn stop(&self) {
        for slot in &self.slots {
            lock(&slot.function).stop();
        }
    }

    /// Everything that the guest can find on the bus.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionInfo> {
        let bridge = FunctionInfo {
            slot: 0,
            identity: HOST_BRIDGE,
            bar: None,
        };
        let devices = (1..).zip(&self.slots).map(|(number, slot)| {
            let function = lock(&slot.function);
            FunctionInfo {
                slot: number,
                identity: function.identity(),
                bar: Some((u64::from(function.bar()), u64::from(BAR_SIZE))),
            }
        });
        std::iter::once(bridge).chain(devices).collect()
    }

    fn function(&self, slot: u8) -> Option<MutexGuard<'_, VirtioFunction>> {
        let index = usize::from(slot).checked_sub(1)?;
        self.slots.get(index).map(|slot| lock(&slot.function))
    }

    /// If all of an access is in one function's BAR: the function, and the offset in the BAR.
    fn bar(&self, address: u64, len: usize) -> Option<(MutexGuard<'_, VirtioFunction>, u64)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        self.slots.iter().find_map(|slot| {
            let start = u64::from(slot.place.get()?);
            let within = start..start + u64::from(BAR_SIZE);
            (within.contains(&address) && within.contains(&last))
                .then(|| (lock(&slot.function), address - start))
        })
    }
}

/// A panic of another thread ends the process, so nobody sees a value that it left half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// If an address is in configuration space: the slot, if it is one of function 0, and the register.
fn ecam(address: u64) -> Option<(Option<u8>, u16)> {
    let offset = address
        .checked_sub(PCI_ECAM_START)
        .filter(|offset| *offset < PCI_ECAM_SIZE)?;
    let register = u16::try_from(offset & 0xfff).ok()?;
    let slot = u8::try_from(offset >> 15 & 0x1f).ok()?;
    let function = offset >> 12 & 7;
    Some(((function == 0).then_some(slot), register))
}
