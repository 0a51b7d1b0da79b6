//! A virtio device as a PCI function: its configuration space, its one BAR, its MSI-X.
//!
//! The BAR is where the guest puts it, within the window for 32-bit BARs, and starts out
//! where nobody needs to move it. A guest that moves it elsewhere, or onto another
//! function's, has a function that answers nowhere.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PciError;
use super::config_space::{COMMAND_MEMORY, ConfigSpace, Identity, header, natural};
use super::msix::{self, Msix, VectorState};
use super::platform::{MsiLine, Platform};
use crate::layout::{PCI_MMIO32_SIZE, PCI_MMIO32_START};
use crate::memory::GuestRam;
use crate::virtio::device::{Interrupt, VirtioDevice};
use crate::virtio::transport::{COMMON_SIZE, RestoreError, Transport, TransportState};

/// Size of the BAR; the layout below leaves a page for each structure.
pub const BAR_SIZE: u32 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;

/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// As many queues as have a doorbell in a page and a vector.
const MAX_QUEUES: usize = msix::MAX_VECTORS - 1;

/// Red Hat's vendor id, which all virtio devices have (Virtio 1.2, section 4.1.2).
const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device ids are the device's type after this.
const VIRTIO_DEVICE_BASE: u32 = 0x1040;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// Structure types (Virtio 1.2, section 4.1.4).
const STRUCTURE_COMMON: u8 = 1;
const STRUCTURE_NOTIFY: u8 = 2;
const STRUCTURE_ISR: u8 = 3;
const STRUCTURE_DEVICE: u8 = 4;
const STRUCTURE_PCI: u8 = 5;

/// Offsets in the capability of `STRUCTURE_PCI` (section 4.1.4.9).
const WINDOW_BAR: u8 = 4;
const WINDOW_OFFSET: u8 = 8;
const WINDOW_LENGTH: u8 = 12;
const WINDOW_DATA: u8 = 16;

/// Where a function's BAR answers now, to be looked at without the function's lock. Written by the function alone.
#[derive(Debug, Default)]
pub struct Place(AtomicU32);

impl Place {
    /// The BAR's address, if it answers at all.
    pub fn get(&self) -> Option<u32> {
        Some(self.0.load(Ordering::Acquire)).filter(|address| *address != 0)
    }

    fn set(&self, address: Option<u32>) {
        self.0.store(address.unwrap_or(0), Ordering::Release);
    }
}

/// A function as it is put aside.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FunctionState {
    /// Configuration space.
    pub config: Vec<u8>,
    pub vectors: Vec<VectorState>,
    pub transport: TransportState,
}

/// One virtio device on the bus.
#[derive(Debug)]
pub struct VirtioFunction {
    identity: Identity,
    platform: Arc<dyn Platform>,
    place: Arc<Place>,
    config: ConfigSpace,
    /// Where the MSI-X capability is.
    msix_capability: u8,
    /// Where the window onto the BAR is.
    window: u8,
    msix: Msix,
    transport: Transport,
}

/// A line as the virtio device sees it.
#[derive(Debug)]
struct Vector(Arc<dyn MsiLine>);

impl Interrupt for Vector {
    fn signal(&self) -> io::Result<()> {
        self.0.signal()
    }

    fn event(&self) -> Option<EventFd> {
        self.0.event()
    }
}

impl VirtioFunction {
    /// A function whose BAR will be at `address` once the guest has memory decoding on.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        platform: Arc<dyn Platform>,
        address: u32,
    ) -> Result<Self, PciError> {
        let device_type = device.device_type();
        let queues = device.queue_max_sizes();
        let sizes_fit = queues.iter().all(|size| size.is_power_of_two());
        if queues.len() > MAX_QUEUES || !sizes_fit {
            return Err(PciError::Queues { device_type });
        }
        let identity = identity(device_type)?;

        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()
            .map_err(PciError::Doorbell)?;
        // One for each queue, and one for changes of the configuration.
        let lines = (0..=queues.len())
            .map(|_| platform.msi_line())
            .collect::<io::Result<Vec<_>>>()
            .map_err(PciError::Line)?;
        let vectors = lines
            .iter()
            .map(|line| Arc::new(Vector(line.clone())) as Arc<dyn Interrupt>)
            .collect();

        let mut config = ConfigSpace::new(&identity);
        config.set_bar0(address, BAR_SIZE);
        let (msix_capability, window) =
            add_capabilities(&mut config, lines.len()).ok_or(PciError::Capabilities)?;
        Ok(Self {
            identity,
            platform,
            place: Arc::default(),
            config,
            msix_capability,
            window,
            msix: Msix::new(lines),
            transport: Transport::new(device, memory, kicks, vectors),
        })
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Follows the BAR's place.
    pub fn place(&self) -> Arc<Place> {
        self.place.clone()
    }

    /// What the guest has in the BAR's register.
    pub fn bar(&self) -> u32 {
        self.config.u32(header::BAR0)
    }

    /// A guest's read of configuration space.
    pub fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((target, len)) = self.through_window(offset, data.len()) {
            self.read_structure(target, &mut data[..len]);
        } else {
            self.config.read(offset, data);
        }
    }

    /// A guest's write to configuration space.
    pub fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((target, len)) = self.through_window(offset, data.len()) {
            self.write_structure(target, &data[..len]);
        }
        let control = self.config.u16(self.msix_capability + 2);
        self.msix.set_control(control);
        self.follow_bar();
    }

    /// A guest's read of memory, `offset` bytes after the BAR's start.
    pub fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        self.read_structure(offset, data);
    }

    /// A guest's write to memory, `offset` bytes after the BAR's start.
    pub fn write_bar(&mut self, offset: u64, data: &[u8]) {
        self.write_structure(offset, data);
    }

    /// Ends the device. The guest finds it as it was before its driver came.
    pub fn stop(&mut self) {
        self.transport.reset();
    }

    /// Has the device stand still. See [`Transport::suspend`].
    pub fn suspend(&mut self) -> io::Result<FunctionState> {
        Ok(FunctionState {
            config: self.config.bytes().to_vec(),
            vectors: self.msix.state(),
            transport: self.transport.suspend()?,
        })
    }

    /// Has the device go on.
    pub fn resume(&mut self) {
        self.transport.resume();
    }

    /// Makes this function, that no guest has seen yet, what `state` says, but for its device.
    pub fn restore(&mut self, state: &FunctionState) {
        self.config.restore(&state.config);
        let control = self.config.u16(self.msix_capability + 2);
        self.msix.restore(&state.vectors, control);
        self.follow_bar();
    }

    /// Has the device go on where `state` says, when interrupts reach the guest. See [`Transport::restore`].
    ///
    /// # Errors
    /// When it can't be what is said of it.
    pub fn restore_device(&mut self, state: TransportState) -> Result<(), RestoreError> {
        self.transport.restore(state)
    }

    /// Answers where the configuration says, with the doorbells there too.
    fn follow_bar(&mut self) {
        let decoding = self.config.u16(header::COMMAND) & COMMAND_MEMORY != 0;
        let wanted = Some(self.bar()).filter(|address| decoding && in_window(*address));
        let current = self.place.get();
        if wanted == current {
            return;
        }
        self.place.set(None);
        if let Some(address) = current {
            for (kick, doorbell) in self.transport.kicks().iter().zip(doorbells(address)) {
                self.detach(doorbell, kick);
            }
        }
        if let Some(address) = wanted
            && self.attach_all(address)
        {
            self.place.set(wanted);
        }
    }

    /// Attaches all doorbells of a BAR, or none.
    fn attach_all(&self, address: u32) -> bool {
        let kicks = self.transport.kicks();
        for (index, (kick, doorbell)) in kicks.iter().zip(doorbells(address)).enumerate() {
            if let Err(error) = self.platform.attach_doorbell(doorbell, kick) {
                // The guest has put it onto another function.
                log::debug!("no BAR at {address:#x}: {error}");
                for (kick, doorbell) in kicks[..index].iter().zip(doorbells(address)) {
                    self.detach(doorbell, kick);
                }
                return false;
            }
        }
        true
    }

    fn detach(&self, doorbell: u64, kick: &EventFd) {
        if let Err(error) = self.platform.detach_doorbell(doorbell, kick) {
            log::error!("the doorbell at {doorbell:#x} stays: {error}");
        }
    }

    fn read_structure(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.transport.read_common(within, data),
            DEVICE => self.transport.read_device(within, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            MSIX_PENDING => self.msix.read_pending(within, data),
            // The ISR among them: it is for INTx (section 4.1.4.5).
            _ => data.fill(0),
        }
    }

    fn write_structure(&mut self, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.transport.write_common(within, data),
            DEVICE => self.transport.write_device(within, data),
            NOTIFY => {
                let queue = within / u64::from(NOTIFY_MULTIPLIER);
                if within.is_multiple_of(u64::from(NOTIFY_MULTIPLIER))
                    && let Ok(queue) = usize::try_from(queue)
                {
                    self.transport.notify(queue);
                }
            }
            MSIX_TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }

    /// If an access to configuration space is one to the window's data, where in the BAR it
    /// goes and how long it is (section 4.1.4.9.1).
    fn through_window(&self, offset: u16, len: usize) -> Option<(u64, usize)> {
        if offset != u16::from(self.window + WINDOW_DATA) || !natural(offset, len) {
            return None;
        }
        let [bar, ..] = self.config.u32(self.window + WINDOW_BAR).to_le_bytes();
        let target = self.config.u32(self.window + WINDOW_OFFSET);
        let length = self.config.u32(self.window + WINDOW_LENGTH);
        let aligned = matches!(length, 1 | 2 | 4) && target.is_multiple_of(length);
        let inside = target
            .checked_add(length)
            .is_some_and(|end| end <= BAR_SIZE);
        let length = usize::try_from(length).ok()?;
        (bar == 0 && aligned && inside && length <= len).then_some((u64::from(target), length))
    }
}

/// Where the doorbells of a BAR's queues are.
fn doorbells(address: u32) -> impl Iterator<Item = u64> {
    let first = u64::from(address) + NOTIFY;
    (first..).step_by(NOTIFY_MULTIPLIER as usize)
}

/// Whether a BAR at `address` has all of itself in the window.
fn in_window(address: u32) -> bool {
    let start = u64::from(address);
    start >= PCI_MMIO32_START && start + u64::from(BAR_SIZE) <= PCI_MMIO32_START + PCI_MMIO32_SIZE
}

/// Adds all capabilities; where the MSI-X one and the window are.
fn add_capabilities(config: &mut ConfigSpace, vectors: usize) -> Option<(u8, u8)> {
    let page = u32::try_from(PAGE).ok()?;
    let mut structure = |kind, offset, length, extra: &[u8], writable: &[u8]| {
        let body = structure_body(kind, offset, length, extra)?;
        config.add_capability(CAPABILITY_VENDOR, &body, writable)
    };
    structure(STRUCTURE_COMMON, COMMON, COMMON_SIZE, &[], &[])?;
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    structure(STRUCTURE_NOTIFY, NOTIFY, page, &multiplier, &[])?;
    structure(STRUCTURE_ISR, ISR, 1, &[], &[])?;
    structure(STRUCTURE_DEVICE, DEVICE, page, &[], &[])?;
    // Bar, offset, length and data are the guest's to write.
    let mut writable = [0; 18];
    writable[usize::from(WINDOW_BAR - 2)] = 0xff;
    writable[usize::from(WINDOW_OFFSET - 2)..].fill(0xff);
    let window = structure(STRUCTURE_PCI, 0, 0, &[0; 4], &writable)?;

    let last = u16::try_from(vectors.checked_sub(1)?).ok()?;
    let mut body = Vec::with_capacity(10);
    body.extend(last.to_le_bytes());
    body.extend(u32::try_from(MSIX_TABLE).ok()?.to_le_bytes());
    body.extend(u32::try_from(MSIX_PENDING).ok()?.to_le_bytes());
    let control = msix::CONTROL_ENABLE | msix::CONTROL_MASK_ALL;
    let msix = config.add_capability(CAPABILITY_MSIX, &body, &control.to_le_bytes())?;
    Some((msix, window))
}

/// A virtio structure capability after its first two bytes: all are in BAR 0.
fn structure_body(kind: u8, offset: u64, length: u32, extra: &[u8]) -> Option<Vec<u8>> {
    let capability_length = u8::try_from(16 + extra.len()).ok()?;
    let mut body = vec![capability_length, kind, 0, 0, 0, 0];
    body.extend(u32::try_from(offset).ok()?.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    Some(body)
}

fn identity(device_type: u32) -> Result<Identity, PciError> {
    let device = device_type
        .checked_add(VIRTIO_DEVICE_BASE)
        .and_then(|id| u16::try_from(id).ok())
        .ok_or(PciError::DeviceType { device_type })?;
    Ok(Identity {
        vendor: VIRTIO_VENDOR,
        device,
        class: class(device_type),
        // Modern devices have revision 1 or more, and a subsystem id of 0x40 or more (section 4.1.2.1).
        revision: 1,
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: device,
    })
}

/// The class that fits best; drivers go by the device id.
fn class(device_type: u32) -> u32 {
    match device_type {
        // Network: Ethernet controller.
        1 => 0x02_00_00,
        // Block and file system: other mass storage.
        2 | 26 => 0x01_80_00,
        // Console and vsock: other communication.
        3 | 19 => 0x07_80_00,
        // Unclassified.
        _ => 0xff_00_00,
    }
}
