//! Between a stream socket and guest memory, without a copy in between.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::PtrGuardMut;

/// Writes what the socket takes at once.
pub(super) fn send(socket: &impl AsRawFd, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
    transfer(from, |message| {
        // SAFETY: the message and what it points to live until the call returns; the kernel reads the memory as
        // the guest may be writing to it, which is the guest's business and none of this process's data.
        unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        }
    })
}

/// Reads what the socket has.
pub(super) fn receive(socket: &impl AsRawFd, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
    transfer(into, |message| {
        // SAFETY: the message and what it points to live until the call returns; the slices are memory of the
        // guest of at least that size, which is only ever accessed as volatile.
        unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) }
    })
}

fn transfer(
    slices: &[VolatileSlice<'_>],
    call: impl Fn(*mut libc::msghdr) -> libc::ssize_t,
) -> io::Result<usize> {
    let guards: Vec<PtrGuardMut> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    // SAFETY: a `msghdr` of zeros is one without address, data and control messages.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    loop {
        match usize::try_from(call(&raw mut message)) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
