//! The control queue (Virtio 1.2, section 5.1.6.5): how many queue pairs to use, and the hardware address.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::limits::Limiter;
use super::link::Link;
use crate::config::{DirectionLimits, RateLimit};
use crate::memory::GuestRam;
use crate::virtio::buffers::{Buffers, ChainError};
use crate::virtio::device::ActiveQueue;

/// Descriptors of a command: Linux has three.
const MOST_DESCRIPTORS: usize = 16;
/// How often the number of queue pairs may change: it takes a lock that all of the host's network has in common.
const CHANGES: DirectionLimits = DirectionLimits {
    bandwidth: None,
    packets: Some(RateLimit {
        per_second: NonZeroU64::MIN,
        burst: 16,
    }),
};

/// Carries out commands.
#[derive(Debug)]
pub struct Commands {
    pub queue: ActiveQueue,
    link: Arc<Link>,
    /// Pairs that the driver has set up; 1 if it can't use more.
    pairs: usize,
    changes: Limiter,
}

impl Commands {
    pub fn new(queue: ActiveQueue, link: Arc<Link>, pairs: usize) -> Self {
        Self {
            queue,
            link,
            pairs,
            changes: Limiter::new(CHANGES, Instant::now()),
        }
    }

    /// Carries out those that there are.
    ///
    /// # Errors
    /// When the queue is broken: nothing more can be made of it until the driver resets the device.
    pub fn run(&mut self, memory: &GuestRam) -> io::Result<()> {
        let Self {
            queue,
            link,
            pairs,
            changes,
        } = self;
        queue.serve(memory, MOST_DESCRIPTORS, |command| {
            answer(link, *pairs, changes, command)
        })
    }
}

/// Carries out a command. One that is malformed is not answered.
fn answer(
    link: &Link,
    pairs: usize,
    changes: &Limiter,
    command: Result<Buffers<'_>, ChainError>,
) -> u32 {
    let Ok(Buffers {
        mut readable,
        writable,
    }) = command
    else {
        return 0;
    };
    if writable.is_empty() {
        return 0;
    }
    let [class, number] = readable.take_array().unwrap_or([u8::MAX; 2]);
    let data_length = readable.len();
    let done = match (u32::from(class), u32::from(number)) {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if data_length == 2 => readable
            .take_array()
            .map(|wanted| usize::from(u16::from_le_bytes(wanted)))
            .filter(|wanted| (1..=pairs).contains(wanted))
            .and_then(|wanted| use_pairs(link, wanted, changes)),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) if data_length == 6 => {
            readable.take_array().map(|mac| link.set_mac(mac))
        }
        _ => None,
    };
    let status = if done.is_some() {
        VIRTIO_NET_OK
    } else {
        VIRTIO_NET_ERR
    };
    writable.copy_from(&status.to_le_bytes()[..1]);
    1
}

fn use_pairs(link: &Link, wanted: usize, changes: &Limiter) -> Option<()> {
    if link.pairs_in_use() == wanted {
        return Some(());
    }
    if changes.pause().is_some() {
        return None;
    }
    changes.charge(0);
    link.use_pairs(wanted);
    Some(())
}
