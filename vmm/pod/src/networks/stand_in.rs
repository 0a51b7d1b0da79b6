//! A network namespace in place of one that is gone, so that netavark can take down what it made
//! outside of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// IFF_TAP | IFF_NO_PI, of the width that ifreq has for it.
const TAP: libc::c_short = 0x1002;

/// The stand-in. It and its interfaces go with it.
#[derive(Debug)]
pub struct StandIn {
    pub netns: OwnedFd,
    /// netavark leaves the bridge alone when it doesn't find the pod's interface to remove.
    _interfaces: Vec<OwnedFd>,
}

impl StandIn {
    /// # Errors
    /// When the namespace or an interface in it can't be made.
    pub fn new(interfaces: &[&str]) -> io::Result<Self> {
        // A namespace of a thread that is about to end, so that nobody else gets into it.
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // SAFETY: of all that unshare can take apart, the network namespace is no
                    // resource that Rust's standard library takes for common to all threads.
                    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
                    let netns = File::open("/proc/thread-self/ns/net")?.into();
                    let interfaces = interfaces.iter().map(|name| interface(name));
                    Ok(Self {
                        netns,
                        _interfaces: interfaces.collect::<io::Result<_>>()?,
                    })
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    }
}

/// A tap of that name in the thread's network namespace, there as long as it is open.
fn interface(name: &str) -> io::Result<OwnedFd> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is a C structure without pointers in the members that are used; zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = TAP;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq, which is ours.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device.into())
}
