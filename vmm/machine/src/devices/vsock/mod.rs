//! virtio-vsock (Virtio 1.2, section 5.10): the guest's stream sockets onto the supervisor's.
//!
//! ```text
//! inbox.rs         how the rest of the process asks for connections
//! service.rs       the device's thread: waits, and moves packets
//! multiplexer.rs   all connections, their sockets, and whose turn it is
//! connection.rs    one connection: a state machine, pure
//! credit.rs        how much each side may send
//! host_end.rs      the host's end of one: a socket, and what it could not take yet
//! ring.rs          a queue of packets
//! packet.rs        packets as they lie in memory
//! volatile_io.rs   between a socket and guest memory
//! ```
//!
//! There is no listening socket. The host connects by [`VsockHandle::connect`], with one end of a socket pair that
//! becomes the connection; the guest may connect to the ports that the configuration names, and the other
//! end of a fresh pair is handed out. Any other request of the guest is reset.
//!
//! Data goes from a socket into the guest's buffers, and from the guest's buffers into a socket, with no copy in
//! between, until the socket is full; then up to a buffer's worth waits here, the guest gets no more credit, and its
//! writer waits. The other way nothing is read that the guest has no room for.
//!
//! # What the device's thread needs
//! `epoll_create1`, `epoll_ctl`, `epoll_wait`, `read` and `write` (eventfd), `sendmsg`, `sendto`, `recvmsg`, `shutdown`,
//! `socketpair`, `close`, `clock_gettime`, besides what every thread needs.

mod connection;
mod credit;
mod host_end;
mod inbox;
mod multiplexer;
mod packet;
mod ring;
mod service;
mod volatile_io;

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::QueueT;

pub use self::inbox::VsockHandle;
use self::service::Running;
use crate::config::VsockConfig;
use crate::control::ConnectRefused;
use crate::virtio::device::{Activation, VirtioDevice};

/// Virtio device id.
const DEVICE_TYPE: u32 = 19;
/// Queues: to the guest, from the guest, events (section 5.10.2). A Linux driver's buffers are a page each.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM` (section 5.10.3).
const F_STREAM: u64 = 1;

/// Called on the device's thread with the host's port and the stream of each connection that the guest makes.
/// Must not block.
pub type GuestConnections = Box<dyn Fn(u32, UnixStream) + Send>;

/// Called once with the guest's answer, on the device's thread or the caller's. Must not block.
pub type Connected = Box<dyn FnOnce(Result<(), ConnectRefused>) + Send>;

/// The virtio-vsock device.
pub struct Vsock {
    config: VsockConfig,
    guest_connections: Arc<Mutex<GuestConnections>>,
    handle: VsockHandle,
    running: Option<Running>,
}

impl Vsock {
    /// Makes the device and what the host connects with.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(
        config: VsockConfig,
        guest_connections: GuestConnections,
    ) -> io::Result<(Self, VsockHandle)> {
        let handle = VsockHandle::new()?;
        let device = Self {
            config,
            guest_connections: Arc::new(Mutex::new(guest_connections)),
            handle: handle.clone(),
            running: None,
        };
        Ok((device, handle))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // The guest's context id is all there is (section 5.10.4).
        let config = u64::from(self.config.cid).to_le_bytes();
        let tail = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(tail) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let event_idx = activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = activation.queues.into_iter().map(|mut active| {
            active.queue.set_event_idx(event_idx);
            active
        });
        // The event queue stays unused: it only serves to tell that the context id has changed.
        let (Some(to_guest), Some(from_guest)) = (
            queues.next().filter(|queue| queue.index == 0),
            queues.next().filter(|queue| queue.index == 1),
        ) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the vsock driver left out a queue",
            ));
        };
        self.running = Some(Running::start(
            &self.config,
            Arc::clone(&self.guest_connections),
            self.handle.clone(),
            activation.memory,
            to_guest,
            from_guest,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        // Dropping it ends the thread, and with it all connections.
        self.running = None;
    }
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock")
            .field("config", &self.config)
            .field("running", &self.running.is_some())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
