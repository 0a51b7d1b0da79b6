//! What is in a pod's network namespace, as far as the guest is to have it.
//!
//! **Interfaces** that are up. Left out are loopback, which the guest has, our own taps, and members
//! of a bridge or bond, for which that one stands. A tap can stand in for whatever carries
//! Ethernet frames from and to its own hardware address: veth, dummy, macvlan, vlan, bridge,
//! bond, a physical card and others. It can't for
//! - what has no Ethernet address (tun, tunnels of IP);
//! - tun and tap, ipvtap and macvtap: their frames go to another program;
//! - ipvlan, in any mode: several namespaces share its hardware address, and the kernel, not the
//!   frame, says whose it is;
//! - vrf: it routes, and no frames go through it;
//! - an interface on top of another of this namespace (a vlan on eth0): the guest gets the frames
//!   of the lower one already, tagged.
//!
//! **Addresses**, but for what the guest's kernel makes by itself as the host's did: the link-local
//! address made of the hardware address, and temporary ones.
//!
//! **Routes** of the main table to these interfaces, but for those that come with an address or from
//! router advertisements, which reach the guest too. **Neighbours** that are permanent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol,
};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Netlink;
use super::{Doing, Namespace, Result, WiringError, filters, tap};
use crate::agent::network::{Address, Interface, Neighbour, Plan, Route};

/// What the agent takes.
const MAX_INTERFACES: usize = 32;
const MAX_ADDRESSES: usize = 64;
const MAX_ROUTES: usize = 1024;
const MAX_NEIGHBOURS: usize = 1024;
/// What a virtio-net device can say.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// What a namespace holds for the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// In the order of their indexes; at most 32.
    pub interfaces: Vec<ObservedInterface>,
    /// At most 1024.
    pub routes: Vec<Route>,
    /// At most 1024.
    pub neighbours: Vec<Neighbour>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedInterface {
    pub name: String,
    /// In the namespace.
    pub index: u32,
    /// As `ip -d link` says it; "physical" if there is none.
    pub kind: String,
    pub mac: [u8; 6],
    /// 68 to 65535.
    pub mtu: u32,
    /// At most 64.
    pub addresses: Vec<Address>,
}

/// Looks at a namespace; changes nothing.
///
/// # Errors
/// [`WiringError::BadInterface`], [`WiringError::BadRoute`] or [`WiringError::TooMany`] for what a
/// guest can't be given: better no pod than one with half a network.
pub fn observe(namespace: &Namespace) -> Result<Observed> {
    namespace.run(|| {
        let mut netlink = Netlink::open().doing("opening netlink")?;
        let links = netlink.links().doing("listing interfaces")?;
        let mut observed = Observed {
            interfaces: interfaces(&links)?,
            ..Observed::default()
        };
        add_addresses(&mut netlink, &mut observed)?;
        add_routes(&mut netlink, &mut observed)?;
        add_neighbours(&mut netlink, &mut observed)?;
        Ok(observed)
    })
}

/// What the agent is to be told. An interface's device is its place in the list.
pub fn plan(observed: &Observed) -> Plan {
    Plan {
        interfaces: (0..)
            .zip(&observed.interfaces)
            .map(|(device, interface)| Interface {
                device,
                name: interface.name.clone(),
                mac: interface.mac,
                mtu: interface.mtu,
                addresses: interface.addresses.clone(),
            })
            .collect(),
        routes: observed.routes.clone(),
        neighbours: observed.neighbours.clone(),
    }
}

pub(super) fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

fn interfaces(links: &[LinkMessage]) -> Result<Vec<ObservedInterface>> {
    let mut interfaces = Vec::new();
    for link in links {
        interfaces.extend(interface(link, links)?);
    }
    bounded("interfaces", interfaces.len(), MAX_INTERFACES)?;
    interfaces.sort_by_key(|interface| interface.index);
    Ok(interfaces)
}

/// None: it is left out.
fn interface(link: &LinkMessage, all: &[LinkMessage]) -> Result<Option<ObservedInterface>> {
    let flags = link.header.flags;
    let Some(name) = name_of(link) else {
        return Ok(None);
    };
    let (mut kind, mut bytes, mut mtu) = (None, &[][..], 0);
    let (mut lower, mut elsewhere, mut member) = (None, false, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            LinkAttribute::Address(address) => bytes = address,
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::Link(index) => lower = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Controller(_) => member = true,
            _ => {}
        }
    }
    let ours = kind == Some(&InfoKind::Tun) && tap::is_ours(name);
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) || ours || member {
        return Ok(None);
    }

    let below = all
        .iter()
        .find(|other| Some(other.header.index) == lower && !elsewhere)
        // The other end of a veth is beside it, not below.
        .filter(|_| kind != Some(&InfoKind::Veth))
        .and_then(name_of);
    let mac = <[u8; 6]>::try_from(bytes)
        .ok()
        // Bit 0 of the first byte: a group's address (IEEE 802).
        .filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
        .filter(|_| link.header.link_layer_type == LinkLayerType::Ether);
    let kind_name = kind.map_or("physical".into(), InfoKind::to_string);
    let bad = |reason: String| WiringError::BadInterface {
        interface: name.into(),
        kind: kind_name.clone(),
        reason,
    };
    let reason = match kind {
        Some(InfoKind::Tun | InfoKind::IpVtap | InfoKind::MacVtap) => {
            "its frames go to another program"
        }
        Some(InfoKind::IpVlan) => "it shares its hardware address with other interfaces",
        Some(InfoKind::Vrf) => "no frames go through it",
        _ => "",
    };
    if !reason.is_empty() {
        return Err(bad(reason.into()));
    }
    let mac = mac.ok_or_else(|| bad("it has no Ethernet address".into()))?;
    if let Some(below) = below {
        return Err(bad(format!("it is on top of {below}, which is the pod's")));
    }
    if !MTU.contains(&mtu) {
        return Err(bad(format!(
            "its MTU of {mtu} is not in {} to {}",
            MTU.start(),
            MTU.end()
        )));
    }
    Ok(Some(ObservedInterface {
        name: name.into(),
        index: link.header.index,
        kind: kind_name,
        mac,
        mtu,
        addresses: Vec::new(),
    }))
}

fn add_addresses(netlink: &mut Netlink, observed: &mut Observed) -> Result<()> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let messages = netlink
        .list(request, |answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => Some(message),
            _ => None,
        })
        .doing("listing addresses")?;
    for message in messages {
        let interface = observed
            .interfaces
            .iter_mut()
            .find(|interface| interface.index == message.header.index);
        if let Some(interface) = interface
            && let Some(address) = address(&message, interface.mac)
        {
            interface.addresses.push(address);
        }
    }
    for interface in &observed.interfaces {
        bounded(
            "addresses of an interface",
            interface.addresses.len(),
            MAX_ADDRESSES,
        )?;
    }
    Ok(())
}

/// None: it is left out.
fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Address> {
    let (mut local, mut other, mut made_here) = (None, None, false);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(protocol) => {
                made_here = *protocol == AddressProtocol::LinkLocal;
            }
            _ => {}
        }
    }
    let ip = local.or(other)?;
    // Kernels before 5.18 don't say who made an address.
    made_here |= ip == IpAddr::V6(filters::link_local(mac));
    // In IPv6 this flag means a temporary address, in IPv4 a further one.
    let temporary = ip.is_ipv6() && flags.contains(AddressFlags::Secondary);
    if made_here || temporary || flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    // With a peer, the prefix is the peer's, and so is the route, which is among the routes.
    let prefix = match other {
        Some(peer) if peer != ip => all_bits(ip),
        _ => message.header.prefix_len,
    };
    Some(Address {
        ip,
        prefix,
        prefix_route: !flags.contains(AddressFlags::Noprefixroute),
    })
}

fn add_routes(netlink: &mut Netlink, observed: &mut Observed) -> Result<()> {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let listed = netlink.list(
            RouteNetlinkMessage::GetRoute(request),
            |answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => Some(message),
                _ => None,
            },
        );
        let messages = match listed {
            // A kernel without IPv6 has no routes of it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Vec::new(),
            listed => listed.doing("listing routes")?,
        };
        for message in messages {
            let found = routes(&message, &observed.interfaces)?;
            observed.routes.extend(found);
        }
    }
    bounded("routes", observed.routes.len(), MAX_ROUTES)
}

/// The ways of a route; none if it is left out.
fn routes(message: &RouteMessage, interfaces: &[ObservedInterface]) -> Result<Vec<Route>> {
    let header = &message.header;
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    if header.kind != RouteType::Unicast
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.protocol == RouteProtocol::Ra
        || header.flags.contains(RouteFlags::Cloned)
    {
        return Ok(Vec::new());
    }
    let mut route = Route {
        destination: any,
        prefix: header.destination_prefix_length,
        gateway: None,
        interface: String::new(),
        source: None,
        metric: 0,
        scope: header.scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
    };
    let (mut index, mut other_family, mut hops) = (0, false, &[][..]);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => route.destination = ip_of(ip).unwrap_or(any),
            RouteAttribute::Gateway(ip) => route.gateway = ip_of(ip),
            RouteAttribute::Via(_) => other_family = true,
            RouteAttribute::PrefSource(ip) => route.source = ip_of(ip),
            RouteAttribute::Oif(oif) => index = *oif,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::MultiPath(several) => hops = several,
            _ => {}
        }
    }
    let bad = |reason| WiringError::BadRoute {
        route: format!("{}/{}", route.destination, route.prefix),
        reason,
    };
    let interface_of = |index: u32| interfaces.iter().find(|interface| interface.index == index);

    if !hops.is_empty() {
        if any.is_ipv4()
            && hops
                .iter()
                .any(|hop| interface_of(hop.interface_index).is_some())
        {
            return Err(bad("it has several gateways"));
        }
        return Ok(hops
            .iter()
            .filter_map(|hop| {
                let interface = interface_of(hop.interface_index)?;
                Some(way(&route, hop, interface))
            })
            .collect());
    }
    let Some(interface) = interface_of(index) else {
        return Ok(Vec::new());
    };
    if other_family {
        return Err(bad("its gateway is of another address family"));
    }
    if header.protocol == RouteProtocol::Kernel && comes_by_itself(&route, interface) {
        return Ok(Vec::new());
    }
    route.interface.clone_from(&interface.name);
    Ok(vec![route])
}

/// One of several ways of an IPv6 route.
fn way(route: &Route, hop: &RouteNextHop, interface: &ObservedInterface) -> Route {
    Route {
        gateway: hop.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(ip) => ip_of(ip),
            _ => None,
        }),
        interface: interface.name.clone(),
        onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
        ..route.clone()
    }
}

/// Whether a route of the kernel's is there because of an address, as it will be in the guest.
fn comes_by_itself(route: &Route, interface: &ObservedInterface) -> bool {
    let link_local = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0));
    let of_an_address = |address: &Address| {
        address.prefix_route
            && address.prefix == route.prefix
            && first_of(address.ip, address.prefix) == route.destination
    };
    (route.destination, route.prefix) == (link_local, 64)
        || interface.addresses.iter().any(of_an_address)
}

fn add_neighbours(netlink: &mut Netlink, observed: &mut Observed) -> Result<()> {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let messages = netlink
        .list(request, |answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) => Some(message),
            _ => None,
        })
        .doing("listing neighbours")?;
    observed.neighbours = messages
        .iter()
        .filter_map(|message| neighbour(message, &observed.interfaces))
        .collect();
    bounded("neighbours", observed.neighbours.len(), MAX_NEIGHBOURS)
}

/// None: it is left out.
fn neighbour(message: &NeighbourMessage, interfaces: &[ObservedInterface]) -> Option<Neighbour> {
    let header = &message.header;
    if header.state != NeighbourState::Permanent || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let interface = interfaces
        .iter()
        .find(|interface| interface.index == header.ifindex)?;
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some((*v6).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour {
        ip: ip?,
        mac: mac?,
        interface: interface.name.clone(),
    })
}

fn bounded(what: &'static str, count: usize, limit: usize) -> Result<()> {
    if count > limit {
        return Err(WiringError::TooMany { what, limit });
    }
    Ok(())
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn all_bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// The first address of a prefix.
fn first_of(ip: IpAddr, prefix: u8) -> IpAddr {
    let rest = u32::from(all_bits(ip).saturating_sub(prefix));
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(rest).unwrap_or(0);
            Ipv4Addr::from_bits(ip.to_bits() & mask).into()
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(rest).unwrap_or(0);
            Ipv6Addr::from_bits(ip.to_bits() & mask).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn link(name: &str, kind: Option<InfoKind>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = 5;
        link.header.flags = LinkFlags::Up;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Address(MAC.into()),
            LinkAttribute::Mtu(1500),
        ];
        let info = kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
        link.attributes.extend(info);
        link
    }

    fn refusal(link: LinkMessage) -> String {
        interfaces(&[link]).unwrap_err().to_string()
    }

    #[test]
    fn a_tap_stands_in_for_what_carries_ethernet_frames() {
        for (kind, name) in [
            (None, "physical"),
            (Some(InfoKind::Veth), "veth"),
            (Some(InfoKind::Dummy), "dummy"),
            (Some(InfoKind::MacVlan), "macvlan"),
            (Some(InfoKind::Vlan), "vlan"),
        ] {
            let found = interfaces(&[link("eth0", kind)]).unwrap();
            assert_eq!(found[0].kind, name);
            assert_eq!((found[0].mac, found[0].mtu), (MAC, 1500));
        }
    }

    #[test]
    fn a_tap_stands_in_for_nothing_else() {
        for (kind, reason) in [
            (InfoKind::Tun, "its frames go to another program"),
            (InfoKind::MacVtap, "its frames go to another program"),
            (InfoKind::IpVlan, "it shares its hardware address"),
            (InfoKind::Vrf, "no frames go through it"),
        ] {
            let text = refusal(link("net1", Some(kind.clone())));
            assert!(
                text.starts_with(&format!("interface net1 of kind {kind} "))
                    && text.contains(reason),
                "{text}"
            );
        }
        let mut tunnel = link("wg0", Some(InfoKind::Wireguard));
        tunnel.header.link_layer_type = LinkLayerType::None;
        tunnel.attributes[1] = LinkAttribute::Address(Vec::new());
        assert!(refusal(tunnel).contains("it has no Ethernet address"));
        let mut short = link("eth0", None);
        short.attributes[2] = LinkAttribute::Mtu(67);
        assert!(refusal(short).contains("its MTU of 67"));
    }

    #[test]
    fn what_is_not_the_guests_is_left_out() {
        let mut loopback = link("lo", None);
        loopback.header.flags |= LinkFlags::Loopback;
        let mut down = link("gretap0", Some(InfoKind::GreTap));
        down.header.flags = LinkFlags::empty();
        let mut member = link("eth1", None);
        member.attributes.push(LinkAttribute::Controller(9));
        let ours = link("hull0", Some(InfoKind::Tun));

        let found = interfaces(&[loopback, down, member, ours]).unwrap();

        assert_eq!(found, []);
    }

    #[test]
    fn an_interface_on_top_of_another_of_the_pod_is_refused() {
        let mut upper = link("eth0.7", Some(InfoKind::Vlan));
        upper.header.index = 6;
        upper.attributes.push(LinkAttribute::Link(5));
        let lower = link("eth0", Some(InfoKind::Veth));

        let refused = interfaces(&[lower.clone(), upper.clone()]).unwrap_err();

        assert!(refused.to_string().contains("on top of eth0"), "{refused}");
        // The same number in another namespace is another interface.
        upper.attributes.push(LinkAttribute::LinkNetNsId(0));
        assert_eq!(interfaces(&[lower, upper]).unwrap().len(), 2);
    }

    #[test]
    fn addresses_that_the_kernel_makes_are_left_out() {
        let address_of = |ip: IpAddr, attributes: &[AddressAttribute]| {
            let mut message = AddressMessage::default();
            message.header.prefix_len = 64;
            message.attributes = [&[AddressAttribute::Address(ip)], attributes].concat();
            address(&message, MAC)
        };
        let own: IpAddr = "fe80::ff:fe00:2".parse().unwrap();
        let other: IpAddr = "fe80::1:2".parse().unwrap();
        let by_kernel = AddressAttribute::Protocol(AddressProtocol::LinkLocal);
        let temporary = AddressAttribute::Flags(AddressFlags::Secondary);

        assert_eq!(address_of(own, &[]), None);
        assert_eq!(address_of(other, &[by_kernel]), None);
        assert_eq!(address_of([0xfd; 16].into(), &[temporary]), None);
        assert_eq!(address_of(other, &[]).unwrap().ip, other);
    }

    #[test]
    fn the_first_address_of_a_prefix_has_no_further_bits() {
        let v6: IpAddr = "fd00::1:2".parse().unwrap();
        assert_eq!(
            first_of([10, 1, 2, 3].into(), 16),
            IpAddr::from([10, 1, 0, 0])
        );
        assert_eq!(first_of([10, 1, 2, 3].into(), 0), IpAddr::from([0; 4]));
        assert_eq!(first_of(v6, 128), v6);
        assert_eq!(first_of(v6, 64), "fd00::".parse::<IpAddr>().unwrap());
    }
}
