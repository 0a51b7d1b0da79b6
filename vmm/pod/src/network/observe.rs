//! What is in a pod's network namespace, and what the guest is told of it.

use std::net::{IpAddr, Ipv6Addr};

use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol,
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::kind::{self, concerns_the_pod};
use super::netlink::Netlink;
use super::{
    Doing, MAX_ADDRESSES, MAX_INTERFACES, MAX_NEIGHBOURS, MAX_ROUTES, Namespace, NetworkError,
};
use crate::agent::network::{Address, Interface, Neighbour, Plan, Route};

/// What the standard asks of every IPv4 network, RFC 791.
const MIN_MTU: u16 = 68;
/// A tap's, which is 65535 with the Ethernet header.
const MAX_MTU: u16 = 65_521;

/// An interface that the pod is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The kernel's number, which no other interface of the namespace has had.
    pub index: u32,
    /// In the words of `ip link`: `veth`, `macvlan`, ...; `physical`.
    pub kind: String,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// Without the link-local ones that a kernel makes itself: the guest's kernel makes the same from
    /// the same hardware address, and told of them it would have them for good.
    pub addresses: Vec<Address>,
}

/// A pod's network namespace at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// In the order in which they came to be.
    pub interfaces: Vec<Found>,
    /// Unicast, of the main table; those on the link first. Not there are those that a kernel makes
    /// itself when it is given an interface's addresses.
    routes: Vec<Route>,
    /// The permanent ones: the others are learned.
    neighbours: Vec<Neighbour>,
}

/// How a namespace differs from what has been plugged.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference<'a> {
    /// To be plugged.
    pub added: Vec<&'a Found>,
    /// The indices of interfaces that aren't there any more.
    pub gone: Vec<u32>,
}

impl Observed {
    /// Compares with the interfaces that have been plugged.
    #[must_use]
    pub fn diff(&self, plugged: &[u32]) -> Difference<'_> {
        let is_there = |index| self.interfaces.iter().any(|found| found.index == index);
        Difference {
            added: self
                .interfaces
                .iter()
                .filter(|found| !plugged.contains(&found.index))
                .collect(),
            gone: plugged
                .iter()
                .copied()
                .filter(|index| !is_there(*index))
                .collect(),
        }
    }

    /// What the guest is to be told. `devices` are the indices of interfaces, in the order of the
    /// machine's network devices; of other interfaces nothing is said.
    #[must_use]
    pub fn plan(&self, devices: &[u32]) -> Plan {
        let interfaces: Vec<Interface> = (0..)
            .zip(devices)
            .filter_map(|(device, index)| {
                let found = self.interfaces.iter().find(|found| found.index == *index)?;
                Some(Interface {
                    device,
                    name: found.name.clone(),
                    mac: found.mac,
                    mtu: found.mtu.into(),
                    addresses: found.addresses.clone(),
                })
            })
            .collect();
        let is_told = |name: &str| interfaces.iter().any(|interface| interface.name == name);
        Plan {
            routes: self
                .routes
                .iter()
                .filter(|route| is_told(&route.interface))
                .cloned()
                .collect(),
            neighbours: self
                .neighbours
                .iter()
                .filter(|neighbour| is_told(&neighbour.interface))
                .cloned()
                .collect(),
            interfaces,
        }
    }
}

/// Looks at a namespace.
///
/// # Errors
/// When an interface is of a kind that a pod can't have, or there is more of anything than it can have.
pub async fn observe(namespace: &Namespace) -> Result<Observed, NetworkError> {
    let netlink = namespace.netlink()?;
    let mut links = Vec::new();
    for message in list(
        &netlink,
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    )
    .await?
    {
        if let RouteNetlinkMessage::NewLink(link) = message {
            links.push(link);
        }
    }
    let mut observed = Observed {
        interfaces: interfaces(&links)?,
        ..Observed::default()
    };
    let mut addresses = Vec::new();
    for message in list(
        &netlink,
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
    )
    .await?
    {
        if let RouteNetlinkMessage::NewAddress(address) = message {
            addresses.push(address);
        }
    }
    for found in &mut observed.interfaces {
        found.addresses = addresses
            .iter()
            .filter(|message| message.header.index == found.index)
            .filter_map(|message| address(message, found.mac))
            .collect();
        let what = format!("addresses of {}", found.name);
        bounded(what, found.addresses.len(), MAX_ADDRESSES)?;
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut asked = RouteMessage::default();
        asked.header.address_family = family;
        for message in list(&netlink, RouteNetlinkMessage::GetRoute(asked)).await? {
            if let RouteNetlinkMessage::NewRoute(message) = message {
                observed
                    .routes
                    .extend(route(&message, &observed.interfaces));
            }
        }
    }
    observed.routes.sort_by_key(|route| route.gateway.is_some());
    bounded("routes".into(), observed.routes.len(), MAX_ROUTES)?;
    let asked = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    for message in list(&netlink, asked).await? {
        if let RouteNetlinkMessage::NewNeighbour(message) = message {
            observed
                .neighbours
                .extend(neighbour(&message, &observed.interfaces));
        }
    }
    bounded(
        "neighbours".into(),
        observed.neighbours.len(),
        MAX_NEIGHBOURS,
    )?;
    Ok(observed)
}

async fn list(
    netlink: &Netlink,
    asked: RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
    netlink
        .list(asked)
        .await
        .doing(|| "looking at the pod's network namespace".to_owned())
}

fn bounded(what: String, count: usize, limit: usize) -> Result<(), NetworkError> {
    if count > limit {
        return Err(NetworkError::TooMany { what, count, limit });
    }
    Ok(())
}

fn interfaces(links: &[LinkMessage]) -> Result<Vec<Found>, NetworkError> {
    let mut interfaces = Vec::new();
    for link in links {
        let name = name(link);
        if !concerns_the_pod(link, name) {
            tracing::debug!(interface = name, "not for the pod");
            continue;
        }
        let refused = |why: &str| NetworkError::Unsupported {
            interface: name.to_owned(),
            kind: kind::kind(link),
            why: why.to_owned(),
        };
        kind::check(link).map_err(refused)?;
        let lower = kind::lower(link)
            .and_then(|index| links.iter().find(|link| link.header.index == index));
        if let Some(lower) = lower
            && concerns_the_pod(lower, self::name(lower))
        {
            let why = format!(
                "it stands on {}, which the pod has itself",
                self::name(lower)
            );
            return Err(refused(&why));
        }
        interfaces.push(Found {
            index: link.header.index,
            kind: kind::kind(link),
            name: name.to_owned(),
            mac: mac(link).ok_or_else(|| refused("it has no hardware address"))?,
            mtu: mtu(link).ok_or_else(|| refused("its MTU is below 68 or above 65521"))?,
            addresses: Vec::new(),
        });
    }
    bounded("interfaces".into(), interfaces.len(), MAX_INTERFACES)?;
    interfaces.sort_by_key(|found| found.index);
    Ok(interfaces)
}

fn name(link: &LinkMessage) -> &str {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
        .unwrap_or_default()
}

fn mac(link: &LinkMessage) -> Option<[u8; 6]> {
    let mac: [u8; 6] = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
            _ => None,
        })?;
    (mac != [0; 6]).then_some(mac)
}

fn mtu(link: &LinkMessage) -> Option<u16> {
    let mtu = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => u16::try_from(*mtu).ok(),
            _ => None,
        })?;
    (MIN_MTU..=MAX_MTU).contains(&mtu).then_some(mtu)
}

fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Address> {
    let mut ip = None;
    let mut peer = None;
    let mut flags = AddressFlags::empty();
    let mut made_by_kernel = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => ip = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(AddressProtocol::LinkLocal) => made_by_kernel = true,
            _ => {}
        }
    }
    // An IPv6 address without a peer has no local part.
    let ip = ip.or(peer)?;
    // Kernels before 5.18 don't say who made it.
    if made_by_kernel
        || ip == IpAddr::V6(link_local(mac))
        || flags.contains(AddressFlags::Dadfailed)
    {
        return None;
    }
    if peer.is_some_and(|peer| peer != ip) {
        // Its prefix is the peer's, and so is the route that is among the routes.
        return Some(Address {
            ip,
            prefix: if ip.is_ipv4() { 32 } else { 128 },
            prefix_route: false,
        });
    }
    Some(Address {
        ip,
        prefix: message.header.prefix_len,
        prefix_route: !flags.contains(AddressFlags::Noprefixroute),
    })
}

/// The link-local address that a kernel makes of a hardware address: RFC 4291, appendix A.
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let octets = [
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ];
    octets.into()
}

fn route(message: &RouteMessage, interfaces: &[Found]) -> Option<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut hop = Hop {
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Hop::default()
    };
    let mut destination = None;
    let mut source = None;
    let mut metric = 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::MultiPath(hops) => hop = first(hops)?,
            other => hop.read(other),
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.kind != RouteType::Unicast {
        return None;
    }
    let interface = interfaces
        .iter()
        .find(|found| Some(found.index) == hop.interface)?;
    let destination = destination.or(match header.address_family {
        AddressFamily::Inet => Some([0; 4].into()),
        AddressFamily::Inet6 => Some([0; 16].into()),
        _ => None,
    })?;
    let prefix = header.destination_prefix_length;
    if header.protocol == RouteProtocol::Kernel && made_by_guest(destination, prefix, interface) {
        return None;
    }
    Some(Route {
        destination,
        prefix,
        gateway: hop.gateway,
        interface: interface.name.clone(),
        source,
        metric,
        scope: header.scope.into(),
        onlink: hop.onlink,
    })
}

/// Whether the guest's kernel makes the route itself: that of an address that it is told of, or that of
/// link-local addresses. What the kernel made for the peer of an address is not.
fn made_by_guest(destination: IpAddr, prefix: u8, interface: &Found) -> bool {
    let link_local = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0));
    let told = interface.addresses.iter().any(|address| {
        address.prefix_route
            && address.prefix == prefix
            && network(address.ip, prefix) == destination
    });
    told || (destination == link_local && prefix == 64)
}

fn network(ip: IpAddr, prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & !host).into())
        }
        IpAddr::V6(ip) => {
            let host = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
            IpAddr::V6((u128::from(ip) & !host).into())
        }
    }
}

/// Where a route goes next.
#[derive(Debug, Default)]
struct Hop {
    interface: Option<u32>,
    gateway: Option<IpAddr>,
    onlink: bool,
}

impl Hop {
    fn read(&mut self, attribute: &RouteAttribute) {
        match attribute {
            RouteAttribute::Oif(index) => self.interface = Some(*index),
            RouteAttribute::Gateway(address) => self.gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(ip)) => self.gateway = Some((*ip).into()),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => self.gateway = Some((*ip).into()),
            _ => {}
        }
    }
}

/// Of several ways to one destination the guest is told the first.
fn first(hops: &[RouteNextHop]) -> Option<Hop> {
    let told = hops.first()?;
    if hops.len() > 1 {
        tracing::warn!("a route has several next hops: the pod uses the first");
    }
    let mut hop = Hop {
        interface: Some(told.interface_index),
        gateway: None,
        onlink: told.flags.contains(RouteNextHopFlags::Onlink),
    };
    told.attributes
        .iter()
        .for_each(|attribute| hop.read(attribute));
    Some(hop)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, interfaces: &[Found]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = interfaces
        .iter()
        .find(|found| found.index == message.header.ifindex)?;
    let mut ip = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some((*v6).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        ip: ip?,
        mac: mac?,
        interface: interface.name.clone(),
    })
}

#[cfg(test)]
#[path = "observe_tests.rs"]
mod tests;
