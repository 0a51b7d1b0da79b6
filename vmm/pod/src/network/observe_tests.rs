//! Netlink messages, and what is told of them.

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn eth0(addresses: Vec<Address>) -> Found {
    Found {
        index: 2,
        kind: "veth".into(),
        name: "eth0".into(),
        mac: MAC,
        mtu: 1500,
        addresses,
    }
}

fn told(ip: IpAddr, prefix: u8, prefix_route: bool) -> Address {
    Address {
        ip,
        prefix,
        prefix_route,
    }
}

fn v4(octets: [u8; 4]) -> IpAddr {
    octets.into()
}

fn address_message(prefix: u8, attributes: Vec<AddressAttribute>) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.prefix_len = prefix;
    message.attributes = attributes;
    message
}

fn route_message(protocol: RouteProtocol, attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.header.protocol = protocol;
    message.attributes = attributes;
    message.attributes.push(RouteAttribute::Oif(2));
    message
}

fn connected(destination: [u8; 4], prefix: u8) -> RouteMessage {
    let destination = RouteAttribute::Destination(RouteAddress::Inet(destination.into()));
    let mut message = route_message(RouteProtocol::Kernel, vec![destination]);
    message.header.destination_prefix_length = prefix;
    message
}

#[test]
fn a_plain_address() {
    let ip = v4([10, 0, 0, 2]);
    let message = address_message(
        24,
        vec![AddressAttribute::Address(ip), AddressAttribute::Local(ip)],
    );

    assert_eq!(address(&message, MAC), Some(told(ip, 24, true)));
}

#[test]
fn an_address_with_a_peer_is_alone_in_its_network() {
    let ip = v4([10, 0, 0, 2]);
    let message = address_message(
        24,
        vec![
            AddressAttribute::Address(v4([10, 1, 0, 1])),
            AddressAttribute::Local(ip),
        ],
    );

    assert_eq!(address(&message, MAC), Some(told(ip, 32, false)));
}

#[test]
fn the_link_local_address_of_the_kernel_is_not_told() {
    let made = link_local(MAC);
    let set: Ipv6Addr = "fe80::1".parse().unwrap();
    let message = |ip: Ipv6Addr| address_message(64, vec![AddressAttribute::Address(ip.into())]);

    assert_eq!(made, "fe80::ff:fe00:1".parse::<Ipv6Addr>().unwrap());
    assert_eq!(address(&message(made), MAC), None);
    assert_eq!(
        address(&message(set), MAC),
        Some(told(set.into(), 64, true))
    );
}

#[test]
fn the_route_of_an_address_is_the_guests_to_make() {
    let plain = [eth0(vec![told(v4([10, 0, 0, 2]), 24, true)])];
    let without = [eth0(vec![told(v4([10, 0, 0, 2]), 24, false)])];
    let message = connected([10, 0, 0, 0], 24);

    assert_eq!(route(&message, &plain), None);
    assert!(route(&message, &without).is_some());
}

#[test]
fn the_route_to_a_peer_is_told() {
    let interfaces = [eth0(vec![told(v4([10, 0, 0, 2]), 32, false)])];

    let route = route(&connected([10, 1, 0, 0], 24), &interfaces).unwrap();

    assert_eq!((route.destination, route.prefix), (v4([10, 1, 0, 0]), 24));
    assert_eq!(route.gateway, None);
}

#[test]
fn a_default_route() {
    let gateway = RouteAttribute::Gateway(RouteAddress::Inet([169, 254, 1, 1].into()));
    let mut message = route_message(RouteProtocol::Boot, vec![gateway]);
    message.header.flags = RouteFlags::Onlink;

    let route = route(&message, &[eth0(Vec::new())]).unwrap();

    assert_eq!((route.destination, route.prefix), (v4([0; 4]), 0));
    assert_eq!(route.gateway, Some(v4([169, 254, 1, 1])));
    assert!(route.onlink);
}

#[test]
fn routes_of_other_tables_kinds_and_interfaces_are_not_told() {
    let interfaces = [eth0(Vec::new())];
    let plain = || route_message(RouteProtocol::Static, Vec::new());
    let mut local = plain();
    local.header.kind = RouteType::Local;
    let mut elsewhere = plain();
    elsewhere.attributes.push(RouteAttribute::Table(1000));
    let mut other = plain();
    other.attributes.push(RouteAttribute::Oif(9));

    assert!(route(&plain(), &interfaces).is_some());
    for message in [local, elsewhere, other] {
        assert_eq!(route(&message, &interfaces), None);
    }
}

#[test]
fn of_several_ways_the_first_is_told() {
    let mut first = RouteNextHop::default();
    first.interface_index = 2;
    first.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(
        [10, 0, 0, 1].into(),
    ))];
    let mut second = first.clone();
    second.interface_index = 3;
    let mut message = route_message(RouteProtocol::Static, Vec::new());
    message.attributes = vec![RouteAttribute::MultiPath(vec![first, second])];

    let route = route(&message, &[eth0(Vec::new())]).unwrap();

    assert_eq!(route.gateway, Some(v4([10, 0, 0, 1])));
}

#[test]
fn the_plan_follows_the_machines_devices() {
    let mut eth1 = eth0(Vec::new());
    eth1.index = 5;
    eth1.name = "eth1".into();
    let mut of_eth1 = route(
        &route_message(RouteProtocol::Static, Vec::new()),
        &[eth0(Vec::new())],
    )
    .unwrap();
    of_eth1.interface = "eth1".into();
    let observed = Observed {
        interfaces: vec![eth0(Vec::new()), eth1],
        routes: vec![of_eth1],
        neighbours: Vec::new(),
    };

    let both = observed.plan(&[5, 2]);
    let one = observed.plan(&[2]);

    assert_eq!(both.interfaces[0].name, "eth1");
    assert_eq!((both.interfaces[1].device, both.routes.len()), (1, 1));
    assert_eq!((one.interfaces.len(), one.routes.len()), (1, 0));
}

#[test]
fn what_came_and_what_went() {
    let observed = Observed {
        interfaces: vec![eth0(Vec::new())],
        ..Observed::default()
    };

    let difference = observed.diff(&[7]);

    assert_eq!(difference.added, [&observed.interfaces[0]]);
    assert_eq!(difference.gone, [7]);
}

#[test]
fn only_permanent_neighbours_are_told() {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = 2;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 1].into())),
        NeighbourAttribute::LinkLayerAddress(vec![2, 0, 0, 0, 0, 9]),
    ];
    let mut learned = message.clone();
    learned.header.state = NeighbourState::Reachable;
    let interfaces = [eth0(Vec::new())];

    assert!(neighbour(&message, &interfaces).is_some());
    assert_eq!(neighbour(&learned, &interfaces), None);
}

#[test]
fn an_mtu_is_what_a_tap_can_have() {
    let mut link = LinkMessage::default();

    for (bytes, told) in [
        (67, None),
        (68, Some(68)),
        (65_521, Some(65_521)),
        (65_522, None),
    ] {
        link.attributes = vec![LinkAttribute::Mtu(bytes)];
        assert_eq!(mtu(&link), told);
    }
}
