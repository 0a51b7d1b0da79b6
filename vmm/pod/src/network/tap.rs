//! A tap in the calling thread's network namespace.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{Doing, Result, WiringError};

/// The kernel puts the least number that is free in place of `%d`.
const TEMPLATE: &[u8] = b"hull%d";
/// What every name of a tap begins with; digits follow.
const PREFIX: &str = "hull";
/// Whole frames, each behind a virtio-net header, and no other header.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes a tap of so many queues, 1 or more, for an interface. It is gone with its last descriptor. Returns its name,
/// and a descriptor for each queue in non-blocking mode.
pub fn open(interface: &str, queues: u8) -> Result<(String, Vec<OwnedFd>)> {
    let flags = if queues > 1 {
        FLAGS | libc::IFF_MULTI_QUEUE
    } else {
        FLAGS
    };
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(TEMPLATE) {
        *to = from.cast_signed();
    }
    let mut descriptors = Vec::new();
    for _ in 0..queues {
        // The first makes the tap and has its name, the others join it.
        let (queue, given) = open_queue(interface, name, flags)?;
        name = given;
        descriptors.push(queue);
    }
    let name = name
        .iter()
        .map(|byte| byte.cast_unsigned())
        .take_while(|byte| *byte != 0)
        .map(char::from)
        .collect();
    Ok((name, descriptors))
}

/// As the kernel has it, padded with zeroes.
type Name = [libc::c_char; libc::IFNAMSIZ];

fn open_queue(interface: &str, name: Name, flags: libc::c_int) -> Result<(OwnedFd, Name)> {
    let step = "making its tap";
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun");
    let file: File = match opened {
        // Without the node, or without a driver behind it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
            return Err(WiringError::NoTun);
        }
        opened => opened.doing_to(interface, "opening /dev/net/tun for its tap")?,
    };
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags)
                .map_err(io::Error::other)
                .doing_to(interface, step)?,
        },
    };
    // SAFETY: the descriptor is open, and the argument is what TUNSETIFF reads and writes, an
    // ifreq that outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error()).doing_to(interface, step);
    }
    Ok((file.into(), request.ifr_name))
}

/// Whether taps of this host's kernel take UDP packets to be cut into segments, as they do since Linux 6.2. A tap that
/// is there could be asked, but the machine's driver wants to know before that.
#[must_use]
pub fn taps_segment_udp() -> bool {
    let release = rustix::system::uname();
    segments_udp(&release.release().to_string_lossy())
}

fn segments_udp(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|digits| digits.parse::<u32>().ok());
    number()
        .zip(number())
        .is_some_and(|version| version >= (6, 2))
}

/// Whether a tap's name is one that [`open`] gives.
pub fn is_ours(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|number| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udp_segmentation_is_a_matter_of_the_kernels_version() {
        for release in ["6.2.0", "6.12.43+deb12-cloud-amd64", "7.0-rc1"] {
            assert!(segments_udp(release), "{release}");
        }
        for release in ["5.15.0-91-generic", "6.1.0", "6", "", "x.y"] {
            assert!(!segments_udp(release), "{release}");
        }
    }

    #[test]
    fn taps_are_known_by_their_names() {
        for name in ["hull0", "hull12"] {
            assert!(is_ours(name), "{name}");
        }
        for name in ["hull", "hullx", "hull0x", "tap0", "eth0"] {
            assert!(!is_ours(name), "{name}");
        }
    }
}
