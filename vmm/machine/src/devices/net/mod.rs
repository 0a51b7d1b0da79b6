//! virtio-net (Virtio 1.2, section 5.1): the guest's network interface onto a tap of the host's.
//!
//! ```text
//! service.rs    the device's thread: the queues, the tap, and their turns
//! receive.rs    from the tap into the driver's buffers
//! used.rs       giving the driver its buffers back
//! transmit.rs   from the driver's buffers into the tap
//! header.rs     what stands before each packet, checked both ways
//! link.rs       whether there is a tap, and who is told
//! tap.rs        the tap itself
//! ```
//!
//! One pair of queues. Checksums and segmentation are left to whoever does them best: the header before each
//! packet goes from the driver to the host's kernel and back, and each of its fields is checked here first, so
//! that nothing depends on the kernel's own checks. A packet that is malformed is dropped, and no more than that.
//!
//! # What the device's thread needs
//! `ioctl` (`TUNSETVNETHDRSZ`, `TUNSETOFFLOAD`), `read` and `writev`, besides what every device's thread needs.

mod header;
mod link;
mod receive;
mod service;
mod tap;
mod transmit;
mod used;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use self::header::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MRG_RXBUF,
};
use self::link::Link;
pub use self::link::NetHandle;
use self::service::Service;
use self::tap::Tap;
use super::worker::Worker;
use crate::virtio::device::{Activation, RING_FEATURES, VirtioDevice};

const DEVICE_TYPE: u32 = 1;
/// Queues: to the guest, from the guest (section 5.1.2).
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Feature bits about the configuration (section 5.1.3).
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
/// `VIRTIO_NET_S_LINK_UP` (section 5.1.4).
const LINK_UP: u16 = 1;
/// What IPv4 asks of every link (RFC 791).
const LEAST_MTU: u16 = 68;
/// The bit of a hardware address's first byte that makes it one of a group.
const GROUP: u8 = 1;

/// Why an interface can't be had as configured.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("an MTU is {LEAST_MTU} to 65535, not {0}")]
    Mtu(u16),
    #[error("a hardware address is one interface's, not {0:02x?}")]
    Mac([u8; 6]),
    #[error("preparing the interface's tap")]
    Tap(#[source] io::Error),
    #[error("creating the interface's event descriptor")]
    Event(#[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    link: Arc<Link>,
    worker: Option<Worker>,
}

impl Net {
    /// Makes the device, and what a tap is plugged into it with. Without one the link is down.
    ///
    /// # Errors
    /// When the address or the MTU is none, or the tap is no usable descriptor.
    pub fn new(
        mac: [u8; 6],
        mtu: u16,
        tap: Option<OwnedFd>,
    ) -> Result<(Self, NetHandle), NetError> {
        let tap = tap.map(Tap::new).transpose().map_err(NetError::Tap)?;
        let net = Self::with_link(mac, mtu, Link::new().map_err(NetError::Event)?)?;
        if let Some(tap) = tap {
            // The link is new, so that there is room.
            let _ = net.link.plug(Arc::new(tap));
        }
        let handle = NetHandle::new(Arc::clone(&net.link));
        Ok((net, handle))
    }

    fn with_link(mac: [u8; 6], mtu: u16, link: Link) -> Result<Self, NetError> {
        if mtu < LEAST_MTU {
            return Err(NetError::Mtu(mtu));
        }
        if mac[0] & GROUP != 0 || mac == [0; 6] {
            return Err(NetError::Mac(mac));
        }
        Ok(Self {
            mac,
            mtu,
            link: Arc::new(link),
            worker: None,
        })
    }

    pub(super) fn service(&self, activation: Activation) -> io::Result<Service> {
        Service::new(activation, Arc::clone(&self.link))
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let configuration = F_MTU | F_MAC | F_STATUS;
        let received = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_MRG_RXBUF;
        let sent = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6;
        configuration | received | sent | RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Address, status, queue pairs, MTU (section 5.1.4).
        let status = if self.link.is_up() { LINK_UP } else { 0 };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1_u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        let tail = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(tail) {
            *to = *from;
        }
    }

    fn config_changes(&self) -> u8 {
        self.link.changes()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker = Some(Worker::start("net", self.service(activation)?)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod tests;
