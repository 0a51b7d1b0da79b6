//! The pod's network on the host, from its namespace to the taps of its machine, and back.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use hull_machine::client::{MachineSpec, NetSpec};
use hull_machine::config::NetLimits;

use super::failure::PodFailure;
use crate::agent::network::Plan;
use crate::network::{self, Namespace, Observed, Plug, VhostNet, WiringError};
use crate::networks::{Attachment, Netavark};
use crate::state::{Directories, PodDir};
use crate::text::chain;
use crate::volumes::NetworkFacts;

/// What the pod has of the host's networks. The default: nothing.
#[derive(Debug, Default)]
pub(super) struct HostNetwork {
    facts: NetworkFacts,
    wiring: Option<Wiring>,
}

/// A namespace whose interfaces are the machine's.
#[derive(Debug)]
struct Wiring {
    attachment: Attachment,
    /// None: the namespace is somebody else's.
    netavark: Option<Netavark>,
    namespace: Namespace,
    observed: Observed,
    plug: Plug,
}

impl HostNetwork {
    /// Makes what was reserved for the pod, whose machine has so many processors. `mounts` is the mount namespace for
    /// what outlives the pod.
    ///
    /// What is there of it after an error goes with [`crate::networks::release`], and with the process.
    pub fn set_up(
        directories: &Directories,
        dir: &PodDir,
        mounts: OwnedFd,
        limit: Duration,
        vcpus: u8,
    ) -> Result<Self, PodFailure> {
        let Some(mut attachment) = Attachment::open(directories, dir)? else {
            return Ok(Self::default());
        };
        let mut facts = attachment.facts();
        if !facts.connected {
            return Ok(Self::default());
        }
        let (namespace, netavark) = match attachment.namespace() {
            Some(path) => (Namespace::open(path)?, None),
            None => {
                let netavark = Netavark::find(directories, limit)?.in_mounts(mounts);
                let namespace = Namespace::create()?;
                attachment.setup(&netavark, namespace.as_fd())?;
                (namespace, Some(netavark))
            }
        };
        let observed = network::observe(&namespace)?;
        if netavark.is_none() {
            let addresses = observed.interfaces.iter().flat_map(|i| &i.addresses);
            facts.addresses = addresses.map(|address| address.ip).collect();
        }
        let vhost = VhostNet::from_environment()?;
        let plug = network::plug(&namespace, &observed, vcpus, vhost)?;
        Ok(Self {
            facts,
            wiring: Some(Wiring {
                attachment,
                netavark,
                namespace,
                observed,
                plug,
            }),
        })
    }

    /// What the pod's files tell of it.
    pub fn facts(&self) -> &NetworkFacts {
        &self.facts
    }

    /// What the agent is to be told; None: nothing.
    pub fn plan(&self) -> Option<Plan> {
        let wiring = self.wiring.as_ref()?;
        Some(network::plan(&wiring.observed))
    }

    /// Gives the machine its interfaces. Once: the taps go along.
    pub fn add_to(&mut self, mut spec: MachineSpec) -> Result<MachineSpec, PodFailure> {
        let Some(wiring) = &mut self.wiring else {
            return Ok(spec);
        };
        let queue_pairs = wiring.plug.queue_pairs();
        let taps = wiring.plug.take_taps();
        for (interface, tap) in wiring.observed.interfaces.iter().zip(taps) {
            let mtu = u16::try_from(interface.mtu).map_err(|_| WiringError::BadInterface {
                interface: interface.name.clone(),
                kind: interface.kind.clone(),
                reason: format!("its MTU of {} is more than 65535", interface.mtu),
            })?;
            let net = NetSpec {
                mac: interface.mac,
                mtu,
                queue_pairs,
                limits: NetLimits::default(),
            };
            spec = spec.net(net, Some(tap));
        }
        Ok(spec)
    }

    /// Undoes [`Self::set_up`], when the machine is gone. What fails is logged, and tried again by
    /// whoever removes the pod.
    pub fn take_down(self) {
        let Some(mut wiring) = self.wiring else {
            return;
        };
        if let Err(error) = wiring.plug.teardown(&wiring.namespace) {
            tracing::error!(error = chain(&error), "giving the pod's interfaces back");
        }
        let Some(netavark) = wiring.netavark else {
            return;
        };
        let netns = Some(wiring.namespace.as_fd());
        if let Err(error) = wiring.attachment.teardown(&netavark, netns) {
            tracing::error!(error = chain(&error), "taking the pod's network down");
        }
    }
}
