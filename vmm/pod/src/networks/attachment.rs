//! What one pod has of networks, from its reservation to its end.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::definition::Network;
use super::netavark::{Action, Netavark};
use super::ports::Publication;
use super::stand_in::StandIn;
use super::store::{self, Networks, check_host};
use super::{Doing, NetworkError};
use crate::network;
use crate::state::{Directories, NetworkStatus, PodDir};
use crate::text::chain;
use crate::volumes::NetworkFacts;

/// A pod's place in one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// As it was when the pod joined: its teardown must find what its setup made.
    pub network: Network,
    /// In the pod.
    pub interface: String,
    /// One for each subnet of the network, in their order.
    pub addresses: Vec<IpAddr>,
}

/// `network.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    pub pod: String,
    pub hostname: String,
    pub memberships: Vec<Membership>,
    pub ports: Vec<Publication>,
    /// Somebody else's, which Hull changes nothing of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<PathBuf>,
    /// netavark has been run, or is about to be, and must be run again to undo it.
    pub wired: bool,
    /// The host's indices of its interfaces' far ends. They are ports of the networks' bridges for as long as the
    /// kernel takes to end a dead pod's namespace, and netavark keeps a bridge that has ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub far_ends: Vec<u32>,
}

impl Record {
    pub fn new(pod: &str, hostname: String) -> Self {
        Self {
            pod: pod.to_owned(),
            hostname,
            memberships: Vec::new(),
            ports: Vec::new(),
            namespace: None,
            wired: false,
            far_ends: Vec::new(),
        }
    }

    /// None: the pod has nothing, or has given it back.
    pub fn read(dir: &PodDir) -> Result<Option<Self>, NetworkError> {
        store::read(&dir.network())
    }

    pub fn join(&mut self, network: Network, interface: String, addresses: Vec<IpAddr>) {
        self.memberships.push(Membership {
            network,
            interface,
            addresses,
        });
    }

    pub fn networks(&self) -> impl Iterator<Item = &Network> {
        self.memberships.iter().map(|member| &member.network)
    }

    pub fn uses(&self, network: &str) -> bool {
        self.networks().any(|n| n.name == network)
    }

    pub fn addresses_in(&self, network: &str) -> Vec<IpAddr> {
        let members = self.memberships.iter();
        members
            .filter(|member| member.network.name == network)
            .flat_map(|member| member.addresses.clone())
            .collect()
    }

    /// netavark's options, in podman's form.
    fn options(&self, id: &str) -> Value {
        let mut aliases = vec![id];
        if self.hostname != self.pod {
            aliases.push(&self.hostname);
        }
        let mut networks = Map::new();
        let mut network_info = Map::new();
        for member in &self.memberships {
            let place = json!({
                "interface_name": member.interface,
                "static_ips": member.addresses,
                "aliases": aliases,
            });
            networks.insert(member.network.name.clone(), place);
            network_info.insert(member.network.name.clone(), json!(member.network));
        }
        let port = |port: &Publication| {
            json!({
                "host_ip": port.host_ip.map_or_else(String::new, |ip| ip.to_string()),
                "host_port": port.host_port,
                "container_ip": "",
                "container_port": port.container_port,
                "protocol": port.protocol.as_str(),
                "range": 1,
            })
        };
        json!({
            "container_id": id,
            "container_name": self.pod,
            "port_mappings": self.ports.iter().map(port).collect::<Vec<_>>(),
            "networks": networks,
            "network_info": network_info,
        })
    }
}

/// A pod's networks. What it has is on disk before it is made and until it is undone, so that
/// somebody else can undo it.
#[derive(Debug)]
pub struct Attachment {
    networks: Networks,
    dir: PodDir,
    record: Record,
}

impl Attachment {
    pub(super) fn keep(
        networks: &Networks,
        dir: &PodDir,
        record: Record,
    ) -> Result<Self, NetworkError> {
        let attachment = Self {
            networks: networks.clone(),
            dir: dir.clone(),
            record,
        };
        attachment.write()?;
        Ok(attachment)
    }

    /// What was reserved for a pod. None: nothing was, or it has been given back.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn open(directories: &Directories, dir: &PodDir) -> Result<Option<Self>, NetworkError> {
        let Some(record) = Record::read(dir)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            networks: Networks::open(directories)?,
            dir: dir.clone(),
            record,
        }))
    }

    /// Its places in named networks, in the order of their interfaces. Empty for a pod without a
    /// network, and for one in somebody else's.
    #[must_use]
    pub fn memberships(&self) -> &[Membership] {
        &self.record.memberships
    }

    /// Its ports that are the host's.
    #[must_use]
    pub fn ports(&self) -> &[Publication] {
        &self.record.ports
    }

    /// Somebody else's network namespace, in which the pod is to be.
    #[must_use]
    pub fn namespace(&self) -> Option<&Path> {
        self.record.namespace.as_deref()
    }

    /// Makes interfaces, addresses, routes, names and published ports for the pod's (otherwise empty)
    /// network namespace. Done again, it is done anew. Nothing is left of it when it fails.
    ///
    /// Blocks for as long as netavark takes.
    ///
    /// # Errors
    /// When the host has come to use the addresses in another way, or netavark fails.
    pub fn setup(
        &mut self,
        netavark: &Netavark,
        netns: BorrowedFd<'_>,
    ) -> Result<(), NetworkError> {
        if self.record.memberships.is_empty() {
            return Ok(());
        }
        let options = self.record.options(self.dir.id().as_str());
        let networks = self.networks.clone();
        let _locked = networks.lock()?;
        for network in self.record.networks() {
            check_host(network)?;
        }
        if self.record.wired {
            undo(netavark, netns, &options);
        }
        self.record.wired = true;
        self.write()?;
        if let Err(error) = netavark.run(Action::Setup, netns, &options) {
            undo(netavark, netns, &options);
            self.record.wired = false;
            self.write()?;
            return Err(error);
        }
        self.record.far_ends = network::far_ends(netns).map_err(NetworkError::FarEnds)?;
        self.write()
    }

    /// What the pod's files tell of its network. The addresses in somebody else's namespace are not
    /// known here.
    #[must_use]
    pub fn facts(&self) -> NetworkFacts {
        let members = &self.record.memberships;
        NetworkFacts {
            connected: self.record.namespace.is_some() || !members.is_empty(),
            addresses: members.iter().flat_map(|m| m.addresses.clone()).collect(),
            nameservers: self
                .record
                .networks()
                .flat_map(Network::nameservers)
                .collect(),
        }
    }

    /// The same for the pod's status.
    #[must_use]
    pub fn status(&self) -> NetworkStatus {
        NetworkStatus {
            names: self.record.networks().map(|n| n.name.clone()).collect(),
            namespace: self.record.namespace.clone(),
            ports: self.record.ports.iter().map(Publication::arrow).collect(),
        }
    }

    /// Undoes [`Self::setup`], and gives addresses and ports back. `netns` is the pod's namespace, or
    /// None when it is gone. Done again, it does nothing.
    ///
    /// Blocks for as long as netavark takes.
    ///
    /// # Errors
    /// When netavark fails. Addresses and ports are then still the pod's, and `hull gc` tries again.
    pub fn teardown(
        &mut self,
        netavark: &Netavark,
        netns: Option<BorrowedFd<'_>>,
    ) -> Result<(), NetworkError> {
        let networks = self.networks.clone();
        let _locked = networks.lock()?;
        if self.record.wired {
            let options = self.record.options(self.dir.id().as_str());
            match netns {
                Some(netns) => netavark.run(Action::Teardown, netns, &options)?,
                None => {
                    let interfaces: Vec<&str> = self
                        .record
                        .memberships
                        .iter()
                        .map(|member| member.interface.as_str())
                        .collect();
                    let stand_in = StandIn::new(&interfaces)
                        .doing(|| "making a namespace in place of the pod's".to_owned())?;
                    network::remove_veths(&self.record.far_ends).map_err(NetworkError::FarEnds)?;
                    netavark.run(Action::Teardown, stand_in.netns.as_fd(), &options)?;
                }
            }
            self.record.wired = false;
        }
        self.forget()
    }

    fn write(&self) -> Result<(), NetworkError> {
        store::write(&self.dir.network(), &self.record)
    }

    fn forget(&self) -> Result<(), NetworkError> {
        let path = self.dir.network();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).doing(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Undoes what there may be, of which nothing is known.
fn undo(netavark: &Netavark, netns: BorrowedFd<'_>, options: &Value) {
    if let Err(error) = netavark.run(Action::Teardown, netns, options) {
        tracing::debug!(error = chain(&error), "undoing what is there of a network");
    }
}

/// Gives back what a pod has whose supervisor is dead. Its namespace is gone with it.
///
/// # Errors
/// When netavark is missing or fails. What the pod has is then still on disk.
pub fn release(
    directories: &Directories,
    dir: &PodDir,
    limit: Duration,
) -> Result<(), NetworkError> {
    let Some(mut attachment) = Attachment::open(directories, dir)? else {
        return Ok(());
    };
    if !attachment.record.wired {
        return attachment.forget();
    }
    attachment.teardown(&Netavark::find(directories, limit)?, None)
}

#[cfg(test)]
#[path = "attachment_tests.rs"]
mod tests;
