//! The threads that serve queues.
//!
//! All threads of a pool wait on one epoll descriptor. A notification of the driver wakes one of them, which takes
//! requests until there are none; before it serves one with more behind it, it wakes the next thread. So a
//! request alone costs one wake-up and no hand-over between threads, and a request that waits for
//! a disk holds up none but its own thread.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::thread::UnshareFlags;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::requests::RequestQueue;
use super::server::MessageServer;
use crate::threads::{self, ThreadClass};
use crate::virtio::device::QueuePosition;

/// Threads at work. Dropping it ends them, each after the request that it is serving.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
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
    /// Starts `threads` threads on `queues`.
    pub(super) fn start(
        name: &str,
        queues: Vec<RequestQueue>,
        threads: u16,
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
        let mut pool = Self {
            shared: Arc::new(Shared {
                epoll,
                queues,
                server,
                more,
                stop,
                stopping: AtomicBool::new(false),
            }),
            threads: Vec::new(),
        };
        for number in 0..threads {
            let shared = Arc::clone(&pool.shared);
            pool.threads.push(threads::spawn(
                ThreadClass::FileSystem,
                &format!("{name}{number}"),
                move || shared.run(),
            )?);
        }
        Ok(pool)
    }
}

impl Pool {
    /// Ends the threads, and tells where they were in their queues.
    pub(super) fn suspend(mut self) -> Vec<QueuePosition> {
        self.end();
        let queues = &self.shared.queues;
        queues.iter().map(RequestQueue::position).collect()
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("virtio-fs: ending the file server's threads: {error}");
        }
        for thread in self.threads.drain(..) {
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
    fn run(&self) {
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
            for queue in &self.queues {
                self.serve(queue);
            }
        }
    }

    /// Serves what a queue has.
    fn serve(&self, queue: &RequestQueue) {
        while !self.stopping.load(Ordering::Acquire)
            && let Some(taken) = queue.take()
        {
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
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

fn add(epoll: &OwnedFd, event: &EventFd, flags: EventFlags) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    let event = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    Ok(epoll::add(epoll, event, EventData::new_u64(0), flags)?)
}
