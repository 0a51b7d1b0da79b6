//! Memory that comes and goes while the machine runs (virtio-mem; Virtio 1.3, section 5.15).
//!
//! ```text
//! request.rs   what the driver asks for
//! blocks.rs    which blocks are plugged, and which may be
//! backing.rs   what is behind them
//! ```
//!
//! The supervisor says how much there is to be, and the driver plugs as much, block by block, where it likes, or unplugs
//! what is too much, if it can. More than was asked for is never plugged. What isn't plugged is not there
//! (`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`).

mod backing;
mod blocks;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::Address;

use self::backing::Backing;
pub use self::backing::Slots;
use self::blocks::{BLOCK, Blocks, CHUNK_BLOCKS};
use self::request::{Answer, Request, Run};
use super::worker::{Events, Handler, Readiness, Worker, borrow};
use crate::control::{AddedMemory, MemoryRefused};
use crate::memory::{GuestRam, ManagedRegion};
use crate::threads::ThreadClass;
use crate::virtio::device::{
    Activation, ActiveQueue, Interrupt, QueuePosition, RING_FEATURES, Suspended, VirtioDevice,
};

const DEVICE_TYPE: u32 = 24;
/// The driver has one request under way at a time.
const QUEUE_SIZES: [u16; 1] = [16];
/// A request and its answer; a driver may cut them.
const MOST_DESCRIPTORS: usize = 8;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of the device configuration (section 5.15.4).
const CONFIG_SIZE: usize = 56;

/// The device.
#[derive(Debug)]
pub struct Mem {
    shared: Arc<Mutex<State>>,
    worker: Option<Worker>,
}

impl Mem {
    /// One with nothing plugged, and nothing asked for.
    pub fn new(region: ManagedRegion, slots: Box<dyn Slots>) -> Self {
        let state = State {
            blocks: Blocks::new(region.start.raw_value(), region.size),
            backing: Backing::new(region, slots),
            changes: 0,
            driver: None,
        };
        Self {
            shared: Arc::new(Mutex::new(state)),
            worker: None,
        }
    }

    /// What asks for memory with.
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }

    pub(super) fn requests(&self, activation: Activation) -> io::Result<Requests> {
        let queue = activation.queues.into_iter().next();
        Ok(Requests {
            memory: activation.memory,
            queue: queue.ok_or(io::ErrorKind::InvalidInput)?,
            shared: Arc::clone(&self.shared),
        })
    }
}

/// Asks a device for memory, whatever the device does.
#[derive(Debug)]
pub struct MemHandle(Arc<Mutex<State>>);

impl MemHandle {
    /// Has the driver plug or unplug until this many MiB are plugged.
    ///
    /// # Errors
    /// When it is more than the region has, or not of whole blocks.
    pub fn resize(&self, mib: u64) -> Result<(), MemoryRefused> {
        let mut state = lock(&self.0);
        let region_mib = state.blocks.size() >> 20;
        if mib > region_mib {
            return Err(MemoryRefused::TooMuch { region_mib });
        }
        let bytes = mib << 20;
        if !bytes.is_multiple_of(BLOCK) {
            return Err(MemoryRefused::Blocks);
        }
        if state.blocks.requested() != bytes {
            state.blocks.request(bytes);
            state.tell();
        }
        Ok(())
    }

    /// What was asked for, and what is there.
    pub fn added(&self) -> AddedMemory {
        let state = lock(&self.0);
        AddedMemory {
            requested_mib: state.blocks.requested() >> 20,
            plugged_mib: state.blocks.plugged() >> 20,
        }
    }
}

/// What the device, its thread and its handle have in common.
#[derive(Debug)]
struct State {
    blocks: Blocks,
    backing: Backing,
    /// How often the configuration has changed, modulo 256.
    changes: u8,
    /// Of the driver that is to hear of changes.
    driver: Option<Arc<dyn Interrupt>>,
}

impl State {
    /// The driver is to look at the configuration again.
    fn tell(&mut self) {
        self.changes = self.changes.wrapping_add(1);
        if let Some(interrupt) = &self.driver
            && let Err(error) = interrupt.signal()
        {
            log::warn!("mem: telling the driver of another size: {error}");
        }
    }

    fn answer(&mut self, request: Request) -> Answer {
        let before = self.blocks.plugged();
        let answer = match request {
            Request::Plug(run) => self.plug(run),
            Request::Unplug(run) => match self.blocks.unpluggable(run) {
                Ok(blocks) => self.unplug(blocks),
                Err(answer) => answer,
            },
            Request::UnplugAll => self.unplug(self.blocks.all_plugged()),
            Request::State(run) => self.blocks.state(run),
        };
        if self.blocks.plugged() != before {
            self.changes = self.changes.wrapping_add(1);
        }
        answer
    }

    fn plug(&mut self, run: Run) -> Answer {
        let blocks = match self.blocks.pluggable(run) {
            Ok(blocks) => blocks,
            Err(answer) => return answer,
        };
        let mut next = blocks.start;
        while next < blocks.end {
            let end = blocks.end.min((next / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS);
            if let Err(error) = self.backing.plug(next..end) {
                log::warn!("mem: the host has no more for the guest: {error}");
                // What can't be taken back stays plugged, and counts.
                self.unplug(blocks.start..next);
                return Answer::Nack;
            }
            for block in next..end {
                self.blocks.set(block, true);
            }
            next = end;
        }
        Answer::Ack
    }

    /// Of blocks that are plugged.
    fn unplug(&mut self, blocks: impl IntoIterator<Item = usize>) -> Answer {
        for block in blocks {
            if let Err(error) = self.backing.unplug(block) {
                log::warn!("mem: a block stays plugged: {error}");
                return Answer::Nack;
            }
            self.blocks.set(block, false);
        }
        Answer::Ack
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        for (offset, value) in [
            (0, BLOCK),
            (16, self.blocks.start()),
            (24, self.blocks.size()),
            (32, self.blocks.usable()),
            (40, self.blocks.plugged()),
            (48, self.blocks.requested()),
        ] {
            config[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }
        config
    }
}

/// How much was asked for when the device was suspended.
fn known_request(state: &[u8]) -> io::Result<u64> {
    let bytes = state
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(u64::from_le_bytes(bytes))
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES | UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let config = lock(&self.shared).config();
        let known = config.get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(known) {
            *to = *from;
        }
    }

    fn config_changes(&self) -> u8 {
        lock(&self.shared).changes
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let interrupt = Arc::clone(&activation.config_interrupt);
        let known = activation
            .resumed
            .as_deref()
            .map(known_request)
            .transpose()?;
        let requests = self.requests(activation)?;
        self.worker = Some(Worker::start_as(ThreadClass::Memory, "mem", requests)?);
        let mut state = lock(&self.shared);
        state.driver = Some(interrupt);
        if known.is_some_and(|known| known != state.blocks.requested()) {
            state.tell();
        }
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        let worker = self.worker.take();
        let positions = worker.map(Worker::suspend).unwrap_or_default();
        let mut state = lock(&self.shared);
        state.driver = None;
        Ok(Suspended {
            positions,
            // A driver that goes on where something else is asked for has to hear of that.
            state: state.blocks.requested().to_le_bytes().to_vec(),
            only_here: None,
        })
    }

    /// What is plugged stays so (section 5.15.5): the guest may use it, whoever drives the device.
    fn reset(&mut self) {
        self.worker = None;
        lock(&self.shared).driver = None;
    }
}

/// Answers one request after the other, on the device's thread.
#[derive(Debug)]
pub(super) struct Requests {
    memory: GuestRam,
    queue: ActiveQueue,
    shared: Arc<Mutex<State>>,
}

impl Handler for Requests {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.queue.kick), 0, Readiness::IN)
    }

    fn ready(&mut self, _events: &Events, _token: u64, _readiness: Readiness) -> io::Result<()> {
        let shared = &self.shared;
        self.queue
            .serve(&self.memory, MOST_DESCRIPTORS, |buffers| match buffers {
                Ok(buffers) => request::serve(buffers, |request| lock(shared).answer(request)),
                Err(_) => 0,
            })
    }

    fn rest(&mut self, _events: &Events) -> Vec<QueuePosition> {
        vec![self.queue.position()]
    }
}

/// A panic of another thread ends the process, so nobody sees a value that it left half-changed.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
