//! Tests: plans applied to real interfaces, in network namespaces of the test's own. They need root.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use hull_protocol::agent::{self, ConfigureNetworkRequest};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourAttribute;
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{LinkVeth, MulticastGroup};
use rustix::thread::UnshareFlags;

use super::*;

const ROUTER: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const OTHER_ROUTER: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

/// A namespace with `devices` interfaces (veths stand in for virtio-net), and an empty one, in
/// which the calling thread is.
struct World {
    home: Netlink,
    pod: Netlink,
    events: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
}

/// Runs a test on a thread of its own, in its namespaces.
fn in_namespaces<F: Future<Output = ()>>(devices: usize, test: impl FnOnce(World) -> F + Send) {
    std::thread::scope(|scope| {
        let work = || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(async { test(World::new(devices).await).await });
        };
        scope.spawn(work).join().unwrap();
    });
}

fn enter_new_namespace() {
    // SAFETY: no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .expect("these tests need root, to make network namespaces");
}

/// The position that a test gave an interface.
fn device_of(message: &LinkMessage) -> Option<usize> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfAlias(alias) => alias.parse().ok(),
            _ => None,
        })
}

impl World {
    async fn new(devices: usize) -> Self {
        enter_new_namespace();
        let home = Netlink::open().unwrap();
        for device in 0..devices {
            let (name, peer) = (format!("eth{device}"), format!("peer{device}"));
            let message = LinkVeth::new(&name, &peer).build();
            home.change(
                RouteNetlinkMessage::NewLink(message),
                NLM_F_CREATE | NLM_F_EXCL,
            )
            .await
            .unwrap();
            let mut position = LinkMessage::default();
            position.attributes = vec![
                LinkAttribute::IfName(name),
                LinkAttribute::IfAlias(device.to_string()),
            ];
            let mut peer_up = LinkMessage::default();
            peer_up.attributes = vec![LinkAttribute::IfName(peer)];
            peer_up.header.flags = LinkFlags::Up;
            peer_up.header.change_mask = LinkFlags::Up;
            for message in [position, peer_up] {
                let message = RouteNetlinkMessage::SetLink(message);
                home.change(message, 0).await.unwrap();
            }
        }
        enter_new_namespace();
        let (connection, _, events) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Neigh,
        ])
        .unwrap();
        tokio::spawn(connection);
        Self {
            home,
            pod: Netlink::open().unwrap(),
            events,
        }
    }

    async fn apply(&self, request: &ConfigureNetworkRequest) -> Result<()> {
        apply(
            Plan::new(request).unwrap(),
            &BTreeMap::new(),
            &device_of,
            &self.home,
        )
        .await
    }

    /// How many changes with our origin there have been since the last call.
    async fn changes(&mut self) -> usize {
        let mut changes = 0;
        let quiet = Duration::from_millis(100);
        while let Ok(Some((event, _))) = tokio::time::timeout(quiet, self.events.next()).await {
            changes += usize::from(is_ours(&event));
        }
        changes
    }

    /// Everything that can be planned, as it is.
    async fn state(&self) -> BTreeSet<String> {
        let mut state = BTreeSet::new();
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let links = self.pod.list(message, |answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(describe(&message)),
            _ => None,
        });
        state.extend(links.await.unwrap());
        state.extend(addresses::describe(&self.pod).await);
        state.extend(routes::describe(&self.pod).await);
        state.extend(neighbours::describe(&self.pod).await);
        state
    }

    async fn has(&self, text: &str) -> bool {
        self.state().await.iter().any(|line| line.contains(text))
    }

    async fn assert_has(&self, texts: &[&str]) {
        let state = self.state().await;
        for text in texts {
            assert!(
                state.iter().any(|line| line.contains(text)),
                "no {text} in {state:#?}"
            );
        }
    }
}

fn is_ours(event: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    use RouteNetlinkMessage as Message;
    let NetlinkPayload::InnerMessage(message) = &event.payload else {
        return false;
    };
    match message {
        Message::NewAddress(message) | Message::DelAddress(message) => message
            .attributes
            .contains(&AddressAttribute::Protocol(AddressProtocol::Other(ORIGIN))),
        Message::NewRoute(message) | Message::DelRoute(message) => {
            message.header.protocol == RouteProtocol::Other(ORIGIN)
        }
        Message::NewNeighbour(message) | Message::DelNeighbour(message) => message
            .attributes
            .contains(&NeighbourAttribute::Protocol(RouteProtocol::Other(ORIGIN))),
        _ => false,
    }
}

fn describe(message: &LinkMessage) -> String {
    let (mut named, mut shape) = (String::new(), BTreeSet::new());
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => named.clone_from(name),
            LinkAttribute::IfAlias(device) => drop(shape.insert(format!(" device {device}"))),
            LinkAttribute::Address(mac) => drop(shape.insert(format!(" mac {mac:02x?}"))),
            LinkAttribute::Mtu(mtu) => drop(shape.insert(format!(" mtu {mtu}"))),
            _ => {}
        }
    }
    let up = message.header.flags.contains(LinkFlags::Up);
    let shape: String = shape.into_iter().collect();
    format!("link {} {named}{shape}", if up { "up" } else { "down" })
}

fn interface(device: u32, name: &str, addresses: Vec<agent::Address>) -> agent::Interface {
    agent::Interface {
        device,
        name: name.into(),
        mac: vec![2, 0, 0, 0, 1, u8::try_from(device).unwrap()],
        mtu: 1400,
        addresses,
        ..Default::default()
    }
}

fn address(ip: &str, prefix: u32) -> agent::Address {
    agent::Address {
        ip: bytes(ip),
        prefix,
        ..Default::default()
    }
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

fn route(interface: &str, destination: &str, prefix: u32, gateway: &[u8]) -> agent::Route {
    agent::Route {
        destination: bytes(destination),
        prefix,
        gateway: gateway.into(),
        interface: interface.into(),
        ..Default::default()
    }
}

fn neighbour(ip: &str) -> agent::Neighbour {
    agent::Neighbour {
        ip: bytes(ip),
        mac: vec![2, 0, 0, 0, 0, 9],
        interface: "eth0".into(),
        ..Default::default()
    }
}

/// A pod as most are: one interface, both families, a default route each.
fn usual() -> ConfigureNetworkRequest {
    ConfigureNetworkRequest {
        interfaces: vec![interface(
            0,
            "eth0",
            vec![address("10.0.0.2", 24), address("fd00::2", 64)],
        )],
        routes: vec![
            route("eth0", "0.0.0.0", 0, &[10, 0, 0, 1]),
            route("eth0", "::", 0, &ROUTER),
        ],
        neighbours: vec![neighbour("10.0.0.1"), neighbour("fe80::1")],
        ..Default::default()
    }
}

#[test]
fn a_plan_is_applied_once() {
    in_namespaces(1, async |mut world| {
        let request = usual();

        world.apply(&request).await.unwrap();
        world
            .assert_has(&[
                "link up eth0 device 0 mac [02, 00, 00, 00, 01, 00] mtu 1400",
                "address 10.0.0.2/24",
                "address fd00::2/64",
                "route 0.0.0.0/0 via 10.0.0.1",
                "route ::/0 via fe80::1",
                "neighbour 10.0.0.1",
                "neighbour fe80::1",
            ])
            .await;
        assert!(world.changes().await >= 6);
        let before = world.state().await;
        world.apply(&request).await.unwrap();

        assert_eq!(world.changes().await, 0);
        assert_eq!(world.state().await, before);
    });
}

#[test]
fn what_is_no_longer_planned_goes_and_what_others_made_stays() {
    in_namespaces(1, async |mut world| {
        world.apply(&usual()).await.unwrap();
        let index = index_of(&world, "eth0").await;
        let mut theirs = AddressMessage::default();
        theirs.header.family = AddressFamily::Inet;
        theirs.header.prefix_len = 32;
        theirs.header.index = index;
        theirs.attributes = vec![AddressAttribute::Local(IpAddr::from([10, 7, 7, 7]))];
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        let message = RouteNetlinkMessage::NewAddress(theirs);
        world.pod.change(message, flags).await.unwrap();

        // The old address is the network's first, and the kernel takes the second away with it.
        let mut request = usual();
        request.interfaces[0].addresses = vec![address("10.0.0.3", 24)];
        request.routes = vec![route("eth0", "0.0.0.0", 0, &[10, 0, 0, 4])];
        request.neighbours.truncate(1);
        world.apply(&request).await.unwrap();

        world
            .assert_has(&[
                "address 10.0.0.3/24",
                "address 10.7.7.7/32",
                "route 0.0.0.0/0 via 10.0.0.4",
                "neighbour 10.0.0.1",
            ])
            .await;
        for gone in [
            "10.0.0.2",
            "fd00::2/64",
            "via 10.0.0.1",
            "route ::/0",
            "neighbour fe80::1",
        ] {
            assert!(!world.has(gone).await, "{gone}: {:#?}", world.state().await);
        }
        world.changes().await;
        world.apply(&request).await.unwrap();
        assert_eq!(world.changes().await, 0);
    });
}

async fn index_of(world: &World, name: &str) -> u32 {
    let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let found = world.pod.list(message, |answer| match answer {
        RouteNetlinkMessage::NewLink(message) => message
            .attributes
            .contains(&LinkAttribute::IfName(name.into()))
            .then_some(message.header.index),
        _ => None,
    });
    found.await.unwrap()[0]
}

#[test]
fn interfaces_are_the_devices_named_and_names_can_be_exchanged() {
    in_namespaces(3, async |world| {
        let mut request = ConfigureNetworkRequest {
            interfaces: vec![
                interface(2, "eth0", vec![address("10.0.0.2", 24)]),
                interface(0, "net1", vec![address("10.1.0.2", 24)]),
            ],
            ..Default::default()
        };
        world.apply(&request).await.unwrap();
        let texts = [
            "eth0 device 2 mac [02, 00, 00, 00, 01, 02]",
            "net1 device 0",
        ];
        world.assert_has(&texts).await;
        assert!(!world.has("device 1").await);

        request.interfaces[0].name = "net1".into();
        request.interfaces[1].name = "eth0".into();
        world.apply(&request).await.unwrap();

        let texts = ["link up net1 device 2", "link up eth0 device 0"];
        world.assert_has(&texts).await;
        world
            .assert_has(&["address 10.0.0.2/24", "address 10.1.0.2/24"])
            .await;
    });
}

/// The network of a plugin that leads everything over a gateway beyond the pod's own /32.
#[test]
fn a_gateway_need_not_be_in_the_pods_network() {
    in_namespaces(1, async |mut world| {
        let mut onlink = route("eth0", "10.9.0.0", 16, &[169, 254, 1, 2]);
        onlink.onlink = true;
        let mut to_gateway = route("eth0", "169.254.1.1", 32, &[]);
        to_gateway.scope = 253;
        // Instead of the one that the kernel would make.
        let network = route("eth0", "10.0.0.0", 24, &[169, 254, 1, 1]);
        let mut own = address("10.0.0.2", 24);
        own.no_prefix_route = true;
        let mut default = route("eth0", "0.0.0.0", 0, &[169, 254, 1, 1]);
        default.source = vec![10, 0, 0, 2];
        default.metric = 100;
        let request = ConfigureNetworkRequest {
            interfaces: vec![interface(0, "eth0", vec![own])],
            routes: vec![default, network, onlink, to_gateway],
            ..Default::default()
        };

        world.apply(&request).await.unwrap();

        world
            .assert_has(&[
                "route 0.0.0.0/0 via 169.254.1.1 from 10.0.0.2 metric 100",
                "route 10.0.0.0/24 via 169.254.1.1",
                "route 10.9.0.0/16 via 169.254.1.2",
                "route 169.254.1.1/32 metric 0 scope 253",
            ])
            .await;
        assert!(!world.has("route 10.0.0.0/24 from").await);
        world.changes().await;
        world.apply(&request).await.unwrap();
        assert_eq!(world.changes().await, 0);
    });
}

#[test]
fn the_kernels_route_for_a_network_is_replaced_by_a_planned_one() {
    in_namespaces(1, async |world| {
        let mut request = usual();
        request.routes = vec![
            route("eth0", "10.0.0.1", 32, &[]),
            route("eth0", "10.0.0.0", 24, &[10, 0, 0, 1]),
        ];

        world.apply(&request).await.unwrap();

        let state = world.state().await;
        let network: Vec<_> = state
            .iter()
            .filter(|line| line.contains("route 10.0.0.0/24"))
            .collect();
        assert_eq!(network.len(), 1, "{state:#?}");
        assert!(network[0].contains("via 10.0.0.1"), "{state:#?}");
    });
}

#[test]
fn an_ipv6_route_may_have_several_gateways() {
    in_namespaces(1, async |mut world| {
        let mut request = usual();
        request.routes.push(route("eth0", "::", 0, &OTHER_ROUTER));
        world.apply(&request).await.unwrap();
        world
            .assert_has(&["route ::/0 via fe80::1", "route ::/0 via fe80::2"])
            .await;
        world.changes().await;
        world.apply(&request).await.unwrap();
        assert_eq!(world.changes().await, 0);

        request.routes.remove(1);
        world.apply(&request).await.unwrap();

        world.assert_has(&["route ::/0 via fe80::2"]).await;
        assert!(!world.has("route ::/0 via fe80::1").await);
    });
}

#[test]
fn sysctls_of_an_interface_are_set_and_may_turn_ipv6_off() {
    in_namespaces(1, async |world| {
        let sysctls = BTreeMap::from([
            ("net.ipv4.conf.eth0.forwarding".into(), "1".into()),
            ("net.ipv6.conf.eth0.disable_ipv6".into(), "1".into()),
        ]);

        let plan = Plan::new(&usual()).unwrap();
        apply(plan, &sysctls, &device_of, &world.home)
            .await
            .unwrap();

        let forwarding = fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/forwarding");
        assert_eq!(forwarding.unwrap(), "1\n");
        world
            .assert_has(&["address 10.0.0.2/24", "route 0.0.0.0/0"])
            .await;
        assert!(!world.has("fd00::2").await);

        let sysctls = BTreeMap::from([("net.ipv4.conf.eth7.forwarding".into(), "1".into())]);
        let plan = Plan::new(&usual()).unwrap();
        let error = apply(plan, &sysctls, &device_of, &world.home)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("of interface eth7"), "{error}");
    });
}

#[test]
fn routers_of_the_network_give_no_addresses_but_where_asked_for() {
    in_namespaces(2, async |world| {
        let read = |interface: &str, setting: &str| {
            let path = format!("/proc/sys/net/ipv6/conf/{interface}/{setting}");
            fs::read_to_string(path).unwrap().trim().to_owned()
        };
        let mut request = usual();
        request.interfaces.push(interface(1, "net1", vec![]));
        let sysctls = BTreeMap::from([("net.ipv6.conf.net1.accept_ra".into(), "2".into())]);

        let plan = Plan::new(&request).unwrap();
        apply(plan, &sysctls, &device_of, &world.home)
            .await
            .unwrap();

        assert_eq!(
            (read("eth0", "accept_ra"), read("eth0", "autoconf")),
            ("0".into(), "0".into())
        );
        assert_eq!(
            (read("net1", "accept_ra"), read("net1", "autoconf")),
            ("2".into(), "0".into())
        );
    });
}

#[test]
fn errors_say_what_was_being_done_to_what() {
    in_namespaces(1, async |world| {
        let mut request = usual();
        request.interfaces[0].device = 4;
        let error = world.apply(&request).await.unwrap_err().to_string();
        assert!(error.contains("4 for interface eth0"), "{error}");

        let mut request = usual();
        request.routes = vec![route("eth0", "10.5.0.0", 16, &[192, 168, 0, 1])];
        let error = world.apply(&request).await.unwrap_err().to_string();
        let expected = "adding route 10.5.0.0/16 via 192.168.0.1 to interface eth0";
        assert!(error.contains(expected), "{error}");

        let mut message = LinkVeth::new("taken", "peer").build();
        message.header.flags = LinkFlags::empty();
        let message = RouteNetlinkMessage::NewLink(message);
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        world.pod.change(message, flags).await.unwrap();
        let mut request = usual();
        request.interfaces[0].name = "taken".into();
        request.routes.clear();
        request.neighbours.clear();
        let error = world.apply(&request).await.unwrap_err().to_string();
        assert!(
            error.contains("to taken") && error.contains("exists"),
            "{error}"
        );
        // And a right plan after a wrong one finds the interface wherever that left it.
        world.apply(&usual()).await.unwrap();
        world.assert_has(&["link up eth0 device 0"]).await;
    });
}
