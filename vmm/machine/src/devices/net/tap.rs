//! A queue of the host's tap, and moving packets between it and guest memory.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::VolatileSlice;

use super::header;
use crate::virtio::buffers::Span;

/// Flags of `TUNSETQUEUE` (linux/if_tun.h).
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

/// What a queue pair needs of a tap, besides that each packet is one read or write, with its header before it.
pub trait Tap: AsFd + Debug + Send + Sync {
    /// Says what packets may leave undone (`TUN_F_*`).
    ///
    /// # Errors
    /// When the tap can't do that.
    fn set_offload(&self, flags: u32) -> io::Result<()>;

    /// Takes this queue of several into use, or out of it: it gets no packets then.
    ///
    /// # Errors
    /// When the kernel refuses, as for a tap that has but one queue.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

/// A tap of the kernel's.
#[derive(Debug)]
pub struct KernelTap {
    file: File,
    attached: AtomicBool,
}

impl KernelTap {
    /// Takes over a descriptor of a tap, and makes it what the functions here expect.
    ///
    /// # Errors
    /// When it is something else.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        let tap = Self {
            file: descriptor.into(),
            attached: AtomicBool::new(true),
        };
        let size: libc::c_int = 12;
        tap.control(
            libc::TUNSETVNETHDRSZ,
            std::ptr::from_ref(&size) as libc::c_ulong,
        )?;
        Ok(tap)
    }

    fn control(&self, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
        // SAFETY: each caller's argument is what its request takes, and outlives the call.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for KernelTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Tap for KernelTap {
    fn set_offload(&self, flags: u32) -> io::Result<()> {
        self.control(libc::TUNSETOFFLOAD, flags.into())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::Relaxed) == attached {
            return Ok(());
        }
        // SAFETY: all zeroes is an `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        self.control(
            libc::TUNSETQUEUE,
            std::ptr::from_ref(&request) as libc::c_ulong,
        )?;
        self.attached.store(attached, Ordering::Relaxed);
        Ok(())
    }
}

/// Sends a frame, straight from guest memory.
pub fn send(tap: BorrowedFd<'_>, header: &[u8; header::SIZE], frame: &Span<'_>) -> io::Result<()> {
    // The guards keep the pointers good until the end of this function.
    let guards: Vec<_> = frame.pieces().map(VolatileSlice::ptr_guard).collect();
    let mut vectors = Vec::with_capacity(guards.len() + 1);
    vectors.push(libc::iovec {
        iov_base: header.as_ptr().cast_mut().cast(),
        iov_len: header.len(),
    });
    vectors.extend(guards.iter().map(|guard| libc::iovec {
        iov_base: guard.as_ptr().cast_mut().cast(),
        iov_len: guard.len(),
    }));
    let count = i32::try_from(vectors.len()).map_err(io::Error::other)?;
    loop {
        // SAFETY: the vectors name the header and guest memory that `guards` hold; nothing is written to either.
        // The guest may change its memory meanwhile; nothing here holds a reference to it.
        let sent = unsafe { libc::writev(tap.as_raw_fd(), vectors.as_ptr(), count) };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Receives a packet, header and all, and returns its length; what doesn't fit is lost.
pub fn receive(tap: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(tap, &mut *into) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
