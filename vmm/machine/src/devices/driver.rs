//! The driver's side of a device, for tests: guest memory, queues in it, and an interrupt to wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestRam;
use crate::virtio::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// The one queue that has requests in it. (The crate's mock starts anew each time it is made.)
const QUEUE_SIZE: u16 = 64;
pub const DESCRIPTORS: u32 = 0x1000;
pub const AVAILABLE: u32 = 0x2000;
const USED: u32 = 0x3000;

/// A buffer of the driver's request.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    address: u64,
    len: u32,
    flags: u16,
}

/// A buffer that the device reads.
pub fn buffer_out(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        flags: 0,
    }
}

/// A buffer that the device writes.
pub fn buffer_in(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        flags: WRITE,
    }
}

/// A driver with four mebibytes of memory, and one queue at its start.
#[derive(Debug)]
pub struct Driver {
    memory: GuestRam,
    offered: AtomicU16,
    kick: EventFd,
    interrupts: Arc<Interrupts>,
}

#[derive(Debug)]
struct Interrupts(
    std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
    std::sync::mpsc::Sender<()>,
);

impl Interrupt for Interrupts {
    fn signal(&self) -> std::io::Result<()> {
        self.1.send(()).map_err(std::io::Error::other)
    }
}

impl Driver {
    pub fn new() -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        Self {
            memory: crate::memory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap(),
            offered: AtomicU16::new(0),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupts: Arc::new(Interrupts(std::sync::Mutex::new(receiver), sender)),
        }
    }

    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    /// Makes a request of these buffers available, at the start of the descriptor table.
    pub fn offer(&self, buffers: &[Buffer]) {
        let last = buffers.len() - 1;
        for (index, buffer) in buffers.iter().enumerate() {
            let next = u16::try_from(index).unwrap() + 1;
            let flags = if index == last {
                buffer.flags
            } else {
                buffer.flags | NEXT
            };
            let descriptor = Descriptor::new(buffer.address, buffer.len, flags, next);
            let at = u64::from(DESCRIPTORS) + 16 * u64::from(next - 1);
            self.memory
                .write_obj(RawDescriptor::from(descriptor), GuestAddress(at))
                .unwrap();
        }
        self.publish();
    }

    /// Makes the last request available again, and kicks, if the ring has room.
    pub fn offer_again(&self) {
        let offered = self.offered.load(Ordering::SeqCst);
        if offered.wrapping_sub(self.used_count()) < QUEUE_SIZE {
            self.publish();
            self.kick();
        }
    }

    fn publish(&self) {
        // Every entry of the ring is 0, as memory was from the start.
        let offered = self.offered.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        self.write(u64::from(AVAILABLE) + 2, &offered.to_le_bytes());
    }

    /// How many requests the device has used, modulo 2^16.
    pub fn used_count(&self) -> u16 {
        let index = self.read(u64::from(USED) + 2, 2);
        u16::from_le_bytes([index[0], index[1]])
    }

    /// Head and length of everything that the device has used.
    pub fn used(&self) -> Vec<(u32, u32)> {
        let word = |at: u64| u32::from_le_bytes(self.read(at, 4).try_into().unwrap());
        (0..u64::from(self.used_count()))
            .map(|index| u64::from(USED) + 4 + 8 * index)
            .map(|at| (word(at), word(at + 4)))
            .collect()
    }

    /// The queue as the transport would hand it to the device.
    pub fn active_queue(&self, index: u16) -> ActiveQueue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS), None);
        queue.set_avail_ring_address(Some(AVAILABLE), None);
        queue.set_used_ring_address(Some(USED), None);
        queue.set_ready(true);
        ActiveQueue {
            index,
            queue,
            kick: self.kick.try_clone().unwrap(),
            interrupt: self.interrupts.clone(),
        }
    }

    /// All of a device's queues, each being the one queue of this driver.
    pub fn activation(&self, device: &dyn VirtioDevice) -> Activation {
        let queues = (0..)
            .zip(device.queue_max_sizes())
            .map(|(index, _)| self.active_queue(index))
            .collect();
        Activation {
            memory: self.memory.clone(),
            features: device.features(),
            queues,
            config_interrupt: self.interrupts.clone(),
            resumed: None,
        }
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Panics if there is none in a minute, which only a device that hangs needs.
    pub fn wait_for_interrupt(&self) {
        let interrupts = self.interrupts.0.lock().unwrap();
        interrupts.recv_timeout(Duration::from_secs(60)).unwrap();
    }
}
