//! The threads that serve queues.
//!
//! All threads of a pool wait on one epoll descriptor. A notification of the driver wakes one of them, which takes
//! requests until there are none; before it serves one with more behind it, it wakes the next thread. So a
//! request alone costs one wake-up and no hand-over between threads, and a request that waits for
//! a disk holds up none but its own thread.
//!
//! A pool begins with few threads, since each costs a machine's start something, and the last of them that waits, before
//! it serves, has another one made: one waits as long as there are not as many as there may be.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::thread::UnshareFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::requests::RequestQueue;
use super::server::MessageServer;
use crate::threads::{self, ThreadClass};
use crate::virtio::device::QueuePosition;

/// How many threads a pool has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Threads {
    pub first: u16,
    pub most: u16,
}

/// Threads at work. Dropping it ends them, each after the request that it is serving.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    most: u16,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many wait, or will before they do anything else.
    waiting: AtomicU16,
    /// There are as many threads as there will be.
    is_full: AtomicBool,
    epoll: OwnedFd,
    queues: Vec<RequestQueue>,
    server: Arc<dyn MessageServer>,
    /// Wakes one thread.
    more: EventFd,
    /// Wakes every thread, for ever.
    stop: EventFd,
    stopping: AtomicBool,
}

impl Pool {
    /// Starts threads on `queues`.
    pub(super) fn start(
        name: &'static str,
        queues: Vec<RequestQueue>,
        threads: Threads,
        server: Arc<dyn MessageServer>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let more = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        // Edge-triggered, each signal wakes one thread, and the counters need no reading.
        let one = EventFlags::IN | EventFlags::ET;
        for queue in &queues {
            add(&epoll, queue.kick(), one)?;
        }
        add(&epoll, &more, one)?;
        add(&epoll, &stop, EventFlags::IN)?;
        // What the driver offered before there was anyone to notify.
        more.write(1)?;
        let pool = Self {
            shared: Arc::new(Shared {
                name,
                most: threads.most,
                threads: Mutex::default(),
                waiting: AtomicU16::new(0),
                is_full: AtomicBool::new(false),
                epoll,
                queues,
                server,
                more,
                stop,
                stopping: AtomicBool::new(false),
            }),
        };
        for _ in 0..threads.first {
            pool.shared.grow()?;
        }
        Ok(pool)
    }
}

impl Pool {
    /// Ends the threads, and tells where they were in their queues.
    pub(super) fn suspend(self) -> Vec<QueuePosition> {
        self.end();
        let queues = &self.shared.queues;
        queues.iter().map(RequestQueue::position).collect()
    }

    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        self.shared.threads().len()
    }

    fn end(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("virtio-fs: ending the file server's threads: {error}");
        }
        // None is made from here on.
        let threads = std::mem::take(&mut *self.shared.threads());
        for thread in threads {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes another thread if none waits for the next request.
    fn keep_one_waiting(self: &Arc<Self>) {
        if self.waiting.load(Ordering::Acquire) > 0 || self.is_full.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.grow() {
            log::warn!("virtio-fs: a share goes on with fewer threads: {error}");
            self.is_full.store(true, Ordering::Relaxed);
        }
    }

    /// Makes one more thread, unless there are as many as there may be, or the pool ends.
    fn grow(self: &Arc<Self>) -> io::Result<()> {
        let mut threads = self.threads();
        if threads.len() >= usize::from(self.most) {
            self.is_full.store(true, Ordering::Relaxed);
            return Ok(());
        }
        if self.stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        let name = format!("{}{}", self.name, threads.len());
        let shared = Arc::clone(self);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let spawned = threads::spawn(ThreadClass::FileSystem, &name, move || {
            shared.run();
            shared.waiting.fetch_sub(1, Ordering::AcqRel);
        });
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                self.waiting.fetch_sub(1, Ordering::AcqRel);
                return Err(error);
            }
        }
        Ok(())
    }

    fn run(self: &Arc<Self>) {
        // The file server changes the working directory and the umask for a single request, so no
        // thread may have them in common with another.
        // SAFETY: of what `unshare` can take away, CLONE_FS takes only the working directory, the root and the
        // umask; no code of this process relies on those being changed by another thread.
        if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) } {
            log::error!(
                "virtio-fs: a thread of the file server can't have its own umask and ends: {error}"
            );
            return;
        }
        rustix::process::umask(rustix::fs::Mode::empty());

        let mut events = Vec::with_capacity(1);
        while !self.stopping.load(Ordering::Acquire) {
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!(
                        "virtio-fs: a thread of the file server can't wait and ends: {error}"
                    );
                    return;
                }
            }
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            for queue in &self.queues {
                self.serve(queue);
            }
            self.waiting.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Serves what a queue has.
    fn serve(self: &Arc<Self>, queue: &RequestQueue) {
        while !self.stopping.load(Ordering::Acquire)
            && let Some(taken) = queue.take()
        {
            self.keep_one_waiting();
            if taken.more {
                self.wake_one();
            }
            if queue.serve(&taken, self.server.as_ref()) {
                self.wake_one();
            }
        }
    }

    fn wake_one(&self) {
        // It only fails when the counter is full, and then the wake-up is under way anyhow.
        let _ = self.more.write(1);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("queues", &self.shared.queues)
            .field("threads", &self.shared.threads().len())
            .finish_non_exhaustive()
    }
}

fn add(epoll: &OwnedFd, event: &EventFd, flags: EventFlags) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    let event = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    Ok(epoll::add(epoll, event, EventData::new_u64(0), flags)?)
}
