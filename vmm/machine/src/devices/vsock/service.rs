//! The device's thread: waits for the guest, the sockets and the host's requests, and moves packets.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::inbox::VsockHandle;
use super::multiplexer::{Multiplexer, Sent};
use super::packet::Buffer;
use super::ring::{Ring, RingError};
use crate::memory::GuestRam;
use crate::threads::{self, ThreadClass};
use crate::virtio::device::{ActiveQueue, QueuePosition};

/// Names of the device's own descriptors to epoll, below those of sockets.
const TO_GUEST: u64 = 0;
const FROM_GUEST: u64 = 1;
const BELL: u64 = 2;
const STOP: u64 = 3;

/// Events taken at a time.
const MAX_EVENTS: usize = 64;
/// Packets taken from the guest before it gets some.
const MAX_PACKETS: usize = 64;

/// The thread at work. Dropping it ends it.
pub(super) struct Running {
    stop: EventFd,
    /// What the thread had when it was told to stop is wanted.
    suspending: Arc<AtomicBool>,
    rest: mpsc::Receiver<Rest>,
    thread: Option<JoinHandle<()>>,
}

/// What is left of the thread: it goes on with this.
pub(super) struct Rest {
    pub(super) multiplexer: Multiplexer,
    /// Of the queues to and from the guest.
    pub(super) positions: [QueuePosition; 2],
}

/// What the thread owns.
struct Service {
    multiplexer: Multiplexer,
    epoll: Arc<OwnedFd>,
    handle: VsockHandle,
    memory: GuestRam,
    to_guest: Ring,
    from_guest: Ring,
    kicks: [EventFd; 2],
    stop: EventFd,
}

/// Why the thread gave up.
#[derive(Debug, thiserror::Error)]
enum ServiceError {
    #[error("waiting for events")]
    Wait(#[source] rustix::io::Errno),
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl Running {
    pub(super) fn start(
        multiplexer: Multiplexer,
        handle: VsockHandle,
        memory: GuestRam,
        to_guest: ActiveQueue,
        from_guest: ActiveQueue,
    ) -> io::Result<Self> {
        let epoll = Arc::clone(multiplexer.epoll());
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        // Edge-triggered, each signal is one event, and the counters need no reading. The first packets may
        // have been there before anybody watched: the loop looks before it waits.
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(
            &epoll,
            borrow(&to_guest.kick),
            EventData::new_u64(TO_GUEST),
            edge,
        )?;
        epoll::add(
            &epoll,
            borrow(&from_guest.kick),
            EventData::new_u64(FROM_GUEST),
            edge,
        )?;
        epoll::add(&epoll, handle.bell(), EventData::new_u64(BELL), edge)?;
        // The thread's own descriptor: it is by that number that it is watched no more.
        let stopped = stop.try_clone()?;
        epoll::add(
            &epoll,
            borrow(&stopped),
            EventData::new_u64(STOP),
            EventFlags::IN,
        )?;
        let service = Service {
            multiplexer,
            epoll,
            handle: handle.clone(),
            memory,
            to_guest: Ring::new(to_guest.queue, to_guest.interrupt),
            from_guest: Ring::new(from_guest.queue, from_guest.interrupt),
            kicks: [to_guest.kick, from_guest.kick],
            stop: stopped,
        };
        handle.open();
        let suspending = Arc::new(AtomicBool::new(false));
        let (left, rest) = mpsc::sync_channel(1);
        let suspended = Arc::clone(&suspending);
        let run = move || service.run(&suspended, &left);
        let thread =
            threads::spawn(ThreadClass::Device, "vsock", run).inspect_err(|_| handle.close())?;
        Ok(Self {
            stop,
            suspending,
            rest,
            thread: Some(thread),
        })
    }

    /// Ends the thread; all connections stay. None when it has ended before, and they with it.
    pub(super) fn suspend(mut self) -> Option<Rest> {
        self.suspending.store(true, Ordering::Release);
        self.end();
        self.rest.recv().ok()
    }

    fn end(&mut self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("vsock: ending the device's thread: {error}");
        }
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

impl Service {
    fn run(mut self, suspending: &AtomicBool, rest: &mpsc::SyncSender<Rest>) {
        let served = self.serve();
        if let Err(error) = &served {
            log::error!("vsock: the device stops: {}", chain(error));
        }
        self.handle.close();
        if served.is_ok() && suspending.load(Ordering::Acquire) {
            // Whoever suspends waits for it.
            drop(rest.send(self.suspend()));
        } else {
            self.multiplexer.close();
        }
    }

    /// The connections' sockets go on being watched; who looks next sees what has happened to them.
    fn suspend(self) -> Rest {
        let [to_guest, from_guest] = &self.kicks;
        for own in [
            borrow(to_guest),
            borrow(from_guest),
            borrow(&self.stop),
            self.handle.bell(),
        ] {
            if let Err(error) = epoll::delete(&self.epoll, own) {
                log::error!("vsock: an event goes on being watched: {error}");
            }
        }
        Rest {
            positions: [self.to_guest.position(0), self.from_guest.position(1)],
            multiplexer: self.multiplexer,
        }
    }

    fn serve(&mut self) -> Result<(), ServiceError> {
        let mut events = [const { MaybeUninit::uninit() }; MAX_EVENTS];
        loop {
            let idle = self.move_packets(Instant::now())?;
            let timeout = self.timeout(idle);
            let events = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok((events, _)) => events,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(ServiceError::Wait(error)),
            };
            let now = Instant::now();
            let mut stop = false;
            for &mut Event { flags, data } in events {
                match data.u64() {
                    // What they are for is looked at in every round.
                    TO_GUEST | FROM_GUEST => {}
                    BELL => {
                        for request in self.handle.take() {
                            self.multiplexer.connect(
                                request.port,
                                request.stream,
                                request.connected,
                                now,
                            );
                        }
                    }
                    STOP => stop = true,
                    token => self.multiplexer.on_event(token, flags, now),
                }
            }
            self.multiplexer.on_deadlines(now);
            // Not before all events that came with it: none comes a second time.
            if stop {
                return Ok(());
            }
        }
    }

    /// Moves packets both ways. Returns whether there is nothing left to move.
    fn move_packets(&mut self, now: Instant) -> Result<bool, ServiceError> {
        let emptied = self.take_packets(now)?;
        let sent = self
            .multiplexer
            .send(&mut self.to_guest, &self.memory, now)?;
        self.from_guest.tell_driver(&self.memory)?;
        self.to_guest.tell_driver(&self.memory)?;
        // With as many resets waiting as may, the guest's packets wait for its buffers.
        let blocked = !self.multiplexer.takes_packets();
        Ok((emptied || blocked) && sent != Sent::Some)
    }

    /// Takes packets of the guest. Returns whether there are no more.
    fn take_packets(&mut self, now: Instant) -> Result<bool, RingError> {
        for _ in 0..MAX_PACKETS {
            if !self.multiplexer.takes_packets() {
                return Ok(false);
            }
            let Some(packet) = self.from_guest.next(&self.memory)? else {
                return Ok(true);
            };
            let descriptor = packet.head_index();
            if let Some((header, data)) =
                Buffer::new(&self.memory, packet, false).and_then(Buffer::take_header)
            {
                self.multiplexer.on_packet(&header, data, now);
            }
            self.from_guest.give_back(&self.memory, descriptor, 0)?;
        }
        Ok(false)
    }

    /// How long to wait: not at all with work left, else until something is due.
    fn timeout(&self, idle: bool) -> Option<Timespec> {
        if !idle {
            return Some(Timespec::default());
        }
        let due = self.multiplexer.next_deadline()?;
        Timespec::try_from(due.saturating_duration_since(Instant::now())).ok()
    }
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
