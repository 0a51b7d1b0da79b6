//! Taps, and what serves their queues.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use super::NetworkError;

const TUN: &str = "/dev/net/tun";
const VHOST: &str = "/dev/vhost-net";
/// As it was numbered: with the size of an `int`, though it takes an `ifreq`.
const TUNSETIFF: Opcode = opcode::write::<libc::c_int>(b'T', 202);
/// With the NUL.
const NAME_BYTES: usize = 16;

/// What moves packets between a tap and the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The kernel where it can, else `hull-vmm`.
    #[default]
    Auto,
    /// `hull-vmm`.
    Userspace,
    /// The kernel (vhost-net), or it is an error.
    Vhost,
}

/// The descriptors of `/dev/vhost-net`, one for each pair of queues. None: `hull-vmm` serves them.
///
/// # Errors
/// When the backend is [`Backend::Vhost`] and the device can't be opened.
pub fn open_vhost(backend: Backend, queue_pairs: u8) -> Result<Vec<OwnedFd>, NetworkError> {
    let open =
        || -> io::Result<Vec<OwnedFd>> { (0..queue_pairs).map(|_| open_device(VHOST)).collect() };
    match (backend, open) {
        (Backend::Userspace, _) => Ok(Vec::new()),
        (Backend::Auto, open) => Ok(open().unwrap_or_default()),
        (Backend::Vhost, open) => open().map_err(|source| NetworkError::Device {
            path: VHOST,
            module: "vhost_net",
            source,
        }),
    }
}

/// Makes a tap in the calling thread's network namespace and returns a descriptor for each pair of its
/// queues. It is gone with the last of them.
///
/// # Errors
/// `EBUSY` when there is an interface of that name.
pub fn make(name: &str, queue_pairs: u8) -> io::Result<Vec<OwnedFd>> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queue_pairs > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    (0..queue_pairs)
        .map(|queue| {
            // The first makes it, and takes no other's over.
            let exclusive = if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
            let file = open_device(TUN)?;
            attach(&file, name, flags | exclusive)?;
            Ok(file)
        })
        .collect()
}

/// Whether taps can be made at all, as an error that says what to do.
pub fn check() -> Result<(), NetworkError> {
    open_device(TUN)
        .map(drop)
        .map_err(|source| NetworkError::Device {
            path: TUN,
            module: "tun",
            source,
        })
}

fn open_device(path: &str) -> io::Result<OwnedFd> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
}

fn attach(tun: &OwnedFd, name: &str, flags: libc::c_int) -> io::Result<()> {
    let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
    if name.len() >= NAME_BYTES {
        return Err(too_long());
    }
    let mut padded = [0; NAME_BYTES];
    for (to, from) in padded.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::try_from(from).map_err(|_| too_long())?;
    }
    // The flags are 16 bits in an `unsigned short`, which libc calls signed.
    let flags = u16::try_from(flags).map_err(|_| too_long())?.cast_signed();
    let mut request = libc::ifreq {
        ifr_name: padded,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    unsafe { ioctl(tun, Updater::<TUNSETIFF, libc::ifreq>::new(&mut request)) }?;
    Ok(())
}
