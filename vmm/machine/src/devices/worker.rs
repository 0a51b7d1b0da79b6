//! The event loop of a device thread: a device writes only what to do when a descriptor is ready.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::threads::{self, ThreadClass};
use crate::virtio::device::QueuePosition;

pub use rustix::event::epoll::EventFlags as Readiness;

/// The kill event's token; a handler can't use it.
const KILL: u64 = u64::MAX;
/// Events taken from the kernel at a time.
const BATCH: usize = 32;

/// The descriptors that a worker waits for. Level-triggered, unless `EventFlags::ET` is asked for.
#[derive(Debug)]
pub struct Events {
    epoll: OwnedFd,
}

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    /// Waits for `readiness` of `source`; the handler is then called with `token`.
    ///
    /// # Errors
    /// When `token` is `u64::MAX`, or the kernel refuses the descriptor.
    pub fn add(&self, source: impl AsFd, token: u64, readiness: Readiness) -> io::Result<()> {
        if token == KILL {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        epoll::add(
            &self.epoll,
            source,
            epoll::EventData::new_u64(token),
            readiness,
        )?;
        Ok(())
    }

    /// Changes what is waited for on a source that was added.
    ///
    /// # Errors
    /// When `token` is `u64::MAX`, or the source was not added.
    pub fn modify(&self, source: impl AsFd, token: u64, readiness: Readiness) -> io::Result<()> {
        if token == KILL {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        epoll::modify(
            &self.epoll,
            source,
            epoll::EventData::new_u64(token),
            readiness,
        )?;
        Ok(())
    }

    /// Waits no longer for a source. An event of it that was already taken from the
    /// kernel in the same batch may still reach the handler.
    ///
    /// # Errors
    /// When the source was not added.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        epoll::delete(&self.epoll, source)?;
        Ok(())
    }
}

/// What a device does on its thread. It is dropped there when the worker ends.
pub trait Handler: Send + 'static {
    /// Adds the first sources. Runs on the worker's thread; an error is returned by [`Worker::start`].
    ///
    /// # Errors
    /// Whatever keeps the device from running.
    fn start(&mut self, events: &Events) -> io::Result<()>;

    /// The source added with `token` is ready.
    ///
    /// # Errors
    /// Ends the worker: the device serves nothing until the driver resets it.
    fn ready(&mut self, events: &Events, token: u64, readiness: Readiness) -> io::Result<()>;

    /// The worker ends. Where the handler is in its queues, with nothing under way.
    fn rest(&mut self, _events: &Events) -> Vec<QueuePosition> {
        Vec::new()
    }
}

/// A running device thread. Dropping it ends it.
#[derive(Debug)]
pub struct Worker {
    kill: EventFd,
    rest: mpsc::Receiver<Vec<QueuePosition>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread of class [`ThreadClass::Device`] that runs `handler`.
    ///
    /// # Errors
    /// When the thread can't be made, or [`Handler::start`] fails.
    pub fn start(name: &'static str, handler: impl Handler) -> io::Result<Self> {
        Self::start_as(ThreadClass::Device, name, handler)
    }

    /// The same with a thread of another class.
    ///
    /// # Errors
    /// As there.
    pub fn start_as(
        class: ThreadClass,
        name: &'static str,
        handler: impl Handler,
    ) -> io::Result<Self> {
        // All descriptors are made by the new thread, so that the caller, which may be
        // a virtual processor's thread, needs no system calls for it.
        let (started, outcome) = mpsc::sync_channel(1);
        let (ended, rest) = mpsc::sync_channel(1);
        let thread = threads::spawn(class, name, move || {
            let (mut handler, events) = match prepare(handler) {
                Ok((handler, events, kill)) => {
                    if started.send(Ok(kill)).is_err() {
                        return;
                    }
                    (handler, events)
                }
                Err(error) => {
                    // The caller waits for this; were it gone, nobody could be told.
                    drop(started.send(Err(error)));
                    return;
                }
            };
            if let Err(error) = run(&mut handler, &events) {
                log::error!("{name}: the device stops until its driver resets it: {error}");
            }
            // Whoever wants to know waits for it.
            drop(ended.send(handler.rest(&events)));
        })?;
        let outcome = outcome
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the device thread ended at its start")));
        match outcome {
            Ok(kill) => Ok(Self {
                kill,
                rest,
                thread: Some(thread),
            }),
            Err(error) => {
                drop(thread.join());
                Err(error)
            }
        }
    }

    /// Ends the thread and waits for it.
    pub fn stop(self) {
        drop(self);
    }

    /// Ends the thread, and tells where its handler was.
    pub fn suspend(mut self) -> Vec<QueuePosition> {
        self.end();
        // A thread that panicked has ended the process.
        self.rest.recv().unwrap_or_default()
    }

    fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        // Adding 1 to a counter that is never read can't block before 2^64 calls.
        if let Err(error) = self.kill.write(1) {
            log::error!("cannot end a device thread: {error}");
        }
        if thread.join().is_err() {
            log::error!("a device thread panicked");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

fn prepare<H: Handler>(mut handler: H) -> io::Result<(H, Events, EventFd)> {
    let kill = EventFd::new(EFD_NONBLOCK)?;
    let events = Events::new()?;
    epoll::add(
        &events.epoll,
        borrow(&kill),
        epoll::EventData::new_u64(KILL),
        Readiness::IN,
    )?;
    handler.start(&events)?;
    Ok((handler, events, kill))
}

fn run(handler: &mut impl Handler, events: &Events) -> io::Result<()> {
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        batch.clear();
        match epoll::wait(&events.epoll, spare_capacity(&mut batch), None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if batch.iter().any(|event| event.data.u64() == KILL) {
            return Ok(());
        }
        for event in batch.drain(..) {
            handler.ready(events, event.data.u64(), event.flags)?;
        }
    }
}

/// `EventFd` has no `AsFd`.
#[must_use]
pub fn borrow(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Echo {
        kick: EventFd,
        answers: mpsc::Sender<u64>,
        dropped: Arc<AtomicU64>,
    }

    impl Handler for Echo {
        fn start(&mut self, events: &Events) -> io::Result<()> {
            events.add(borrow(&self.kick), 7, Readiness::IN)
        }

        fn ready(&mut self, _events: &Events, token: u64, _: Readiness) -> io::Result<()> {
            let count = self.kick.read()?;
            self.answers.send(token + count).map_err(io::Error::other)
        }
    }

    impl Drop for Echo {
        fn drop(&mut self) {
            self.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_worker_calls_its_handler_and_drops_it_before_stop_returns() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (answers, received) = mpsc::channel();
        let dropped = Arc::new(AtomicU64::new(0));
        let worker = Worker::start(
            "echo",
            Echo {
                kick: kick.try_clone().unwrap(),
                answers,
                dropped: dropped.clone(),
            },
        )
        .unwrap();

        kick.write(3).unwrap();
        let answer = received.recv().unwrap();
        worker.stop();

        assert_eq!(answer, 10);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }

    struct Refuses;

    impl Handler for Refuses {
        fn start(&mut self, events: &Events) -> io::Result<()> {
            events.add(rustix::stdio::stdin(), KILL, Readiness::IN)
        }

        fn ready(&mut self, _: &Events, _: u64, _: Readiness) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_error_at_the_start_reaches_the_caller() {
        let error = Worker::start("refuses", Refuses).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
