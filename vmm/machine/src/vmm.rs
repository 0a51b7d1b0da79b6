//! The recipe of a machine: from its configuration to the reason why it ended.
//!
//! One thread, the control thread, owns the [`Machine`]:
//!
//! ```text
//! Machine::build   memory, VM, devices, kernel, processors; starts no thread
//! Machine::start   every device thread is ready, the processors run
//! poll             the control channel, and Machine::ended()
//! Machine::wait    joins all threads; why it ended
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::config::{FdIndex, MachineConfig};
use crate::control::{ConnectRefused, ExitReason};
use crate::jail::Shares;
use crate::kvm::ending::Ending;

/// Called on the vsock device's thread with the host's port and the stream of each connection that the guest
/// makes. Must not block.
pub type GuestConnections = Box<dyn Fn(u32, UnixStream) + Send>;

/// Called once, on the vsock device's thread, with the guest's answer. Must not block.
pub type Connected = Box<dyn FnOnce(Result<(), ConnectRefused>) + Send>;

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the configuration names descriptor {0}, which did not come with it or is used twice")]
    Descriptor(u16),
    #[error("creating an event descriptor")]
    Event(#[source] std::io::Error),
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("starting a processor's thread")]
    Thread(#[source] std::io::Error),
}

/// The descriptors that came with a configuration, each to be taken once.
#[derive(Debug)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes one out.
    ///
    /// # Errors
    /// When there is none at that place, or no longer.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, BuildError> {
        self.0
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(BuildError::Descriptor(index.0))
    }
}

/// A virtual machine, built and not yet ended.
#[derive(Debug)]
pub struct Machine {
    ending: Ending,
}

impl Machine {
    /// Makes the machine in the calling process: but for the roots of `shares`, no path is opened; no thread is started.
    ///
    /// # Errors
    /// When the configuration can't be had on this host; says what and why.
    pub fn build(
        _config: &MachineConfig,
        _descriptors: Descriptors,
        _shares: Shares,
        _guest_connections: GuestConnections,
    ) -> Result<Self, BuildError> {
        Ok(Self {
            ending: Ending::new().map_err(BuildError::Event)?,
        })
    }

    /// Runs the guest. Returns at once.
    ///
    /// # Errors
    /// When a thread can't be made.
    pub fn start(&mut self) -> Result<(), StartError> {
        Ok(())
    }

    /// Connects `stream` to a port in the guest; `connected` hears how it went.
    pub fn connect(&self, _port: u32, _stream: UnixStream, connected: Connected) {
        connected(Err(ConnectRefused::NoDriver));
    }

    /// Ends the machine as a power cut would. Returns at once.
    pub fn stop(&self) {
        self.ending.end(ExitReason::Stopped);
    }

    /// Readable from the moment when the machine has ended, for whatever reason.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ending.as_fd()
    }

    /// Waits for the machine's end, then ends all its threads.
    pub fn wait(self) -> ExitReason {
        self.ending.wait()
    }
}
