//! A network interface onto a tap of the host's (virtio-net; Virtio 1.2, section 5.1).
//!
//! ```text
//! link.rs       the state that all of it shares, and how a tap is plugged late
//! pair.rs       a queue pair's thread: waits, and moves packets
//! receive.rs    from the tap into the driver's buffers
//! transmit.rs   from the driver's buffers into the tap
//! commands.rs   the control queue
//! header.rs     checks what the driver says of a packet
//! features.rs   what can be negotiated
//! limits.rs     rate limits
//! ring.rs       a queue of packets
//! tap.rs        a queue of a tap
//! vhost.rs      a queue pair that the kernel serves instead
//! counters.rs   what was lost
//! ```
//!
//! Checksums and segmentation are left to whoever does them best: the header before each packet goes from the
//! driver to the host's kernel and back, and each of its fields is checked here first, so that nothing depends on
//! the kernel's own checks. A packet that is malformed is dropped, and no more than that.
//!
//! Where the supervisor hands over vhost-net, packets do not even come by: the kernel serves the queues, with
//! doorbells and interrupts that go straight to and from it, and checks packets itself. Rate limits are kept
//! here, so an interface that has any is served here.
//!
//! An interface without a tap has its link down. Its driver's packets go nowhere; when a tap is plugged, the
//! driver is told that the link is up, once all of the device's threads have it.
//!
//! # What the device's threads need
//! `read` and `writev` (tap), `timerfd_create` and `timerfd_settime` (limits), and the `ioctl`s that
//! [`crate::jail::seccomp`] lists for taps and vhost-net, besides what every device's thread needs.

mod commands;
mod counters;
mod features;
mod header;
mod limits;
mod link;
mod pair;
mod receive;
mod ring;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::worker::Worker;
use crate::config::{MAX_QUEUE_PAIRS, NetConfig, TapDescriptors};
use crate::control::PlugRefused;
use crate::virtio::device::{Activation, ActiveQueue, RING_FEATURES, Suspended, VirtioDevice};

use commands::Commands;
use limits::Limiter;
pub use link::NetHandle;
use link::{Backend, Link};
use pair::Pair;
use receive::Receive;
use ring::Ring;
use transmit::Transmit;

const DEVICE_TYPE: u32 = 1;
/// Entries of a queue for packets, and of that for commands.
const PACKETS: u16 = 256;
const COMMANDS: u16 = 64;
/// The least that IPv4 needs; drivers refuse less (section 5.1.4.1).
const MIN_MTU: u16 = 68;
/// Bytes of the device configuration (section 5.1.4), up to the end of what the features give meaning.
const CONFIG_SIZE: usize = 12;
/// The bit of a hardware address's first byte that makes it one of a group.
const GROUP: u8 = 1;

/// Why there is no interface.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("an MTU of {0} is not within {MIN_MTU} to 65535")]
    Mtu(u16),
    #[error("a hardware address is one interface's, not {0:02x?}")]
    Mac([u8; 6]),
    #[error("{pairs} queue pairs are not within 1 to {most}")]
    QueuePairs { pairs: u8, most: u8 },
    #[error("plugging the tap")]
    Plug(#[from] PlugRefused),
    #[error("making event descriptors")]
    Event(#[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Net {
    features: u64,
    mtu: u16,
    pairs: usize,
    queue_sizes: Vec<u16>,
    receive_limiter: Limiter,
    transmit_limiter: Limiter,
    link: Arc<Link>,
    workers: Vec<Worker>,
}

impl Net {
    /// An interface as `config` has it, but for the tap, whose descriptors come with it: of a machine
    /// with so many processors.
    ///
    /// # Errors
    /// When a number is out of bounds, or the descriptors are not a tap's.
    pub fn new(
        config: &NetConfig,
        vcpus: u8,
        tap: Option<TapDescriptors>,
    ) -> Result<(Self, NetHandle), NetError> {
        let most = vcpus.min(MAX_QUEUE_PAIRS);
        if !(1..=most).contains(&config.queue_pairs) {
            return Err(NetError::QueuePairs {
                pairs: config.queue_pairs,
                most,
            });
        }
        let pairs = usize::from(config.queue_pairs);
        let backends = tap.map(|tap| link::backends(tap, pairs)).transpose()?;
        Self::with_backends(config, backends)
    }

    fn with_backends(
        config: &NetConfig,
        backends: Option<Vec<Backend>>,
    ) -> Result<(Self, NetHandle), NetError> {
        if config.mtu < MIN_MTU {
            return Err(NetError::Mtu(config.mtu));
        }
        if config.mac[0] & GROUP != 0 || config.mac == [0; 6] {
            return Err(NetError::Mac(config.mac));
        }
        let pairs = usize::from(config.queue_pairs);
        let mut features = RING_FEATURES | features::ALWAYS;
        if pairs > 1 {
            features |= features::MQ;
        }
        let first = backends.as_ref().and_then(|backends| backends.first());
        let udp_segmentation = first.map_or(config.udp_segmentation, segments_udp);
        if udp_segmentation {
            features |= features::UDP_SEGMENTATION;
        }
        let mut queue_sizes = vec![PACKETS; 2 * pairs];
        queue_sizes.push(COMMANDS);
        let now = Instant::now();
        let link =
            Link::new(config.mac, pairs, udp_segmentation, backends).map_err(NetError::Event)?;
        let link = Arc::new(link);
        let device = Self {
            features,
            mtu: config.mtu,
            pairs,
            queue_sizes,
            receive_limiter: Limiter::new(config.limits.receive, now),
            transmit_limiter: Limiter::new(config.limits.transmit, now),
            link: Arc::clone(&link),
            workers: Vec::new(),
        };
        Ok((device, NetHandle(link)))
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        config[..6].copy_from_slice(&self.link.mac());
        if self.link.is_up() {
            config[6..8].copy_from_slice(&VIRTIO_NET_S_LINK_UP.to_le_bytes()[..2]);
        }
        let pairs = u16::try_from(self.pairs).unwrap_or(u16::MAX);
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    /// The queue pairs that a driver has set up, the first with the control queue.
    fn queue_pairs(&self, activation: Activation) -> io::Result<Vec<Pair>> {
        let Activation {
            memory,
            features: negotiated,
            queues,
            ..
        } = activation;
        let event_idx = negotiated & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let multiqueue = negotiated & features::MQ != 0;
        // Section 5.1.2: the control queue comes after the pairs that the driver knows of.
        let known = if multiqueue { self.pairs } else { 1 };
        let mut queues: Vec<Option<ActiveQueue>> = by_index(queues, 2 * known + 1);
        let control = queues
            .pop()
            .flatten()
            .filter(|_| negotiated & features::CTRL_VQ != 0);
        let rings: Vec<_> = queues
            .chunks_exact_mut(2)
            .map_while(|pair| Some((pair[0].take()?, pair[1].take()?)))
            .collect();
        if rings.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the network driver left out a queue",
            ));
        }
        let count = rings.len();
        let mut commands = control.map(|queue| Commands::new(queue, Arc::clone(&self.link), count));
        let pairs = rings
            .into_iter()
            .enumerate()
            .map(|(number, (receive, transmit))| {
                let counters = &self.link.counters;
                let receive = Receive::new(
                    Ring::new(receive, event_idx),
                    self.receive_limiter.clone(),
                    negotiated,
                    Arc::clone(counters),
                );
                let transmit = Transmit::new(
                    Ring::new(transmit, event_idx),
                    self.transmit_limiter.clone(),
                    negotiated,
                    Arc::clone(counters),
                );
                Pair::new(
                    number,
                    memory.clone(),
                    negotiated,
                    (receive, transmit),
                    Arc::clone(&self.link),
                    commands.take(),
                )
            });
        Ok(pairs.collect())
    }
}

/// How many pairs the driver used when the device was suspended, and whether its link was up.
fn known_link(state: &[u8]) -> io::Result<(usize, bool)> {
    match state {
        [in_use, up @ (0 | 1)] => Ok((usize::from(*in_use), *up == 1)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether a tap takes UDP packets to be cut into segments, and gives them.
fn segments_udp(backend: &Backend) -> bool {
    let flags = features::TUN_CSUM | features::TUN_USO;
    backend.tap.set_offload(flags).is_ok()
}

/// The first `count` queues, each at its place.
fn by_index(queues: Vec<ActiveQueue>, count: usize) -> Vec<Option<ActiveQueue>> {
    let mut places: Vec<_> = std::iter::repeat_with(|| None).take(count).collect();
    for queue in queues {
        if let Some(place) = places.get_mut(usize::from(queue.index)) {
            *place = Some(queue);
        }
    }
    places
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let known = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(known) {
            *to = *from;
        }
    }

    fn config_changes(&self) -> u8 {
        self.link.changes()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let interrupt = Arc::clone(&activation.config_interrupt);
        let resumed = activation.resumed.as_deref().map(known_link).transpose()?;
        let pairs = self.queue_pairs(activation)?;
        self.link.driver_up(pairs.len(), interrupt);
        if let Some((in_use, up)) = resumed {
            self.link.driver_resumed(in_use.min(pairs.len()), up);
        }
        for pair in pairs {
            match Worker::start("net", pair) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.reset();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        let workers = self.workers.drain(..);
        let positions = workers.flat_map(Worker::suspend).collect();
        let (in_use, up) = self.link.driver_suspended();
        Ok(Suspended {
            positions,
            state: vec![u8::try_from(in_use).unwrap_or(1), u8::from(up)],
            only_here: None,
        })
    }

    fn reset(&mut self) {
        self.workers.clear();
        self.link.driver_down();
        let counters = &self.link.counters;
        let [malformed, unsent, unwanted, useless] = [
            &counters.malformed,
            &counters.unsent,
            &counters.unwanted,
            &counters.useless,
        ]
        .map(|counter| counter.load(Ordering::Relaxed));
        log::debug!(
            "a network interface has dropped {malformed} malformed packets of its driver's and {unsent} others, \
             {unwanted} for it that it could not take, and {useless} useless buffers"
        );
    }
}
