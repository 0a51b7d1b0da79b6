//! The definitions of networks on disk, and the lock under which they and leases change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::attachment::{Attachment, Record};
use super::definition::{
    DEFAULT_NETWORK, Driver, MTU, MTU_IPV6_MIN, Network, NetworkSubnet, check_name,
};
use super::ports::Asked;
use super::{Choice, Doing, NetworkError, lease, routes, subnet};
use crate::manifest::PodManifest;
use crate::state::{Directories, PodDir, PodId, private_dir, replace_file};

/// A file of ours is never longer than this.
const FILE_MAX: u64 = 4 << 20;
/// Of networks; each has a bridge and firewall rules.
const MAX_NETWORKS: usize = 1024;
/// Bridges are called by this and a number.
const INTERFACE_PREFIX: &str = "hull";
/// Of one network, of each kind.
const MAX_LABELS: usize = 64;

/// What a new network is to be. What isn't said, is chosen.
#[derive(Debug, Clone, Default)]
pub struct Creation {
    pub name: String,
    /// `ADDRESS/PREFIX`, at most one of each family.
    pub subnets: Vec<String>,
    /// One for each subnet at most, in their order.
    pub gateways: Vec<String>,
    pub ipv6: bool,
    pub internal: bool,
    pub disable_dns: bool,
    pub mtu: Option<u32>,
    pub labels: BTreeMap<String, String>,
}

/// The networks of this host.
#[derive(Debug, Clone)]
pub struct Networks {
    directories: Directories,
    path: PathBuf,
}

/// Held while definitions or leases change.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    networks: &'a Networks,
    _lock: File,
}

/// `last.json`
#[derive(Debug, Default, Serialize, Deserialize)]
struct Last(BTreeMap<IpNet, IpAddr>);

impl Networks {
    /// # Errors
    /// When the directory can't be made, or isn't ours alone.
    pub fn open(directories: &Directories) -> Result<Self, NetworkError> {
        directories.prepare()?;
        let path = directories.data().join("networks");
        private_dir(&path)?;
        Ok(Self {
            directories: directories.clone(),
            path,
        })
    }

    /// Defines a network.
    ///
    /// # Errors
    /// [`NetworkError::Refused`] when it can't be as wanted.
    pub fn create(&self, creation: &Creation) -> Result<Network, NetworkError> {
        self.lock()?.create(creation)
    }

    /// All networks, by name.
    ///
    /// # Errors
    /// When a definition can't be read.
    pub fn list(&self) -> Result<Vec<Network>, NetworkError> {
        let doing = || format!("reading {}", self.path.display());
        let mut networks = Vec::new();
        for entry in fs::read_dir(&self.path).doing(doing)? {
            let name = entry.doing(doing)?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(".json"));
            // The list of last addresses isn't one, nor is what a crash left half-written.
            if let Some(name) = name.filter(|name| *name != LAST)
                && let Some(network) = self.read(name)?
            {
                networks.push(network);
            }
        }
        networks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(networks)
    }

    /// # Errors
    /// [`NetworkError::NoSuchNetwork`] when there is none of that name.
    pub fn find(&self, name: &str) -> Result<Network, NetworkError> {
        if check_name(name).is_ok()
            && let Some(network) = self.read(name)?
        {
            return Ok(network);
        }
        Err(NetworkError::NoSuchNetwork(name.to_owned()))
    }

    /// The pods that use a network.
    ///
    /// # Errors
    /// When what a pod has can't be read.
    pub fn users(&self, network: &str) -> Result<Vec<String>, NetworkError> {
        let records = self.records()?;
        let users = records.into_iter().filter(|(_, r)| r.uses(network));
        Ok(users.map(|(_, record)| record.pod).collect())
    }

    /// # Errors
    /// [`NetworkError::InUse`] while a pod has it.
    pub fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let _locked = self.lock()?;
        let network = self.find(name)?;
        if let Some(pod) = self.users(&network.name)?.into_iter().next() {
            return Err(NetworkError::InUse {
                network: network.name,
                pod,
            });
        }
        let path = self.file(&network.name);
        fs::remove_file(&path).doing(|| format!("removing {}", path.display()))
    }

    /// Gives a pod that has been claimed what it asks for: addresses, and ports of the host. They are
    /// its own until its directory is removed or [`Attachment::teardown`].
    ///
    /// # Errors
    /// [`NetworkError::Refused`] with field and value when a port can't be had.
    pub fn reserve(
        &self,
        dir: &PodDir,
        manifest: &PodManifest,
        choice: &Choice,
        ports: &[Asked],
    ) -> Result<Attachment, NetworkError> {
        let mut record = Record::new(manifest.name(), crate::oci::infra(manifest).hostname);
        let names = match choice {
            Choice::None => return Attachment::keep(self, dir, record),
            Choice::Namespace(path) => {
                record.namespace = Some(path.clone());
                return Attachment::keep(self, dir, record);
            }
            Choice::Named(names) => names,
        };
        let locked = self.lock()?;
        let others = self.records()?;
        check_ports(ports, &others)?;
        record.ports = ports.iter().map(|port| port.publication.clone()).collect();
        let mut last: Last = read(&self.path.join(format!("{LAST}.json")))?.unwrap_or_default();
        for (n, name) in names.iter().enumerate() {
            let network = locked.network(name, &others)?;
            let taken: BTreeSet<IpAddr> = others
                .iter()
                .flat_map(|(_, record)| record.addresses_in(name))
                .collect();
            let mut addresses = Vec::new();
            for subnet in &network.subnets {
                let before = last.0.get(&subnet.subnet).copied();
                let address =
                    lease::next(subnet, &taken, before).ok_or_else(|| NetworkError::Exhausted {
                        network: name.clone(),
                        subnet: subnet.subnet.to_string(),
                    })?;
                last.0.insert(subnet.subnet, address);
                addresses.push(address);
            }
            record.join(network, format!("eth{n}"), addresses);
        }
        last.0.retain(|subnet, _| {
            let known = |network: &Network| network.subnets.iter().any(|s| s.subnet == *subnet);
            record.networks().any(known) || others.iter().any(|(_, r)| r.networks().any(known))
        });
        write(&self.path.join(format!("{LAST}.json")), &last)?;
        Attachment::keep(self, dir, record)
    }

    pub(super) fn lock(&self) -> Result<Locked<'_>, NetworkError> {
        let path = self.path.join("lock");
        let doing = || format!("locking {}", path.display());
        let lock = crate::state::open_private(&path)?;
        rustix::io::retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive)).doing(doing)?;
        Ok(Locked {
            networks: self,
            _lock: lock,
        })
    }

    /// What all pods have, living or not.
    pub(super) fn records(&self) -> Result<Vec<(PodId, Record)>, NetworkError> {
        let pods = self.directories.pods_run();
        let doing = || format!("reading {}", pods.display());
        let mut records = Vec::new();
        for entry in fs::read_dir(&pods).doing(doing)? {
            let name = entry.doing(doing)?.file_name().into_string();
            let Some(id) = name.ok().and_then(|name| PodId::try_from(name).ok()) else {
                continue;
            };
            if let Some(record) = Record::read(&self.directories.pod(&id))? {
                records.push((id, record));
            }
        }
        Ok(records)
    }

    fn read(&self, name: &str) -> Result<Option<Network>, NetworkError> {
        read(&self.file(name))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.json"))
    }
}

/// The name of a file among the definitions that is none.
const LAST: &str = "last";

impl Locked<'_> {
    /// A network for a pod. The default one is made at its first use, and what Hull has chosen is
    /// chosen anew where the host has come to use it.
    fn network(&self, name: &str, others: &[(PodId, Record)]) -> Result<Network, NetworkError> {
        let found = self.networks.find(name);
        let mut network = match found {
            Err(NetworkError::NoSuchNetwork(_)) if name == DEFAULT_NETWORK => {
                return self.create(&Creation {
                    name: name.to_owned(),
                    ..Creation::default()
                });
            }
            found => found?,
        };
        if others.iter().any(|(_, record)| record.uses(name)) {
            return check_host(&network).map(|()| network);
        }
        let defined = network.clone();
        // Somebody else's, if no pod of ours is on it: pods of two installations mustn't meet there.
        if interface_exists(&network.network_interface) {
            network.network_interface = self.free_interface(&self.networks.list()?);
        }
        if let Err(overlap) = check_host(&network) {
            if !network.chosen_subnets {
                return Err(overlap);
            }
            network.subnets = self.choose(network.ipv6_enabled, &[])?;
        }
        if network != defined {
            write(&self.networks.file(name), &network)?;
        }
        Ok(network)
    }

    fn create(&self, creation: &Creation) -> Result<Network, NetworkError> {
        let name = creation.name.as_str();
        check_name(name)
            .map_err(|rule| NetworkError::Refused(format!("network {name:?}: {rule}")))?;
        if name == LAST {
            return Err(NetworkError::Refused(format!(
                "network {name:?}: has a meaning of its own; choose another name"
            )));
        }
        let existing = self.networks.list()?;
        if existing.iter().any(|network| network.name == name) {
            return Err(NetworkError::Refused(format!(
                "network {name:?}: there is one of that name already"
            )));
        }
        if existing.len() >= MAX_NETWORKS {
            return Err(NetworkError::Refused(format!(
                "network {name:?}: there are {MAX_NETWORKS} networks already, which is the most"
            )));
        }
        let given = given_subnets(creation)?;
        let taken = self.taken()?;
        for subnet in &given {
            if let Some((who, other)) = taken
                .iter()
                .find(|(_, other)| subnet::overlap(&subnet.subnet, other))
            {
                return Err(NetworkError::Refused(format!(
                    "--subnet {}: overlaps {other} of {who}",
                    subnet.subnet
                )));
            }
        }
        let chosen_subnets = given.is_empty();
        let has_ipv6 = given.iter().any(|s| matches!(s.subnet, IpNet::V6(_)));
        let subnets = match (chosen_subnets, creation.ipv6 && !has_ipv6) {
            (false, false) => given,
            (_, ipv6) => self.choose(ipv6, &given)?,
        };
        let ipv6_enabled = subnets.iter().any(|s| matches!(s.subnet, IpNet::V6(_)));
        let network = Network {
            name: name.to_owned(),
            id: random_id().doing(|| "reading random numbers".to_owned())?,
            driver: Driver::Bridge,
            network_interface: self.free_interface(&existing),
            created: Timestamp::now(),
            subnets,
            ipv6_enabled,
            internal: creation.internal,
            dns_enabled: !creation.disable_dns,
            labels: check_labels(&creation.labels)?,
            options: options(creation.mtu, ipv6_enabled)?,
            ipam_options: BTreeMap::from([("driver".to_owned(), "host-local".to_owned())]),
            chosen_subnets,
        };
        write(&self.networks.file(name), &network)?;
        Ok(network)
    }

    /// Completes what is given by an IPv4 subnet if there is none at all, and one of IPv6 if asked for.
    fn choose(
        &self,
        ipv6: bool,
        given: &[NetworkSubnet],
    ) -> Result<Vec<NetworkSubnet>, NetworkError> {
        let mut subnets = given.to_vec();
        if given.is_empty() {
            let taken: Vec<IpNet> = self.taken()?.into_iter().map(|(_, net)| net).collect();
            let start = self.first_choice();
            let chosen = subnet::choose(start, &taken).ok_or_else(|| {
                NetworkError::Refused(
                    "no subnet of 10.83.0.0/16 is free; choose one with --subnet".to_owned(),
                )
            })?;
            subnets.push(chosen);
        }
        if ipv6 {
            subnets.push(subnet::choose_ipv6().doing(|| "reading random numbers".to_owned())?);
        }
        Ok(subnets)
    }

    /// The first name for a bridge that no network and no interface of the host has.
    fn free_interface(&self, networks: &[Network]) -> String {
        let start = self.first_choice();
        let named = |name: &String| networks.iter().any(|n| n.network_interface == *name);
        (start..start + 2 * MAX_NETWORKS)
            .map(|n| format!("{INTERFACE_PREFIX}{n}"))
            .find(|name| !named(name) && !interface_exists(name))
            .unwrap_or_default()
    }

    /// Where to begin to choose subnets and bridges: installations with data directories of their own don't know of each
    /// other's networks as long as no pod uses them.
    fn first_choice(&self) -> usize {
        let data = self.networks.directories.data();
        if data == Path::new("/var/lib/hull") {
            return 0;
        }
        let mut hasher = DefaultHasher::new();
        data.hash(&mut hasher);
        usize::from(u16::try_from(hasher.finish() >> 48).unwrap_or(0))
    }

    /// Subnets that are in use, and by whom.
    fn taken(&self) -> Result<Vec<(String, IpNet)>, NetworkError> {
        let networks = self.networks.list()?;
        let bridges: BTreeSet<&str> = networks
            .iter()
            .map(|network| network.network_interface.as_str())
            .collect();
        let of_networks = networks.iter().flat_map(|network| {
            let who = format!("network {}", network.name);
            network.subnets.iter().map(move |s| (who.clone(), s.subnet))
        });
        let of_host = routes::of_host()
            .into_iter()
            .filter(|route| !bridges.contains(route.interface.as_str()))
            .map(|r| {
                (
                    format!("the host's interface {}", r.interface),
                    r.destination,
                )
            });
        Ok(of_networks.chain(of_host).collect())
    }
}

/// That the host doesn't reach a network's addresses by another way than the network's bridge.
pub(super) fn check_host(network: &Network) -> Result<(), NetworkError> {
    let routes = routes::of_host();
    let foreign = |subnet: &NetworkSubnet| {
        routes
            .iter()
            .filter(|route| route.interface != network.network_interface)
            .find(|route| subnet::overlap(&route.destination, &subnet.subnet))
            .map(|route| (subnet.subnet, route.clone()))
    };
    match network.subnets.iter().find_map(foreign) {
        None => Ok(()),
        Some((subnet, route)) => Err(NetworkError::Overlap {
            network: network.name.clone(),
            subnet: subnet.to_string(),
            route: route.destination.to_string(),
            interface: route.interface,
        }),
    }
}

fn check_ports(ports: &[Asked], others: &[(PodId, Record)]) -> Result<(), NetworkError> {
    for (n, asked) in ports.iter().enumerate() {
        let refused = |why: String| Err(NetworkError::Refused(format!("{}: {why}", asked.origin)));
        let port = &asked.publication;
        if let Some(other) = ports[..n].iter().find(|o| o.publication.clashes(port)) {
            return refused(format!("is the same port of the host as {}", other.origin));
        }
        let has = |record: &Record| record.ports.iter().any(|p| p.clashes(port));
        if let Some((id, other)) = others.iter().find(|(_, record)| has(record)) {
            return refused(format!(
                "pod {} (id {id}) has that port of the host; if it doesn't run any more, hull gc frees it",
                other.pod
            ));
        }
        if let Err(why) = port.try_on_host() {
            return refused(why);
        }
    }
    Ok(())
}

fn given_subnets(creation: &Creation) -> Result<Vec<NetworkSubnet>, NetworkError> {
    if let Some(gateway) = creation.gateways.get(creation.subnets.len()) {
        return Err(NetworkError::Refused(format!(
            "--gateway {gateway}: needs a --subnet of its own"
        )));
    }
    let mut given: Vec<NetworkSubnet> = Vec::new();
    for (n, text) in creation.subnets.iter().enumerate() {
        let gateway = creation.gateways.get(n).map(String::as_str);
        let subnet = subnet::parse(text, gateway).map_err(NetworkError::Refused)?;
        let family = |s: &NetworkSubnet| matches!(s.subnet, IpNet::V6(_));
        if given.iter().any(|other| family(other) == family(&subnet)) {
            return Err(NetworkError::Refused(format!(
                "--subnet {text}: a network has at most one subnet of each family"
            )));
        }
        given.push(subnet);
    }
    Ok(given)
}

fn options(mtu: Option<u32>, ipv6: bool) -> Result<BTreeMap<String, String>, NetworkError> {
    // netavark, left alone, lets pods of all networks reach each other through the host.
    let mut options = BTreeMap::from([("isolate".to_owned(), "true".to_owned())]);
    let Some(mtu) = mtu else {
        return Ok(options);
    };
    let least = if ipv6 { MTU_IPV6_MIN } else { *MTU.start() };
    if !(least..=*MTU.end()).contains(&mtu) {
        return Err(NetworkError::Refused(format!(
            "--mtu {mtu}: must be {least} to {}",
            MTU.end()
        )));
    }
    options.insert("mtu".to_owned(), mtu.to_string());
    Ok(options)
}

fn check_labels(
    labels: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, NetworkError> {
    if labels.len() > MAX_LABELS {
        return Err(NetworkError::Refused(format!(
            "--label: {} labels are too many; a network has at most {MAX_LABELS}",
            labels.len()
        )));
    }
    Ok(labels.clone())
}

fn interface_exists(name: &str) -> bool {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None);
    socket.is_ok_and(|socket| name_to_index(socket, name).is_ok())
}

fn random_id() -> io::Result<String> {
    let mut bytes = [0u8; 32];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Reads one of our files. None: it isn't there.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, NetworkError> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|f| f.take(FILE_MAX).read_to_end(&mut content));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.doing(|| format!("reading {}", path.display()))?,
    };
    serde_json::from_slice(&content)
        .map(Some)
        .map_err(|source| NetworkError::Format {
            path: path.into(),
            source,
        })
}

pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), NetworkError> {
    let content = serde_json::to_vec_pretty(value).map_err(|source| NetworkError::Format {
        path: path.into(),
        source,
    })?;
    Ok(replace_file(path, &content)?)
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
