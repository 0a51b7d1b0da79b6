//! How the rest of the process asks the device's thread for connections.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Connected;
use super::multiplexer::MAX_CONNECTIONS;
use crate::control::ConnectRefused;

/// Connects to ports of the guest.
#[derive(Clone)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

struct Shared {
    inbox: Mutex<Inbox>,
    /// Readable when there is something in the inbox.
    bell: EventFd,
}

/// What waits for the device's thread.
struct Inbox {
    /// There is a thread.
    open: bool,
    requests: Vec<Request>,
}

/// A connection that is asked for.
pub(super) struct Request {
    pub(super) port: u32,
    pub(super) stream: UnixStream,
    pub(super) connected: Connected,
}

impl VsockHandle {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                inbox: Mutex::new(Inbox {
                    open: false,
                    requests: Vec::new(),
                }),
                bell: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            }),
        })
    }

    /// Connects `stream` to a port of the guest; `connected` hears how it went. Never blocks.
    ///
    /// Before the guest's driver is up, and after it was reset, that is [`ConnectRefused::NoDriver`], at once.
    pub fn connect(&self, port: u32, stream: UnixStream, connected: Connected) {
        let refused = {
            let mut inbox = self.inbox();
            if !inbox.open {
                ConnectRefused::NoDriver
            } else if inbox.requests.len() >= MAX_CONNECTIONS {
                ConnectRefused::TooMany
            } else {
                inbox.requests.push(Request {
                    port,
                    stream,
                    connected,
                });
                // It only fails when the bell has been rung for ever.
                let _ = self.shared.bell.write(1);
                return;
            }
        };
        connected(Err(refused));
    }

    /// From now on there is a thread that looks into the inbox.
    pub(super) fn open(&self) {
        self.inbox().open = true;
    }

    /// There is none any more.
    pub(super) fn close(&self) {
        let requests = {
            let mut inbox = self.inbox();
            inbox.open = false;
            std::mem::take(&mut inbox.requests)
        };
        for request in requests {
            (request.connected)(Err(ConnectRefused::NoDriver));
        }
    }

    /// Takes what is there.
    pub(super) fn take(&self) -> Vec<Request> {
        std::mem::take(&mut self.inbox().requests)
    }

    /// Readable when there is something to take.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.shared.bell.as_raw_fd()) }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.shared
            .inbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for VsockHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockHandle")
            .field("open", &self.inbox().open)
            .finish()
    }
}
