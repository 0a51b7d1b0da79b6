//! A queue's registers, before and after the driver has enabled it.
//!
//! Only [`OpenQueue`] has setters. Enabling consumes it, and the [`EnabledQueue`] that
//! comes out can be read, and checked against the guest's memory, but never changed:
//! no write of the driver can reach what has been checked.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use crate::memory::GuestRam;

/// Alignment and size of the parts of a split queue of `n` entries (Virtio 1.2, section 2.7).
const DESCRIPTOR_ALIGN: u64 = 16;
const DESCRIPTOR_SIZE: usize = 16;
const DRIVER_ALIGN: u64 = 2;
const DRIVER_ENTRY: usize = 2;
const DEVICE_ALIGN: u64 = 4;
const DEVICE_ENTRY: usize = 8;
/// Flags, index and event index, beside the entries of either ring.
const RING_EXTRA: usize = 6;

/// Why a queue can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    #[error("its size {0} is not a power of two up to the device's maximum")]
    Size(u16),
    #[error("its {part} at {address:#x} is not aligned")]
    Alignment { part: &'static str, address: u64 },
    #[error("its {part} of {len} bytes at {address:#x} is not in RAM")]
    Outside {
        part: &'static str,
        address: u64,
        len: usize,
    },
}

/// What the driver reads back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub size: u16,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// Which of the three addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Descriptors,
    Driver,
    Device,
}

/// A queue that the driver is setting up.
#[derive(Debug)]
pub struct OpenQueue {
    max_size: u16,
    registers: Registers,
}

impl OpenQueue {
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            registers: Registers {
                size: max_size,
                descriptors: 0,
                driver: 0,
                device: 0,
            },
        }
    }

    /// With registers that a driver has set before, if it can have.
    pub fn with(max_size: u16, registers: Registers) -> Option<Self> {
        let fits = registers.size.is_power_of_two() && registers.size <= max_size;
        fits.then_some(Self {
            max_size,
            registers,
        })
    }

    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// A size that the device can't have is ignored (Virtio 1.2, section 4.1.4.3.2).
    pub fn set_size(&mut self, size: u16) {
        if size.is_power_of_two() && size <= self.max_size {
            self.registers.size = size;
        }
    }

    /// Sets the low or the high half of an address.
    pub fn set_address(&mut self, part: Part, high: bool, value: u32) {
        let address = match part {
            Part::Descriptors => &mut self.registers.descriptors,
            Part::Driver => &mut self.registers.driver,
            Part::Device => &mut self.registers.device,
        };
        *address = if high {
            (*address & 0xffff_ffff) | u64::from(value) << 32
        } else {
            (*address & !0xffff_ffff) | u64::from(value)
        };
    }

    /// The driver's last word on this queue.
    pub fn enable(self) -> EnabledQueue {
        EnabledQueue {
            max_size: self.max_size,
            registers: self.registers,
        }
    }
}

/// A queue that the driver has enabled, and can no longer change.
#[derive(Debug)]
pub struct EnabledQueue {
    max_size: u16,
    registers: Registers,
}

impl EnabledQueue {
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// A queue to run, if all of it is in RAM.
    ///
    /// `Queue::is_valid` is not enough here: it looks at where the parts end only, so it
    /// takes one that starts in the gap below 4 GiB, and refuses one that ends with RAM.
    pub fn check(&self, memory: &GuestRam, event_idx: bool) -> Result<Queue, QueueError> {
        let Registers {
            size,
            descriptors,
            driver,
            device,
        } = self.registers;
        let entries = usize::from(size);
        check_part(
            memory,
            "descriptor table",
            descriptors,
            DESCRIPTOR_ALIGN,
            DESCRIPTOR_SIZE * entries,
        )?;
        check_part(
            memory,
            "available ring",
            driver,
            DRIVER_ALIGN,
            RING_EXTRA + DRIVER_ENTRY * entries,
        )?;
        check_part(
            memory,
            "used ring",
            device,
            DEVICE_ALIGN,
            RING_EXTRA + DEVICE_ENTRY * entries,
        )?;
        let refused = |_| QueueError::Size(size);
        let mut queue = Queue::new(self.max_size).map_err(refused)?;
        queue.try_set_size(size).map_err(refused)?;
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .map_err(refused)?;
        queue
            .try_set_avail_ring_address(GuestAddress(driver))
            .map_err(refused)?;
        queue
            .try_set_used_ring_address(GuestAddress(device))
            .map_err(refused)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

fn check_part(
    memory: &GuestRam,
    part: &'static str,
    address: u64,
    align: u64,
    len: usize,
) -> Result<(), QueueError> {
    if !address.is_multiple_of(align) {
        return Err(QueueError::Alignment { part, address });
    }
    let in_ram = u64::try_from(len)
        .ok()
        .and_then(|len| address.checked_add(len))
        .is_some()
        && memory.check_range(GuestAddress(address), len);
    if in_ram {
        Ok(())
    } else {
        Err(QueueError::Outside { part, address, len })
    }
}
