//! The host's end of an interface: a tap, that is, packets each with a header by `read` and `write`.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::header::{F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, HEADER_SIZE};
use crate::virtio::buffers::Span;

/// `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`.
const OFFLOAD_CSUM: libc::c_ulong = 1;
const OFFLOAD_TSO4: libc::c_ulong = 2;
const OFFLOAD_TSO6: libc::c_ulong = 4;

/// Where packets come from and go to: a descriptor that never blocks, with one packet and its header a call.
pub(super) trait Backend: AsFd + Debug + Send + Sync {
    /// Makes it pass packets as a driver with these features takes them.
    fn configure(&self, features: u64) -> io::Result<()>;
}

/// A tap, opened with `IFF_NO_PI` and `IFF_VNET_HDR`.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// # Errors
    /// When it can't be made nonblocking.
    pub(super) fn new(tap: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&tap)?;
        rustix::fs::fcntl_setfl(&tap, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self(tap))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Tap {
    fn configure(&self, features: u64) -> io::Result<()> {
        let size = libc::c_int::try_from(HEADER_SIZE).map_err(io::Error::other)?;
        // SAFETY: the kernel reads one `int`, which outlives the call.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the argument is a number.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, offloads(features)) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// What the kernel may leave undone in packets for the driver. Segmentation implies checksums (section 5.1.3.1).
fn offloads(features: u64) -> libc::c_ulong {
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let mut offloads = OFFLOAD_CSUM;
    if features & F_GUEST_TSO4 != 0 {
        offloads |= OFFLOAD_TSO4;
    }
    if features & F_GUEST_TSO6 != 0 {
        offloads |= OFFLOAD_TSO6;
    }
    offloads
}

/// Reads the next packet with its header, and returns how long it is; what doesn't fit is lost.
/// `None` if there is none now.
///
/// # Errors
/// When there will never be one again.
pub(super) fn receive(from: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match rustix::io::read(from, &mut *into) {
            // No packet is empty.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes one packet from guest memory.
///
/// # Errors
/// When it is not taken, now or ever.
pub(super) fn send(
    to: BorrowedFd<'_>,
    header: &[u8; HEADER_SIZE],
    frame: &Span<'_>,
) -> io::Result<()> {
    let guards: Vec<_> = frame.pieces().map(VolatileSlice::ptr_guard).collect();
    let head = libc::iovec {
        iov_base: header.as_ptr().cast_mut().cast(),
        iov_len: HEADER_SIZE,
    };
    let pieces = guards.iter().map(|guard| libc::iovec {
        iov_base: guard.as_ptr().cast_mut().cast(),
        iov_len: guard.len(),
    });
    let vectors: Vec<libc::iovec> = std::iter::once(head).chain(pieces).collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    loop {
        // SAFETY: `writev` only reads what the vectors name: the header, and guest memory that `guards` hold,
        // which the guest may be writing to; what it makes of its packet then is its own business.
        let sent = unsafe { libc::writev(to.as_raw_fd(), vectors.as_ptr(), count) };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_leaves_undone_only_what_the_driver_does() {
        let tso = F_GUEST_TSO4 | F_GUEST_TSO6;

        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(tso), 0);
        assert_eq!(offloads(F_GUEST_CSUM), OFFLOAD_CSUM);
        assert_eq!(offloads(F_GUEST_CSUM | F_GUEST_TSO4), 3);
        assert_eq!(offloads(F_GUEST_CSUM | tso), 7);
    }
}
