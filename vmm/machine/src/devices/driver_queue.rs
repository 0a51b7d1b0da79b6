//! The driver's side of a queue that has many requests under way, for tests.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestRam;
use crate::virtio::device::{ActiveQueue, Interrupt};

/// Longer than any device takes; only one that hangs makes a test wait so long.
const PATIENCE: Duration = Duration::from_secs(60);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Interrupts, to be waited for.
#[derive(Debug)]
pub struct Interrupts {
    raised: Mutex<Receiver<()>>,
    raise: Sender<()>,
}

impl Interrupts {
    pub fn new() -> Arc<Self> {
        let (raise, raised) = channel();
        Arc::new(Self {
            raised: Mutex::new(raised),
            raise,
        })
    }

    /// Waits for one.
    pub fn wait(&self) {
        self.raised
            .lock()
            .unwrap()
            .recv_timeout(PATIENCE)
            .expect("the device did not interrupt");
    }

    /// Takes one, if it has been raised.
    pub fn take(&self) -> bool {
        self.raised.lock().unwrap().try_recv().is_ok()
    }
}

impl Interrupt for Interrupts {
    fn signal(&self) -> std::io::Result<()> {
        self.raise.send(()).map_err(std::io::Error::other)
    }
}

/// A split queue in guest memory, with its free descriptors.
#[derive(Debug)]
pub struct DriverQueue {
    memory: GuestRam,
    base: u64,
    size: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    offered: u16,
    seen: u16,
    kick: EventFd,
    pub interrupts: Arc<Interrupts>,
}

impl DriverQueue {
    /// A queue in the memory from `base` on; it takes less than 32 bytes for each entry and 4 KiB more.
    pub fn new(memory: &GuestRam, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            offered: 0,
            seen: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupts: Interrupts::new(),
        }
    }

    fn available(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size) + 3) & !3
    }

    /// The queue as the device gets it.
    pub fn queue(&self) -> Queue {
        let halves = |address: u64| {
            let low = u32::try_from(address & 0xffff_ffff).unwrap();
            (Some(low), Some(u32::try_from(address >> 32).unwrap()))
        };
        let mut queue = Queue::new(self.size).unwrap();
        let (low, high) = halves(self.base);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.available());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used());
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        queue
    }

    /// The queue as the transport hands it over.
    pub fn activate(&self, index: u16) -> ActiveQueue {
        ActiveQueue {
            index,
            queue: self.queue(),
            kick: self.kick.try_clone().unwrap(),
            interrupt: self.interrupts.clone(),
        }
    }

    /// Offers a chain of buffers, those that the device reads before those that it writes. Returns its head.
    pub fn offer(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let buffers = readable
            .iter()
            .map(|buffer| (*buffer, 0))
            .chain(writable.iter().map(|buffer| (*buffer, WRITE)));
        let chain: Vec<_> = buffers
            .map(|buffer| (self.free.pop().expect("a free descriptor"), buffer))
            .collect();
        for (place, (descriptor, ((address, length), flags))) in chain.iter().enumerate() {
            let (flags, next) = match chain.get(place + 1) {
                Some((next, _)) => (flags | NEXT, *next),
                None => (*flags, 0),
            };
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            let at = self.base + 16 * u64::from(*descriptor);
            self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
        let head = chain[0].0;
        self.chains
            .insert(head, chain.iter().map(|(index, _)| *index).collect());
        self.make_available(head);
        head
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn make_available(&mut self, head: u16) {
        let slot = self.available() + 4 + 2 * u64::from(self.offered % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        let index = GuestAddress(self.available() + 2);
        self.memory
            .store(self.offered, index, Ordering::Release)
            .unwrap();
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Takes back the next chain that the device has used: its head, and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .load(GuestAddress(self.used() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.seen {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.seen % self.size);
        let [head, length]: [u32; 2] = [
            self.memory.read_obj(GuestAddress(at)).unwrap(),
            self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
        ];
        self.seen = self.seen.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free
            .extend(self.chains.remove(&head).unwrap_or_default());
        Some((head, length))
    }

    /// The same, after waiting for it.
    pub fn wait_used(&mut self) -> (u16, u32) {
        loop {
            self.want_interrupt();
            if let Some(used) = self.take_used() {
                return used;
            }
            self.interrupts.wait();
        }
    }

    /// Asks for an interrupt at the next chain that is used (`used_event`).
    fn want_interrupt(&self) {
        let event = GuestAddress(self.available() + 4 + 2 * u64::from(self.size));
        self.memory
            .store(self.seen, event, Ordering::SeqCst)
            .unwrap();
        fence(Ordering::SeqCst);
    }
}
