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

use rustix::event::epoll::{self, CreateFlags};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{QueueOwnedT, QueueT};

pub use self::inbox::VsockHandle;
use self::multiplexer::Multiplexer;
use self::service::{Rest, Running};
use crate::config::VsockConfig;
use crate::control::ConnectRefused;
use crate::memory::GuestRam;
use crate::virtio::buffers::Buffers;
use crate::virtio::device::{Activation, ActiveQueue, Suspended, VirtioDevice};

/// Virtio device id.
const DEVICE_TYPE: u32 = 19;
/// Queues: to the guest, from the guest, events (section 5.10.2). A Linux driver's buffers are a page each.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM` (section 5.10.3).
const F_STREAM: u64 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7): all connections are gone, and the context id may be another.
const TRANSPORT_RESET: u32 = 0;
/// Descriptors of a buffer for an event: Linux has one.
const EVENT_DESCRIPTORS: usize = 4;

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
    events: Option<ActiveQueue>,
    /// The connections, while the device is suspended.
    suspended: Option<Multiplexer>,
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
            events: None,
            suspended: None,
        };
        Ok((device, handle))
    }
}

impl Vsock {
    /// Tells the driver of a clone that the connections which it knows were another machine's.
    fn tell_reset(&mut self, memory: &GuestRam) -> io::Result<()> {
        let Some(events) = &mut self.events else {
            return Ok(());
        };
        let Some(buffer) = events.queue.iter(memory).map_err(io::Error::other)?.next() else {
            log::warn!("vsock: the driver has no buffer to be told of the end of its connections");
            return Ok(());
        };
        let head = buffer.head_index();
        let written = match Buffers::resolve(memory, buffer, EVENT_DESCRIPTORS) {
            Ok(Buffers { writable, .. }) => writable.copy_from(&TRANSPORT_RESET.to_le_bytes()),
            Err(_) => 0,
        };
        let written = u32::try_from(written).unwrap_or(0);
        events
            .queue
            .add_used(memory, head, written)
            .map_err(io::Error::other)?;
        events.interrupt.signal()
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
        let (Some(to_guest), Some(from_guest)) = (
            queues.next().filter(|queue| queue.index == 0),
            queues.next().filter(|queue| queue.index == 1),
        ) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the vsock driver left out a queue",
            ));
        };
        self.events = queues.next().filter(|queue| queue.index == 2);
        let multiplexer = match self.suspended.take() {
            Some(multiplexer) => multiplexer,
            None => {
                if activation.resumed.is_some() {
                    self.tell_reset(&activation.memory)?;
                }
                let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
                Multiplexer::new(&self.config, Arc::clone(&self.guest_connections), epoll)
            }
        };
        self.running = Some(Running::start(
            multiplexer,
            self.handle.clone(),
            activation.memory,
            to_guest,
            from_guest,
        )?);
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        let mut positions = Vec::new();
        if let Some(Rest {
            multiplexer,
            positions: moved,
        }) = self.running.take().and_then(Running::suspend)
        {
            self.suspended = Some(multiplexer);
            positions.extend(moved);
        }
        let events = self.events.take();
        positions.extend(events.as_ref().map(ActiveQueue::position));
        Ok(Suspended {
            positions,
            state: Vec::new(),
            only_here: None,
        })
    }

    fn reset(&mut self) {
        // Dropping it ends the thread, and with it all connections.
        self.running = None;
        self.events = None;
        if let Some(mut multiplexer) = self.suspended.take() {
            multiplexer.close();
        }
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
