//! The guest's free pages go back to the host (virtio-balloon; Virtio 1.2, section 5.5).
//!
//! All that it offers is free page reporting: the guest names pages that nothing of its uses, the host takes
//! what is in them away, and a page that the guest uses again is one of zeroes, or, where memory is a private
//! mapping of a file, the file's. The balloon itself is never asked for: its size is 0 for ever, and pages that a
//! driver puts into it all the same stay where they are.

use std::io;
use std::ptr::without_provenance_mut;

use rustix::mm::{Advice, madvise};
use vm_memory::VolatileSlice;

use super::worker::{Events, Handler, Readiness, Worker, borrow};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Buffers, ChainError};
use crate::virtio::device::{
    Activation, ActiveQueue, QueuePosition, RING_FEATURES, Suspended, VirtioDevice,
};

const DEVICE_TYPE: u32 = 5;
/// Inflation and deflation, and reporting. Linux and others count only the queues whose feature is offered, so that
/// reporting is the third here; by section 5.5.2 it would be the fifth. Linux reports 32 pieces at a time, and
/// wants a queue for as many.
const QUEUE_SIZES: [u16; 3] = [32; 3];
const REPORTING: u16 = 2;
/// Descriptors in a request. Pieces past them would be another request's.
const MOST_DESCRIPTORS: usize = 32;

/// `VIRTIO_BALLOON_F_PAGE_REPORTING`. `VIRTIO_BALLOON_F_PAGE_POISON` is not offered: a guest that counts on what is
/// in its free pages doesn't report them (section 5.5.6.6).
const PAGE_REPORTING: u64 = 1 << 5;

/// What the host takes back whole.
const PAGE: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    worker: Option<Worker>,
}

impl Balloon {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES | PAGE_REPORTING
    }

    /// `num_pages`, of which the host wants none, and `actual`, which nobody here is interested in.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker = Some(Worker::start("balloon", Reports::new(activation))?);
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

/// Answers all queues, on the device's thread.
#[derive(Debug)]
pub(super) struct Reports {
    memory: GuestRam,
    queues: Vec<ActiveQueue>,
}

impl Reports {
    pub(super) fn new(activation: Activation) -> Self {
        let Activation { memory, queues, .. } = activation;
        Self { memory, queues }
    }
}

impl Handler for Reports {
    fn start(&mut self, events: &Events) -> io::Result<()> {
        for queue in &self.queues {
            events.add(borrow(&queue.kick), queue.index.into(), Readiness::IN)?;
        }
        Ok(())
    }

    fn ready(&mut self, _events: &Events, token: u64, _readiness: Readiness) -> io::Result<()> {
        for queue in &mut self.queues {
            if u64::from(queue.index) == token {
                let answer = if queue.index == REPORTING { free } else { keep };
                return queue.serve(&self.memory, MOST_DESCRIPTORS, answer);
            }
        }
        Ok(())
    }

    fn rest(&mut self, _events: &Events) -> Vec<QueuePosition> {
        self.queues.iter().map(ActiveQueue::position).collect()
    }
}

/// Takes away what is in the pages of a report. What is wrong with one is the guest's own loss.
fn free(report: Result<Buffers<'_>, ChainError>) -> u32 {
    let Ok(Buffers { writable, .. }) = report else {
        return 0;
    };
    for piece in writable.pieces() {
        if let Err(error) = discard(piece) {
            log::debug!("balloon: a reported piece stays: {error}");
        }
    }
    0
}

/// Pages that the driver gives or wants back: they were never taken.
fn keep(_pages: Result<Buffers<'_>, ChainError>) -> u32 {
    0
}

/// Gives the whole pages of a piece of guest memory back to the host.
fn discard(piece: &VolatileSlice<'_>) -> io::Result<()> {
    let start = piece.ptr_guard().as_ptr().addr();
    let end = start + piece.len();
    let (first, end) = (start.next_multiple_of(PAGE), end - end % PAGE);
    let Some(length) = end.checked_sub(first).filter(|length| *length > 0) else {
        return Ok(());
    };
    let pages = without_provenance_mut(first);
    // SAFETY: the pages are within guest memory, which everybody accesses as memory that may change at any time.
    unsafe { madvise(pages, length, Advice::LinuxDontNeed) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::driver::{Buffer, Driver, buffer_in, buffer_out};

    /// Pages of memory with something in them: all of a driver's that its queue doesn't need.
    const FIRST: u64 = 0x10_0000;
    const PAGES: u64 = 8;

    fn driver() -> Driver {
        let driver = Driver::new();
        driver.write(FIRST, &[7; PAGE * 8]);
        driver
    }

    fn report(driver: &Driver, buffers: &[Buffer]) {
        driver.offer(buffers);
        driver
            .active_queue(REPORTING)
            .serve(driver.memory(), MOST_DESCRIPTORS, free)
            .unwrap();
    }

    /// Which of the pages are still as they were; each other one is all zeroes.
    fn kept(driver: &Driver) -> Vec<u64> {
        let is_kept = |page: &u64| {
            let content = driver.read(FIRST + page * PAGE as u64, PAGE);
            let kept = content == [7; PAGE];
            assert!(kept || content == [0; PAGE], "page {page}");
            kept
        };
        (0..PAGES).filter(is_kept).collect()
    }

    #[test]
    fn what_is_in_reported_pages_goes() {
        let driver = driver();

        report(
            &driver,
            &[buffer_in(FIRST, 0x2000), buffer_in(FIRST + 0x6000, 0x1000)],
        );

        assert_eq!(kept(&driver), [2, 3, 4, 5, 7]);
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn what_is_next_to_a_report_stays() {
        let driver = driver();

        report(&driver, &[buffer_in(FIRST + 0x1800, 0x2000)]);

        assert_eq!(kept(&driver), [0, 1, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn pieces_without_a_whole_page_stay() {
        let driver = driver();

        report(
            &driver,
            &[
                buffer_in(FIRST + 1, 0x1000),
                buffer_in(FIRST + 0x2fff, 2),
                buffer_in(FIRST + 0x4000, 0xfff),
                buffer_in(FIRST + 0x5000, 0),
            ],
        );

        assert_eq!(kept(&driver), (0..PAGES).collect::<Vec<_>>());
    }

    #[test]
    fn a_report_of_what_is_not_ram_is_no_report() {
        let driver = driver();

        report(
            &driver,
            &[buffer_in(FIRST, 0x1000), buffer_in(0x3f_f000, 0x2000)],
        );

        assert_eq!(kept(&driver), (0..PAGES).collect::<Vec<_>>());
        assert_eq!(driver.used(), [(0, 0)]);
    }

    #[test]
    fn buffers_for_the_device_to_read_are_no_report() {
        let driver = driver();

        report(&driver, &[buffer_out(FIRST, 0x1000)]);

        assert_eq!(kept(&driver), (0..PAGES).collect::<Vec<_>>());
    }

    #[test]
    fn a_running_device_answers_and_stops() {
        let driver = driver();
        driver.offer(&[buffer_in(FIRST, 0x1000)]);
        let mut device = Balloon::new();
        let mut activation = driver.activation(&device);
        activation.queues.drain(..2);

        device.activate(activation).unwrap();
        driver.kick();
        driver.wait_for_interrupt();
        device.reset();

        assert_eq!(driver.used(), [(0, 0)]);
        assert_eq!(kept(&driver).len(), 7);
    }

    #[test]
    fn pages_of_the_balloon_stay() {
        let driver = driver();
        driver.write(0x20_0000, &0x100_u32.to_le_bytes());
        driver.offer(&[buffer_out(0x20_0000, 4)]);
        let mut device = Balloon::new();
        let mut activation = driver.activation(&device);
        activation.queues.truncate(1);

        device.activate(activation).unwrap();
        driver.kick();
        driver.wait_for_interrupt();
        device.reset();

        assert_eq!(driver.used(), [(0, 0)]);
        assert_eq!(kept(&driver).len(), 8);
    }
}
