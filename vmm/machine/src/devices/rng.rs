//! Entropy for the guest, from the host's kernel (virtio-rng; Virtio 1.2, section 5.4).

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use super::worker::{Events, Handler, Readiness, Worker, borrow};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Buffers, ChainError};
use crate::virtio::device::{
    Activation, ActiveQueue, QueuePosition, RING_FEATURES, Suspended, VirtioDevice,
};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [16];
/// Linux asks for 64 bytes or less in one buffer; a request gets no more than this.
const MOST_BYTES: usize = 4096;
/// Descriptors in a request.
const MOST_DESCRIPTORS: usize = 16;
/// Bytes taken from the kernel at a time: up to 256 are never cut short (getrandom(2)).
const CHUNK: usize = 256;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl Rng {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker = Some(Worker::start("rng", Requests::new(activation)?)?);
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        let worker = self.worker.take();
        Ok(Suspended {
            positions: worker.map(Worker::suspend).unwrap_or_default(),
            state: Vec::new(),
            only_here: None,
        })
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Answers requests, on the device's thread.
#[derive(Debug)]
pub(super) struct Requests {
    memory: GuestRam,
    requests: ActiveQueue,
}

impl Requests {
    pub(super) fn new(activation: Activation) -> io::Result<Self> {
        let Activation { memory, queues, .. } = activation;
        let requests = queues
            .into_iter()
            .next()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { memory, requests })
    }
}

impl Handler for Requests {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.requests.kick), 0, Readiness::IN)
    }

    fn ready(&mut self, _events: &Events, _token: u64, _readiness: Readiness) -> io::Result<()> {
        self.requests.serve(&self.memory, MOST_DESCRIPTORS, fill)
    }

    fn rest(&mut self, _events: &Events) -> Vec<QueuePosition> {
        vec![self.requests.position()]
    }
}

/// Fills the first bytes of a request. One that is malformed gets none.
fn fill(request: Result<Buffers<'_>, ChainError>) -> u32 {
    let Ok(Buffers {
        readable,
        mut writable,
    }) = request
    else {
        return 0;
    };
    if !readable.is_empty() {
        return 0;
    }
    let mut left = writable.len().min(MOST_BYTES);
    let mut written = 0;
    while left > 0 {
        let mut entropy = [0; CHUNK];
        let wanted = left.min(CHUNK);
        let Ok(count) = getrandom(&mut entropy[..wanted], GetRandomFlags::empty()) else {
            break;
        };
        let Some(target) = writable.take_front(count) else {
            break;
        };
        target.copy_from(&entropy[..count]);
        left -= count;
        written += count;
    }
    // At most `MOST_BYTES`.
    u32::try_from(written).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver::{Driver, buffer_in, buffer_out};

    fn answered(driver: &Driver) -> u32 {
        let mut requests = driver.active_queue(0);
        requests
            .serve(driver.memory(), MOST_DESCRIPTORS, fill)
            .unwrap();
        driver.used()[0].1
    }

    #[test]
    fn buffers_are_filled() {
        let driver = Driver::new();
        driver.offer(&[buffer_in(0x10_0000, 64), buffer_in(0x11_0000, 700)]);

        let written = answered(&driver);

        assert_eq!(written, 764);
        assert_ne!(driver.read(0x10_0000, 64), [0; 64]);
        assert_ne!(driver.read(0x11_0000 + 636, 64), [0; 64]);
        assert_eq!(driver.read(0x11_0000 + 700, 64), [0; 64]);
    }

    #[test]
    fn a_request_gets_no_more_than_the_bound() {
        let driver = Driver::new();
        driver.offer(&[buffer_in(0x10_0000, 0x8000)]);

        assert_eq!(answered(&driver), 4096);
        assert_eq!(driver.read(0x10_0000 + 4096, 16), [0; 16]);
    }

    #[test]
    fn a_request_that_says_something_gets_nothing() {
        let driver = Driver::new();
        driver.offer(&[buffer_out(0x10_0000, 8), buffer_in(0x11_0000, 8)]);

        assert_eq!(answered(&driver), 0);
    }

    #[test]
    fn a_request_outside_ram_gets_nothing() {
        let driver = Driver::new();
        driver.offer(&[buffer_in(crate::layout::PCI_MMIO32_START, 8)]);

        assert_eq!(answered(&driver), 0);
    }

    #[test]
    fn an_empty_request_gets_nothing() {
        let driver = Driver::new();
        driver.offer(&[buffer_in(0x10_0000, 0)]);

        assert_eq!(answered(&driver), 0);
    }

    #[test]
    fn a_running_device_answers_and_stops() {
        let driver = Driver::new();
        driver.offer(&[buffer_in(0x10_0000, 64)]);
        let mut device = Rng::new();

        device.activate(driver.activation(&device)).unwrap();
        driver.kick();
        driver.wait_for_interrupt();
        device.reset();

        assert_eq!(driver.used(), [(0, 64)]);
    }
}
