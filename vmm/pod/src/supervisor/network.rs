//! The pod's network on the host, from its namespace to the taps of its machine, and back.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hull_machine::client::{Machine, NetSpec, PlugError};
use hull_machine::config::{DirectionLimits, NetLimits, RateLimit, TapDescriptors};
use tokio::sync::Mutex;

use super::failure::PodFailure;
use crate::agent::network::Plan;
use crate::agent::{Agent, AgentError};
use crate::manifest::Bandwidth;
use crate::network::{self, Namespace, Observed, Plug, VhostNet, WiringError};
use crate::networks::{Attachment, Netavark};
use crate::state::{Directories, PodDir};
use crate::text::chain;
use crate::volumes::NetworkFacts;

/// So many interfaces somebody else's namespace may get after the machine has been started: Docker wires a
/// container after it has been made.
const LATE: usize = 4;
/// What an interface has until the guest is told its own: an address of ours (bit 1 of the first byte; IEEE 802), the
/// last byte apart, and the most that the guest may choose as its MTU.
const FIRST_MAC: [u8; 5] = [0x02, b'h', b'u', b'l', b'l'];
const MAX_MTU: u16 = u16::MAX;

/// After a pause so much of a second's bytes goes at once, and at least the longest packet.
const BURSTS_PER_SECOND: u64 = 10;
const MIN_BURST: u64 = 64 << 10;

/// How packets get from a tap to the machine.
#[derive(Debug, Clone, Copy)]
pub struct Queues {
    /// The machine's processors; for each there is a pair of queues.
    pub vcpus: u8,
    pub vhost: VhostNet,
}

/// What the pod has of the host's networks. The default: nothing.
///
/// It comes in two steps, since the machine boots in the meantime: first the namespace, and how many interfaces the
/// machine is to have, then [`Self::connect`].
#[derive(Debug, Default)]
pub struct HostNetwork {
    facts: NetworkFacts,
    wiring: Option<Wiring>,
}

/// A namespace whose interfaces are the machine's.
#[derive(Debug)]
struct Wiring {
    /// What netavark makes. None: the namespace is somebody else's.
    named: Option<(Attachment, Netavark)>,
    namespace: Namespace,
    /// Nothing until it is connected.
    observed: Observed,
    plug: Plug,
    /// By its place among the machine's network devices, the index of the interface that each is for. None: it is
    /// to spare.
    devices: Vec<Option<u32>>,
}

/// What has changed in a namespace.
#[derive(Debug)]
struct Change {
    /// To be plugged, each with the device's place.
    taps: Vec<(u8, TapDescriptors)>,
    plan: Plan,
    addresses: Vec<IpAddr>,
}

impl HostNetwork {
    /// Makes the namespace for what was reserved for the pod. `mounts` is the mount namespace for what outlives the
    /// pod.
    pub(super) fn open(
        directories: &Directories,
        dir: &PodDir,
        mounts: OwnedFd,
        limit: Duration,
        queues: Queues,
    ) -> Result<Self, PodFailure> {
        let Some(attachment) = Attachment::open(directories, dir)? else {
            return Ok(Self::default());
        };
        let facts = attachment.facts();
        if !facts.connected {
            return Ok(Self::default());
        }
        if let Some(path) = attachment.namespace() {
            return Self::join(Namespace::open(path)?, facts, queues);
        }
        let netavark = Netavark::find(directories, limit)?.in_mounts(mounts);
        let interfaces = attachment.memberships().len();
        Ok(Self {
            facts,
            wiring: Some(Wiring {
                named: Some((attachment, netavark)),
                namespace: Namespace::create()?,
                observed: Observed::default(),
                plug: Plug::new(interfaces, queues.vcpus, queues.vhost),
                devices: vec![None; interfaces],
            }),
        })
    }

    /// Takes somebody else's namespace, which may be wired further at any time.
    ///
    /// # Errors
    /// When its interfaces can't be given to a machine.
    pub fn join(
        namespace: Namespace,
        facts: NetworkFacts,
        queues: Queues,
    ) -> Result<Self, PodFailure> {
        let observed = network::observe(&namespace)?;
        let devices = observed.interfaces.len() + LATE;
        Ok(Self {
            facts: NetworkFacts {
                addresses: addresses(&observed),
                ..facts
            },
            wiring: Some(Wiring {
                named: None,
                namespace,
                observed: Observed::default(),
                plug: Plug::new(devices, queues.vcpus, queues.vhost),
                devices: vec![None; devices],
            }),
        })
    }

    /// Makes what was reserved for the pod, and a tap for each of its interfaces: to be plugged, each with the device's
    /// place. Blocks for as long as netavark takes.
    ///
    /// What is there of it after an error goes with [`crate::networks::release`], and with the process.
    ///
    /// # Errors
    /// When its interfaces can't be had, or can't be given to a machine.
    pub fn connect(&mut self) -> Result<Vec<(u8, TapDescriptors)>, PodFailure> {
        let Some(wiring) = &mut self.wiring else {
            return Ok(Vec::new());
        };
        if let Some((attachment, netavark)) = &mut wiring.named {
            attachment.setup(netavark, wiring.namespace.as_fd())?;
        }
        let change = wiring.look_again()?;
        if wiring.named.is_none() {
            self.facts.addresses = addresses(&wiring.observed);
        }
        Ok(change.map(|change| change.taps).unwrap_or_default())
    }

    /// What the pod's files tell of it.
    #[must_use]
    pub fn facts(&self) -> &NetworkFacts {
        &self.facts
    }

    /// Another descriptor of the namespace that the machine's taps are in, if there is one.
    pub(super) fn namespace(&self) -> Result<Option<Namespace>, WiringError> {
        let wiring = self.wiring.as_ref();
        wiring
            .map(|wiring| wiring.namespace.try_clone())
            .transpose()
    }

    /// What the agent is to be told; None: nothing.
    pub(super) fn plan(&self) -> Option<Plan> {
        self.wiring.as_ref().map(Wiring::plan)
    }

    /// The machine's interfaces, each with this bandwidth. Their links are down until their taps are plugged.
    #[must_use]
    pub fn devices(&self, bandwidth: Bandwidth) -> Vec<NetSpec> {
        let limits = NetLimits {
            receive: limits(bandwidth.ingress),
            transmit: limits(bandwidth.egress),
        };
        self.wiring.as_ref().map_or_else(Vec::new, |wiring| {
            devices(wiring.devices.len(), wiring.plug.queue_pairs(), limits)
        })
    }

    /// The interfaces of a machine with so many processors and networks, for a template.
    #[must_use]
    pub fn devices_for(interfaces: usize, vcpus: u8) -> Vec<NetSpec> {
        let plug = Plug::new(interfaces, vcpus, VhostNet::Off);
        devices(interfaces, plug.queue_pairs(), NetLimits::default())
    }

    /// Undoes [`Self::connect`], when the machine is gone. What fails is logged, and tried again by
    /// whoever removes the pod.
    pub fn take_down(&mut self) {
        let Some(wiring) = self.wiring.take() else {
            return;
        };
        if let Err(error) = wiring.plug.teardown(&wiring.namespace) {
            tracing::error!(error = chain(&error), "giving the pod's interfaces back");
        }
        let Some((mut attachment, netavark)) = wiring.named else {
            return;
        };
        let netns = Some(wiring.namespace.as_fd());
        if let Err(error) = attachment.teardown(&netavark, netns) {
            tracing::error!(error = chain(&error), "taking the pod's network down");
        }
    }
}

impl Wiring {
    fn plan(&self) -> Plan {
        let mut plan = network::plan(&self.observed);
        for (planned, interface) in plan.interfaces.iter_mut().zip(&self.observed.interfaces) {
            let place = (0..)
                .zip(&self.devices)
                .find(|(_, device)| **device == Some(interface.index));
            if let Some((place, _)) = place {
                planned.device = place;
            }
        }
        plan
    }

    /// Looks at the namespace, and makes taps for the interfaces that have none. None: nothing has changed since the
    /// last look. An interface that is gone leaves its device unused.
    fn look_again(&mut self) -> Result<Option<Change>, WiringError> {
        let observed = network::observe(&self.namespace)?;
        if observed == self.observed {
            return Ok(None);
        }
        let mut taps = Vec::new();
        for interface in &observed.interfaces {
            let index = Some(interface.index);
            if self.devices.contains(&index) {
                if !self.observed.interfaces.contains(interface) {
                    self.plug.guard_anew(&self.namespace, interface)?;
                }
                continue;
            }
            let place = self.devices.iter().position(Option::is_none);
            let Some(place) = place.and_then(|place| u8::try_from(place).ok()) else {
                return Err(WiringError::TooMany {
                    what: "interfaces that came after the pod was started",
                    limit: LATE,
                });
            };
            let tap = self.plug.add(&self.namespace, interface)?;
            self.devices[usize::from(place)] = index;
            taps.push((place, tap));
        }
        self.observed = observed;
        Ok(Some(Change {
            taps,
            plan: self.plan(),
            addresses: addresses(&self.observed),
        }))
    }
}

fn devices(count: usize, queue_pairs: u8, limits: NetLimits) -> Vec<NetSpec> {
    let udp_segmentation = network::taps_segment_udp();
    let [a, b, c, d, e] = FIRST_MAC;
    (0..=u8::MAX)
        .take(count)
        .map(|number| NetSpec {
            mac: [a, b, c, d, e, number],
            mtu: MAX_MTU,
            queue_pairs,
            udp_segmentation,
            limits,
        })
        .collect()
}

/// Of so many bits a second.
fn limits(bandwidth: Option<u64>) -> DirectionLimits {
    let bytes = bandwidth.and_then(|bits| NonZeroU64::new(bits / 8));
    DirectionLimits {
        bandwidth: bytes.map(|per_second| RateLimit {
            per_second,
            burst: (per_second.get() / BURSTS_PER_SECOND).max(MIN_BURST),
        }),
        packets: None,
    }
}

fn addresses(observed: &Observed) -> Vec<IpAddr> {
    let addresses = observed.interfaces.iter().flat_map(|i| &i.addresses);
    addresses.map(|address| address.ip).collect()
}

/// Why a guest was not given what its namespace has come to have.
#[derive(Debug, thiserror::Error)]
pub enum RewireError {
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error("giving the machine a network interface")]
    Plug(#[from] PlugError),
    #[error("telling the guest's agent")]
    Agent(#[from] AgentError),
    #[error("a task of the supervisor")]
    Task(#[from] tokio::task::JoinError),
}

/// The network of a pod that runs. Somebody else's namespace may be wired further at any time.
#[derive(Debug)]
pub struct PodNetwork {
    host: Arc<Mutex<HostNetwork>>,
    machine: Arc<Machine>,
    agent: Agent,
}

impl PodNetwork {
    #[must_use]
    pub fn new(host: Arc<Mutex<HostNetwork>>, machine: Arc<Machine>, agent: Agent) -> Self {
        Self {
            host,
            machine,
            agent,
        }
    }

    /// Gives the guest what the namespace has come to have since the last look, and returns the addresses there are
    /// now. Called when a container starts. None: nothing has changed.
    ///
    /// # Errors
    /// When the guest can't be given it.
    pub async fn look_again(&self) -> Result<Option<Vec<IpAddr>>, RewireError> {
        let mut host = Arc::clone(&self.host).lock_owned().await;
        if host
            .wiring
            .as_ref()
            .is_none_or(|wiring| wiring.named.is_some())
        {
            return Ok(None);
        }
        // The lock is held until the guest has been told: looks come one after another.
        let (_host, change) = tokio::task::spawn_blocking(move || {
            let change = host.wiring.as_mut().map_or(Ok(None), Wiring::look_again);
            (host, change)
        })
        .await?;
        let Some(change) = change? else {
            return Ok(None);
        };
        for (place, tap) in change.taps {
            self.machine.plug_net(place, tap).await?;
        }
        self.agent.configure_network(&change.plan).await?;
        Ok(Some(change.addresses))
    }
}
