//! Tests in network namespaces of their own: a pod's, and a node's, with a veth between them. They
//! need root. Those with taps also need kernel modules that not every machine has, and run in the
//! lab: `scripts/with-kvm -- TEST-BINARY --include-ignored network::`, with the binary that
//! `cargo test -p hull-pod --no-run` names.

mod world;

use std::net::IpAddr;
use std::time::Duration;

use super::*;
use crate::agent::network::{Address, Neighbour, Plan, Route};
use world::*;

#[test]
fn interfaces_addresses_routes_and_neighbours_are_seen() {
    let world = World::new();
    let pod = &world.pod;
    ip(pod, "address add 10.0.0.3/24 dev eth0");
    ip(pod, "address add 192.168.7.1/16 dev eth0 noprefixroute");
    ip(pod, "address add 172.16.0.1 peer 172.16.0.9/32 dev eth0");
    ip(pod, "route add default via 10.0.0.1 metric 7");
    ip(
        pod,
        "route add 10.9.0.0/16 via 10.8.0.1 dev eth0 onlink src 10.0.0.3",
    );
    ip(pod, "route add default via fe80::1 dev eth0");
    ip(pod, "route add blackhole 10.66.0.0/16");
    ip(
        pod,
        "neighbour add 10.0.0.1 lladdr 02:00:00:00:00:01 dev eth0",
    );
    ip(pod, "link add idle0 type veth peer name idle1");

    let observed = observe(pod).unwrap();

    let address = |ip: [u8; 4], prefix, prefix_route| Address {
        ip: ip.into(),
        prefix,
        prefix_route,
    };
    let [eth0] = observed.interfaces.as_slice() else {
        panic!("{observed:?}")
    };
    assert_eq!((eth0.name.as_str(), eth0.kind.as_str()), ("eth0", "veth"));
    assert_eq!((eth0.mac, eth0.mtu), (MAC, 1400));
    let mut addresses = eth0.addresses.clone();
    addresses.sort_by_key(|address| address.ip);
    assert_eq!(
        addresses,
        [
            address([10, 0, 0, 2], 24, true),
            address([10, 0, 0, 3], 24, true),
            address([172, 16, 0, 1], 32, true),
            address([192, 168, 7, 1], 16, false),
            Address {
                ip: IPV6.into(),
                prefix: 64,
                prefix_route: true
            },
        ]
    );
    let mut routes = observed.routes.clone();
    routes.sort_by_key(|route| (route.destination, route.prefix));
    let route = |destination: IpAddr, prefix| Route {
        destination,
        prefix,
        gateway: None,
        interface: "eth0".into(),
        source: None,
        metric: 0,
        scope: 0,
        onlink: false,
    };
    assert_eq!(
        routes,
        [
            Route {
                gateway: Some(NODE_IP.into()),
                metric: 7,
                ..route([0; 4].into(), 0)
            },
            Route {
                gateway: Some([10, 8, 0, 1].into()),
                source: Some([10, 0, 0, 3].into()),
                onlink: true,
                ..route([10, 9, 0, 0].into(), 16)
            },
            Route {
                source: Some([172, 16, 0, 1].into()),
                scope: 253,
                ..route([172, 16, 0, 9].into(), 32)
            },
            Route {
                gateway: Some("fe80::1".parse().unwrap()),
                metric: 1024,
                ..route([0; 16].into(), 0)
            },
        ]
    );
    assert_eq!(
        observed.neighbours,
        [Neighbour {
            ip: NODE_IP.into(),
            mac: NODE_MAC,
            interface: "eth0".into()
        }]
    );
}

#[test]
fn several_interfaces_are_planned_in_order() {
    let world = World::new();
    ip(&world.pod, "link add net1 type veth peer name idle1");
    ip(&world.pod, "link set net1 up");

    let plan = plan(&observe(&world.pod).unwrap());

    let named: Vec<(u32, &str)> = plan
        .interfaces
        .iter()
        .map(|interface| (interface.device, interface.name.as_str()))
        .collect();
    assert_eq!(named, [(0, "eth0"), (1, "net1")]);
    assert_eq!(plan.interfaces[0].mac, MAC);
    assert_eq!(plan.interfaces[0].addresses.len(), 2);
}

#[test]
fn an_empty_namespace_makes_an_empty_plan() {
    let namespace = Namespace::create().unwrap();
    let observed = observe(&namespace).unwrap();
    assert_eq!(plan(&observed), Plan::default());
}

#[test]
fn ipv4_routes_of_several_gateways_are_refused() {
    let world = World::new();
    ip(
        &world.pod,
        "route add 10.9.0.0/16 nexthop via 10.0.0.1 nexthop via 10.0.0.9",
    );

    let refused = observe(&world.pod).unwrap_err();

    assert!(
        matches!(&refused, WiringError::BadRoute { route, .. } if route == "10.9.0.0/16"),
        "{refused}"
    );
}

#[test]
#[ignore = "needs tun and tc"]
fn a_tap_stands_beside_its_interface_and_is_no_part_of_the_plan() {
    let world = World::new();
    let before = observe(&world.pod).unwrap();

    let _plug = world.plug().unwrap();

    let tap = ip(&world.pod, "link show hull0");
    assert!(tap.contains("mtu 1400") && tap.contains("UP"), "{tap}");
    let addresses = ip(&world.pod, "address show hull0");
    assert!(!addresses.contains("inet"), "{addresses}");
    assert_eq!(observe(&world.pod).unwrap(), before);
}

#[test]
#[ignore = "needs tun and tc"]
fn frames_pass_both_ways() {
    let world = World::new();
    let mut wire = world.wire();
    let mut tap = Port::tap(&mut world.plug().unwrap());

    for there in [ipv4(OTHER_MAC, [8, 8, 8, 8]), frame(OTHER_MAC, 0x88b5, &[])] {
        wire.send(&there);
        assert_eq!(tap.next(), there);
    }
    for back in [
        ipv4(MAC, IP),
        arp(MAC, MAC, IP),
        ipv6(MAC, "fd00::2"),
        ipv6(MAC, "fe80::ff:fe00:2"),
        // Questions of neighbours, answers about itself, whether its address is free, a report.
        discovery("fd00::2", 135, "fd00::1"),
        discovery("fd00::2", 136, "fd00::2"),
        discovery("fe80::ff:fe00:2", 136, "fd00::2"),
        discovery("fe80::ff:fe00:2", 133, "::"),
        discovery("::", 135, "fe80::ff:fe00:2"),
        ipv6_with(MAC, "::", [0, 1], &[58, 0, 5, 2, 0, 0, 1, 0, 143]),
        // A name looked for by multicast, which has this hop limit too.
        ipv6_with(MAC, "fe80::ff:fe00:2", [17, 255], &[]),
    ] {
        tap.send(&back);
        assert_eq!(wire.next(), back);
    }
}

#[test]
#[ignore = "needs tun and tc"]
fn every_queue_of_a_tap_sends_and_one_of_them_receives() {
    let world = World::new();
    let mut wire = world.wire();
    let tap = world
        .plug_queues(3, VhostNet::Off)
        .unwrap()
        .taps
        .pop()
        .unwrap();
    let mut queues: Vec<_> = tap.queues.into_iter().map(Port::queue).collect();

    assert_eq!(queues.len(), 3);
    for queue in &mut queues {
        queue.send(&ipv4(MAC, IP));
        assert_eq!(wire.next(), ipv4(MAC, IP));
        queue.send(&ipv4(MAC, NODE_IP));
    }
    let there = ipv4(OTHER_MAC, [8, 8, 8, 8]);
    wire.send(&there);

    let wait = Duration::from_secs(2);
    let received = queues
        .iter_mut()
        .filter_map(|queue| queue.receive(wait, |frame| frame == there))
        .count();
    assert_eq!(received, 1);
    assert_eq!(
        wire.receive(wait, |frame| frame.ends_with(MARK) && frame != there),
        None
    );
}

#[test]
#[ignore = "needs vhost-net"]
fn the_kernel_serves_each_queue_where_it_is_asked_to() {
    let world = World::new();

    let opened = [VhostNet::Auto, VhostNet::On, VhostNet::Off].map(|vhost| {
        let mut plugged = world.plug_queues(2, vhost).unwrap();
        let tap = plugged.taps.pop().unwrap();
        plugged.teardown(&world.pod).unwrap();
        tap.vhost.len()
    });

    assert_eq!(opened, [2, 2, 0]);
}

#[test]
#[ignore = "needs tun and tc"]
fn nobody_sends_as_someone_else() {
    let world = World::new();
    let mut wire = world.wire();
    let mut tap = Port::tap(&mut world.plug().unwrap());
    let tagged = {
        let mut frame = ipv4(MAC, IP);
        frame.splice(12..12, [0x81, 0, 0, 5]);
        frame
    };
    for spoofed in [
        ipv4(OTHER_MAC, IP),
        ipv4(MAC, NODE_IP),
        ipv4(MAC, [0, 0, 0, 0]),
        ipv4([2, 0, 0, 0, 0, 3], IP),
        ipv4([3, 0, 0, 0, 0, 2], IP),
        arp(OTHER_MAC, MAC, IP),
        arp(MAC, OTHER_MAC, IP),
        arp(MAC, MAC, NODE_IP),
        arp(MAC, MAC, [10, 0, 1, 2]),
        ipv6(OTHER_MAC, "fd00::2"),
        ipv6(MAC, "fd00::1"),
        ipv6(MAC, "fd01::2"),
        ipv6(MAC, "fe80::1"),
        // A router's word, plain and behind a header; answers and doubts about another's address.
        discovery("fe80::ff:fe00:2", 134, "::"),
        discovery("fe80::ff:fe00:2", 137, "fd00::1"),
        ipv6_with(MAC, "fd00::2", [60, 255], &[58, 0, 1, 4, 0, 0, 0, 0, 134]),
        discovery("fd00::2", 136, "fd00::1"),
        discovery("::", 135, "fd00::1"),
        ipv6(MAC, "::"),
        frame(MAC, 0x88b5, &[]),
        frame(MAC, 0x0800, &[]),
        tagged,
    ] {
        tap.send(&spoofed);
    }
    let own = ipv4(MAC, IP);

    tap.send(&own);

    assert_eq!(wire.next(), own);
}

#[test]
#[ignore = "needs tun and tc"]
fn the_namespaces_own_stack_takes_no_part() {
    let world = World::new();
    let mut wire = world.wire();
    let question = {
        let mut frame = arp(NODE_MAC, NODE_MAC, NODE_IP);
        frame[..6].copy_from_slice(&[0xff; 6]);
        frame[38..42].copy_from_slice(&IP.octets());
        frame
    };
    let answer = |frame: &[u8]| frame[12..14] == [8, 6] && frame[6..12] == MAC;
    wire.send(&question);
    assert!(wire.receive(Duration::from_secs(20), answer).is_some());
    let plug = world.plug().unwrap();

    wire.send(&question);
    let answered = wire.receive(Duration::from_secs(1), answer);
    plug.teardown(&world.pod).unwrap();
    wire.send(&question);

    assert_eq!(answered, None);
    assert!(wire.receive(Duration::from_secs(20), answer).is_some());
}

#[test]
#[ignore = "needs tun and tc"]
fn the_guest_does_not_reach_the_namespaces_own_stack() {
    let world = World::new();
    let mut tap = Port::tap(&mut world.plug().unwrap());
    for mut question in [arp(OTHER_MAC, OTHER_MAC, NODE_IP), arp(MAC, MAC, NODE_IP)] {
        question[38..42].copy_from_slice(&IP.octets());
        question[..6].copy_from_slice(&[0xff; 6]);
        tap.send(&question);
    }

    let arp = |frame: &[u8]| frame[12..14] == [8, 6];
    let answered = tap.receive(Duration::from_secs(1), arp);

    assert_eq!(answered, None);
}

#[test]
#[ignore = "needs tun and tc"]
fn an_interface_that_comes_late_is_plugged_then() {
    let world = World::new();
    ip(&world.pod, "link set eth0 down");
    let mut plug = Plug::new(1, 1, VhostNet::Off);
    assert!(observe(&world.pod).unwrap().interfaces.is_empty());
    ip(&world.pod, "link set eth0 up");

    let observed = observe(&world.pod).unwrap();
    let tap = plug.add(&world.pod, &observed.interfaces[0]).unwrap();

    let mut wire = world.wire();
    let mut tap = Port::queue(tap.queues.into_iter().next().unwrap());
    tap.send(&ipv4(MAC, IP));
    assert_eq!(wire.next(), ipv4(MAC, IP));
}

#[test]
#[ignore = "needs tun and tc"]
fn an_address_that_comes_late_can_be_sent_from_then() {
    let world = World::new();
    let mut wire = world.wire();
    let mut plugged = world.plug().unwrap();
    let mut tap = Port::tap(&mut plugged);
    ip(&world.pod, "address del 10.0.0.2/24 dev eth0");
    ip(&world.pod, "address add 10.0.0.9/24 dev eth0");

    let observed = observe(&world.pod).unwrap();
    plugged
        .plug
        .guard_anew(&world.pod, &observed.interfaces[0])
        .unwrap();

    tap.send(&ipv4(MAC, IP));
    tap.send(&ipv4(MAC, [10, 0, 0, 9]));
    assert_eq!(wire.next(), ipv4(MAC, [10, 0, 0, 9]));
}

#[test]
#[ignore = "needs tun and tc"]
fn teardown_leaves_nothing() {
    let world = World::new();
    let before = (
        ip(&world.pod, "-o link"),
        run(&world.pod, "tc", "qdisc show"),
    );
    let plug = world.plug().unwrap();

    plug.teardown(&world.pod).unwrap();

    let after = (
        ip(&world.pod, "-o link"),
        run(&world.pod, "tc", "qdisc show"),
    );
    assert_eq!(after, before);
}

#[test]
#[ignore = "needs tun and tc"]
fn teardown_of_an_interface_that_is_gone_is_no_error() {
    let world = World::new();
    let plug = world.plug().unwrap();
    ip(&world.node, "link delete veth0");

    plug.teardown(&world.pod).unwrap();
}

#[test]
#[ignore = "needs tun and tc"]
fn what_a_dead_supervisor_left_is_replaced() {
    let world = World::new();
    // Its descriptors are closed, and nothing else.
    drop(world.plug().unwrap());
    let mut wire = world.wire();

    let mut tap = Port::tap(&mut world.plug().unwrap());

    let frame = ipv4(OTHER_MAC, [8, 8, 8, 8]);
    wire.send(&frame);
    assert_eq!(tap.next(), frame);
}

#[test]
#[ignore = "needs tun and tc"]
fn what_another_program_set_up_stays() {
    for theirs in ["qdisc add dev eth0 clsact", "qdisc add dev eth0 ingress"] {
        let world = World::new();
        run(&world.pod, "tc", theirs);
        let before = run(&world.pod, "tc", "qdisc show");

        let refused = world.plug().unwrap_err();

        assert!(
            matches!(&refused, WiringError::Taken(name) if name == "eth0"),
            "{theirs}: {refused}"
        );
        assert_eq!(run(&world.pod, "tc", "qdisc show"), before);
        assert!(!ip(&world.pod, "-o link").contains("hull"));
    }
}
