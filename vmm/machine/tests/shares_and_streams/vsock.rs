//! Sockets of the guest's vsock address family.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    owned(socket)
}

fn owned(descriptor: i32) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has just been made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn with_address(
    cid: u32,
    port: u32,
    call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i32,
) -> io::Result<()> {
    // SAFETY: all zeros is an address of no family.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap();
    address.svm_cid = cid;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap();
    match call((&raw const address).cast(), length) {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects to a port of the host.
pub fn connect(port: u32) -> io::Result<File> {
    let socket = socket()?;
    with_address(libc::VMADDR_CID_HOST, port, |address, length| {
        // SAFETY: the address is valid for the call.
        unsafe { libc::connect(socket.as_raw_fd(), address, length) }
    })?;
    Ok(socket.into())
}

/// Listens on a port.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    with_address(libc::VMADDR_CID_ANY, port, |address, length| {
        // SAFETY: the address is valid for the call.
        unsafe { libc::bind(socket.as_raw_fd(), address, length) }
    })?;
    // SAFETY: no memory is involved.
    match unsafe { libc::listen(socket.as_raw_fd(), 256) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for a connection.
pub fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: the peer's address is not asked for.
    let accepted = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    };
    owned(accepted).map(File::from)
}

/// Shuts the sending half.
pub fn finish(socket: &File) {
    // SAFETY: no memory is involved.
    let shut = unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) };
    assert_eq!(shut, 0);
}
