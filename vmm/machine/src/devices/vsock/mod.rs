//! virtio-vsock (Virtio 1.2, section 5.10): the guest's stream sockets onto the supervisor's.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;

use crate::config::VsockConfig;
use crate::control::ConnectRefused;
use crate::virtio::device::{Activation, VirtioDevice};

/// Called on the device's thread with the host's port and the stream of each connection that the guest makes.
/// Must not block.
pub type GuestConnections = Box<dyn Fn(u32, UnixStream) + Send>;

/// Called once with the guest's answer, on the device's thread or the caller's. Must not block.
pub type Connected = Box<dyn FnOnce(Result<(), ConnectRefused>) + Send>;

/// The virtio-vsock device.
pub struct Vsock {
    config: VsockConfig,
    guest_connections: GuestConnections,
}

/// Connects to ports of the guest.
#[derive(Debug, Clone)]
pub struct VsockHandle;

impl Vsock {
    /// Makes the device and what the host connects with.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(
        config: VsockConfig,
        guest_connections: GuestConnections,
    ) -> io::Result<(Self, VsockHandle)> {
        let device = Self {
            config,
            guest_connections,
        };
        Ok((device, VsockHandle))
    }
}

impl VsockHandle {
    /// Connects `stream` to a port of the guest; `connected` hears how it went.
    pub fn connect(&self, _port: u32, _stream: UnixStream, connected: Connected) {
        connected(Err(ConnectRefused::NoDriver));
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        19
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _activation: Activation) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn reset(&mut self) {}
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let _ = &self.guest_connections;
        f.debug_struct("Vsock")
            .field("config", &self.config)
            .finish()
    }
}
