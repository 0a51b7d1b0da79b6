//! The guest's `hvc0`: output to a descriptor, and no input (virtio-console; Virtio 1.2, section 5.3).
//!
//! A reader that is slow or gone loses output; it never stops the guest, and nothing is kept here.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::memory::GuestRam;

use super::worker::{Events, Handler, Readiness, Worker, borrow};
use crate::virtio::buffers::{Buffers, Span};
use crate::virtio::device::{
    Activation, ActiveQueue, QueuePosition, RING_FEATURES, Suspended, VirtioDevice,
};

const DEVICE_TYPE: u32 = 3;
/// Port 0's: input, whose buffers stay with the device unused, and output.
const QUEUE_SIZES: [u16; 2] = [16, 64];
const OUTPUT: u16 = 1;
/// Linux writes a page at most at a time; what a request has more than this is dropped.
const MOST_BYTES: usize = 64 * 1024;
/// Descriptors in a request.
const MOST_DESCRIPTORS: usize = 64;
/// Bytes copied out of the guest at a time.
const CHUNK: usize = 4096;

/// The device.
#[derive(Debug)]
pub struct Console {
    output: Arc<OwnedFd>,
    worker: Option<Worker>,
}

impl Console {
    /// `output` is written without blocking, so it must be nonblocking.
    ///
    /// # Errors
    /// When the descriptor can't be made nonblocking.
    pub fn new(output: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&output)?;
        rustix::fs::fcntl_setfl(&output, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self {
            output: Arc::new(output),
            worker: None,
        })
    }

    pub(super) fn transmit(&self, activation: Activation) -> io::Result<Transmit> {
        let Activation { memory, queues, .. } = activation;
        let transmit = queues
            .into_iter()
            .find(|queue| queue.index == OUTPUT)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Transmit {
            memory,
            transmit,
            output: self.output.clone(),
        })
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    /// All zero: without `VIRTIO_CONSOLE_F_SIZE` and `_MULTIPORT` it means nothing.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let transmit = self.transmit(activation)?;
        self.worker = Some(Worker::start("console", transmit)?);
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

/// Writes what the guest says, on the device's thread.
#[derive(Debug)]
pub(super) struct Transmit {
    memory: GuestRam,
    transmit: ActiveQueue,
    output: Arc<OwnedFd>,
}

impl Handler for Transmit {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        events.add(borrow(&self.transmit.kick), 0, Readiness::IN)
    }

    fn ready(&mut self, _events: &Events, _token: u64, _readiness: Readiness) -> io::Result<()> {
        let output = &self.output;
        self.transmit
            .serve(&self.memory, MOST_DESCRIPTORS, |request| {
                // There is nothing to tell the driver: it has no part in what is lost.
                match request {
                    Ok(Buffers { readable, .. }) => write(readable, output),
                    Err(error) => log::debug!("console: {error}"),
                }
                0
            })
    }

    fn rest(&mut self, _events: &Events) -> Vec<QueuePosition> {
        vec![self.transmit.position()]
    }
}

fn write(mut text: Span<'_>, output: &OwnedFd) {
    let mut left = text.len().min(MOST_BYTES);
    while left > 0 {
        let mut chunk = [0; CHUNK];
        let Some(part) = text.take_front(left.min(CHUNK)) else {
            return;
        };
        let count = part.copy_to(&mut chunk);
        left -= count;
        match rustix::io::write(output, &chunk[..count]) {
            Ok(written) if written == count => {}
            // Full, cut short, or no reader: the rest of this request is lost.
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::devices::driver::{Driver, buffer_in, buffer_out};

    fn console() -> (Console, std::fs::File) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        (Console::new(writer).unwrap(), reader.into())
    }

    /// Sends what the driver has offered on its output queue, and returns what came out.
    fn sent(driver: &Driver) -> Vec<u8> {
        let (console, mut reader) = console();
        let mut transmit = Transmit {
            memory: driver.memory().clone(),
            transmit: driver.active_queue(OUTPUT),
            output: console.output.clone(),
        };
        let events = crate::devices::worker::Events::new().unwrap();
        transmit.ready(&events, 0, Readiness::IN).unwrap();
        drop((console, transmit));
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        text
    }

    #[test]
    fn output_comes_out() {
        let driver = Driver::new();
        driver.write(0x10_0000, b"hello, ");
        driver.write(0x12_0000, b"world\n");
        driver.offer(&[buffer_out(0x10_0000, 7), buffer_out(0x12_0000, 6)]);

        assert_eq!(sent(&driver), b"hello, world\n");
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn device_writable_and_empty_buffers_say_nothing() {
        let driver = Driver::new();
        driver.offer(&[buffer_in(0x10_0000, 7), buffer_in(0x10_0000, 0)]);

        assert_eq!(sent(&driver), b"");
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn a_malformed_request_is_given_back() {
        let driver = Driver::new();
        driver.offer(&[buffer_out(u64::MAX, 7)]);

        assert_eq!(sent(&driver), b"");
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn a_request_too_long_is_cut() {
        let driver = Driver::new();
        driver.offer(&[buffer_out(0x10_0000, 0x2_0000)]);

        assert_eq!(sent(&driver).len(), MOST_BYTES);
    }

    #[test]
    fn a_reader_that_does_not_read_loses_output_and_stops_nobody() {
        let driver = Driver::new();
        let (console, reader) = console();
        let mut transmit = Transmit {
            memory: driver.memory().clone(),
            transmit: driver.active_queue(OUTPUT),
            output: console.output.clone(),
        };
        let events = crate::devices::worker::Events::new().unwrap();

        for _ in 0..32 {
            driver.offer(&[buffer_out(0x10_0000, 0x1_0000)]);
            transmit.ready(&events, 0, Readiness::IN).unwrap();
        }

        assert_eq!(driver.used().len(), 32);
        drop(reader);
    }

    #[test]
    fn no_reader_is_no_error() {
        let driver = Driver::new();
        let (console, reader) = console();
        drop(reader);
        let mut transmit = Transmit {
            memory: driver.memory().clone(),
            transmit: driver.active_queue(OUTPUT),
            output: console.output.clone(),
        };
        driver.offer(&[buffer_out(0x10_0000, 16)]);

        let events = crate::devices::worker::Events::new().unwrap();
        transmit.ready(&events, 0, Readiness::IN).unwrap();

        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn a_driver_without_an_output_queue_is_refused() {
        let driver = Driver::new();
        let (mut console, _reader) = console();
        let mut activation = driver.activation(&console);
        activation.queues.truncate(1);

        let error = console.activate(activation).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
