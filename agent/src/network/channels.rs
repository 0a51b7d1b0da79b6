//! Pairs of queues of an interface: a driver uses as many as there were processors when it came, and most come
//! later.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use crate::error::{Doing, Result};

/// `struct ethtool_channels` (linux/ethtool.h).
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    most_receive: u32,
    most_transmit: u32,
    most_other: u32,
    most_combined: u32,
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

/// From linux/ethtool.h, and linux/sockios.h.
const GET_CHANNELS: u32 = 0x3C;
const SET_CHANNELS: u32 = 0x3D;
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// Has the interface use all that its device has, in the calling thread's network namespace.
pub fn use_all(interface: &str) -> Result<()> {
    let doing = || format!("setting the queues of interface {interface}");
    let mut channels = Channels {
        command: GET_CHANNELS,
        ..Channels::default()
    };
    match request(interface, &mut channels) {
        // Another driver than virtio's.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        asked => asked.doing(doing)?,
    }
    if channels.combined >= channels.most_combined {
        return Ok(());
    }
    channels.command = SET_CHANNELS;
    channels.combined = channels.most_combined;
    request(interface, &mut channels).doing(doing)
}

fn request(interface: &str, channels: &mut Channels) -> io::Result<()> {
    // SAFETY: all bytes zero are an ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = request.ifr_name.iter_mut();
    if interface.len() >= name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in name.zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut *channels).cast();
    // Any socket of the namespace will do, where no interface need be up.
    let socket = UnixDatagram::unbound()?;
    // SAFETY: the request names an interface, ending in a NUL, and points to channels, which live as long as the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
