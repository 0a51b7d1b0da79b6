//! Queue pairs that the host's kernel serves (vhost-net): it reads and writes the rings and the guest's
//! memory itself, is woken by the guest's doorbells, and raises the guest's interrupts.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::link::Backend;
use super::ring::Ring;
use crate::memory::GuestRam;

/// Of a pair's two queues, which is which.
const QUEUES: [usize; 2] = [0, 1];

/// `/dev/vhost-net`, for one queue pair.
#[derive(Debug)]
pub struct VhostNet {
    descriptor: OwnedFd,
    /// This process is the owner, whose memory it uses.
    owned: AtomicBool,
}

impl VhostNet {
    pub fn new(descriptor: OwnedFd) -> Self {
        Self {
            descriptor,
            owned: AtomicBool::new(false),
        }
    }

    fn own(&self, handle: &Handle<'_>) -> io::Result<()> {
        if !self.owned.load(Ordering::Relaxed) {
            handle.set_owner().map_err(io::Error::other)?;
            self.owned.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The descriptor and the memory, as the crate wants them together.
#[derive(Debug)]
struct Handle<'a> {
    descriptor: BorrowedFd<'a>,
    memory: &'a GuestRam,
}

impl AsRawFd for Handle<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

impl<'a> VhostKernBackend for Handle<'a> {
    type AS = &'a GuestRam;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// The transport has checked the queue, and better: the crate refuses one that ends where RAM does.
    fn is_valid(&self, _: &VringConfigData) -> bool {
        true
    }
}

impl Handle<'_> {
    /// Connects a queue to a tap, or to nothing.
    fn set_backend(&self, queue: usize, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let file = vhost_vring_file {
            index: u32::try_from(queue).map_err(io::Error::other)?,
            fd: tap.map_or(-1, |tap| tap.as_raw_fd()),
        };
        // SAFETY: the request reads a `vhost_vring_file`, and `file` outlives the call.
        match unsafe { vmm_sys_util::ioctl::ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set_memory(&self) -> io::Result<()> {
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.mapping().as_ptr().expose_provenance() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
            .collect();
        self.set_mem_table(&regions).map_err(io::Error::other)
    }

    /// Describes a queue. Returns the event by which the kernel has its buffers announced here, where it
    /// can't interrupt the guest itself.
    fn set_queue(&self, number: usize, ring: &Ring) -> Result<Option<EventFd>, SetError> {
        let queue = &ring.queue;
        self.set_vring_num(number, queue.size())?;
        self.set_vring_base(number, queue.next_avail())?;
        self.set_vring_addr(
            number,
            &VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: queue.desc_table(),
                used_ring_addr: queue.used_ring(),
                avail_ring_addr: queue.avail_ring(),
                log_addr: None,
            },
        )?;
        self.set_vring_kick(number, &ring.kick)?;
        if let Some(event) = ring.interrupt.event() {
            self.set_vring_call(number, &event)?;
            return Ok(None);
        }
        let relay = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(SetError::Relay)?;
        self.set_vring_call(number, &relay)?;
        Ok(Some(relay))
    }
}

/// Why the kernel does not serve a queue.
#[derive(Debug, thiserror::Error)]
enum SetError {
    #[error("{0}")]
    Vhost(#[from] vhost::Error),
    #[error("making an event: {0}")]
    Relay(io::Error),
}

/// A queue pair that the kernel serves. Dropping it ends that: nothing is under way afterwards.
#[derive(Debug)]
pub struct Running {
    backend: Arc<Backend>,
    memory: GuestRam,
    /// For each queue, what is to become an interrupt.
    pub relays: [Option<EventFd>; 2],
}

impl Running {
    /// Has the kernel serve a pair; `None` if the backend has no vhost-net.
    ///
    /// # Errors
    /// When the kernel refuses. It serves nothing then.
    pub fn start(
        backend: &Arc<Backend>,
        memory: &GuestRam,
        negotiated: u64,
        rings: [&Ring; 2],
    ) -> io::Result<Option<Self>> {
        let Some(vhost) = &backend.vhost else {
            return Ok(None);
        };
        let handle = vhost.handle(memory);
        vhost.own(&handle)?;
        // The rest is between driver, device and tap.
        let known = handle.get_features().map_err(io::Error::other)?;
        handle
            .set_features(negotiated & known)
            .map_err(io::Error::other)?;
        handle.set_memory()?;
        // From here on whatever fails is undone by the drop.
        let mut running = Self {
            backend: Arc::clone(backend),
            memory: memory.clone(),
            relays: [None, None],
        };
        for ((number, ring), relay) in QUEUES.into_iter().zip(rings).zip(&mut running.relays) {
            *relay = handle.set_queue(number, ring).map_err(io::Error::other)?;
        }
        for number in QUEUES {
            handle.set_backend(number, Some(backend.tap.as_fd()))?;
        }
        Ok(Some(running))
    }

    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// Ends it, and has the rings go on from where the kernel was.
    ///
    /// # Errors
    /// When it can't be told where that is.
    pub fn stop(self, rings: [&mut Ring; 2]) -> io::Result<()> {
        self.disconnect();
        rings
            .into_iter()
            .try_for_each(|ring| ring.resume(&self.memory))
    }

    fn disconnect(&self) {
        let Some(vhost) = &self.backend.vhost else {
            return;
        };
        let handle = vhost.handle(&self.memory);
        for number in QUEUES {
            if let Err(error) = handle.set_backend(number, None) {
                log::error!("the kernel goes on serving a queue: {error}");
            }
        }
    }
}

impl VhostNet {
    fn handle<'a>(&'a self, memory: &'a GuestRam) -> Handle<'a> {
        Handle {
            descriptor: self.descriptor.as_fd(),
            memory,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.disconnect();
    }
}
