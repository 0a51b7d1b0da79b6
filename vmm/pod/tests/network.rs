//! A pod's network namespace with everything real but the guest: veth pairs, taps, traffic control.
//!
//! The guest is a third namespace, whose tap's packets are copied to and from that of the pod. Needs
//! root and a kernel with what `scripts/lab` has: `scripts/lab PROGRAM --ignored`, as
//! `scripts/test` does.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

#[path = "network/frames.rs"]
mod frames;
#[path = "network/world.rs"]
mod world;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use hull_pod::network::{Backend, Namespace, NetworkError, Observed, Plug, observe, plug, unplug};

use world::{GUEST_V4, GUEST_V6, Guest, HOST_V4, HOST_V6, World, inside, ip, output};

async fn plug_all(pod: &Namespace, observed: &Observed) -> Vec<Plug> {
    let interfaces: Vec<_> = observed.interfaces.iter().collect();
    plug(pod, &interfaces, 1, Backend::Userspace).await.unwrap()
}

/// Sends a word from one namespace to another and back.
fn exchange(client: &Namespace, server: &Namespace, address: IpAddr) {
    let address = SocketAddr::new(address, 7000);
    let listener = inside(server, || TcpListener::bind(address)).unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut word = vec![0; 100_000];
        stream.read_exact(&mut word).unwrap();
        stream.write_all(&word).unwrap();
    });
    let mut stream = inside(client, || TcpStream::connect(address)).unwrap();
    let sent: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    stream.write_all(&sent).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    echo.join().unwrap();
    assert!(back == sent);
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn what_is_wired_is_observed() {
    let world = World::new().await;
    ip(&world.pod, "link add dummy0 type dummy");
    ip(&world.pod, "link add dummy1 type dummy");
    ip(&world.pod, "link set dummy1 up");
    ip(
        &world.pod,
        "route add 192.0.2.0/24 via 10.0.0.1 metric 7 src 10.0.0.2",
    );
    ip(&world.pod, "route add default dev eth0 table 100");
    ip(&world.pod, "address add 10.7.0.2/24 dev eth0 noprefixroute");
    ip(
        &world.pod,
        "neigh add 10.0.0.7 lladdr 02:00:00:00:00:07 dev eth0",
    );

    let observed = observe(&world.pod).await.unwrap();

    let names: Vec<_> = observed
        .interfaces
        .iter()
        .map(|found| (found.name.as_str(), found.kind.as_str(), found.mtu))
        .collect();
    assert_eq!(names, [("eth0", "veth", 1450), ("dummy1", "dummy", 1500)]);
    let indices: Vec<_> = observed
        .interfaces
        .iter()
        .map(|found| found.index)
        .collect();
    let plan = observed.plan(&indices);
    let addresses: Vec<_> = plan.interfaces[0]
        .addresses
        .iter()
        .map(|address| (address.ip.to_string(), address.prefix, address.prefix_route))
        .collect();
    assert_eq!(
        addresses,
        [
            ("10.0.0.2".to_owned(), 24, true),
            ("10.7.0.2".to_owned(), 24, false),
            ("fd00::2".to_owned(), 64, true),
        ]
    );
    let routes: Vec<_> = plan
        .routes
        .iter()
        .map(|route| (route.destination.to_string(), route.prefix, route.metric))
        .collect();
    assert_eq!(
        routes,
        [
            ("0.0.0.0".to_owned(), 0, 0),
            ("192.0.2.0".to_owned(), 24, 7),
            ("::".to_owned(), 0, 1024),
        ]
    );
    assert_eq!(plan.routes[1].gateway, Some(HOST_V4));
    assert_eq!(plan.routes[1].source, Some(GUEST_V4));
    assert_eq!(plan.neighbours.len(), 1);
    assert_eq!(plan.neighbours[0].mac, [2, 0, 0, 0, 0, 7]);
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn the_guest_talks_and_is_talked_to() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    let plugs = plug_all(&world.pod, &observed).await;
    let guest = Guest::start(&observed.plan(&[plugs[0].index]), &plugs[0]).await;

    for (of_host, of_guest) in [(HOST_V4, GUEST_V4), (HOST_V6, GUEST_V6)] {
        exchange(&world.host, &guest.namespace, of_guest);
        exchange(&guest.namespace, &world.host, of_host);
    }
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn the_namespaces_own_kernel_answers_nobody() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    let plugs = plug_all(&world.pod, &observed).await;
    let _guest = Guest::start(&observed.plan(&[plugs[0].index]), &plugs[0]).await;
    let address = SocketAddr::new(GUEST_V4, 7000);
    let _listener = inside(&world.pod, || TcpListener::bind(address)).unwrap();

    let refused = inside(&world.host, || TcpStream::connect(address)).unwrap_err();

    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn a_guest_is_nobody_else() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    let plugs = plug_all(&world.pod, &observed).await;
    let capture = frames::Capture::open(&world.host);
    let mac = observed.interfaces[0].mac;

    for (_, frame) in frames::spoofed(mac) {
        frames::send(&plugs[0].queues[0], &frame);
    }
    for (_, frame) in frames::own(mac) {
        frames::send(&plugs[0].queues[0], &frame);
    }

    // They arrive in the order in which they were sent.
    let (_, last) = frames::own(mac).pop().unwrap();
    let seen = capture.until(&last);
    for (what, frame) in frames::own(mac) {
        assert!(seen.contains(&frame), "{what} is lost");
    }
    for (what, frame) in frames::spoofed(mac) {
        assert!(!seen.contains(&frame), "{what} got out");
    }
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn unplugged_nothing_is_left() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    let plugs = plug_all(&world.pod, &observed).await;
    let index = plugs[0].index;
    assert!(ip(&world.pod, "link").contains(&format!("hull-{index}")));

    drop(plugs);
    unplug(&world.pod, index).await.unwrap();
    unplug(&world.pod, index).await.unwrap();

    assert!(!ip(&world.pod, "link").contains("hull-"));
    assert!(!tc(&world.pod, "qdisc show dev eth0").contains("ingress"));
    assert_eq!(observe(&world.pod).await.unwrap(), observed);
    exchange(&world.host, &world.pod, GUEST_V4);
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn after_a_killed_supervisor_it_is_plugged_again() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    drop(plug_all(&world.pod, &observed).await);

    let plugs = plug_all(&world.pod, &observed).await;
    let guest = Guest::start(&observed.plan(&[plugs[0].index]), &plugs[0]).await;

    exchange(&world.host, &guest.namespace, GUEST_V4);
    let filters = tc(&world.pod, "filter show dev eth0 ingress");
    assert_eq!(filters.matches("mirred").count(), 1, "{filters}");
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn an_interface_has_one_tap() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    let plugs = plug_all(&world.pod, &observed).await;
    let interfaces: Vec<_> = observed.interfaces.iter().collect();

    let refused = plug(&world.pod, &interfaces, 1, Backend::Userspace).await;

    assert!(matches!(refused, Err(NetworkError::Io { .. })));
    let guest = Guest::start(&observed.plan(&[plugs[0].index]), &plugs[0]).await;
    exchange(&world.host, &guest.namespace, GUEST_V4);
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn all_are_plugged_or_none_is() {
    let world = World::new().await;
    ip(&world.pod, "link add dummy0 index 1000 type dummy");
    ip(&world.pod, "link set dummy0 up");
    let observed = observe(&world.pod).await.unwrap();
    ip(&world.pod, "tuntap add hull-1000 mode tap");
    let interfaces: Vec<_> = observed.interfaces.iter().collect();

    let refused = plug(&world.pod, &interfaces, 1, Backend::Userspace).await;

    assert!(refused.is_err());
    assert!(!tc(&world.pod, "qdisc show dev eth0").contains("ingress"));
    exchange(&world.host, &world.pod, GUEST_V4);
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn filters_of_others_stay() {
    let world = World::new().await;
    tc(&world.pod, "qdisc add dev eth0 clsact");
    tc(
        &world.pod,
        "filter add dev eth0 ingress prio 5 protocol ip u32 match ip src 192.0.2.1 action drop",
    );
    let observed = observe(&world.pod).await.unwrap();
    let plugs = plug_all(&world.pod, &observed).await;

    unplug(&world.pod, plugs[0].index).await.unwrap();

    let left = tc(&world.pod, "filter show dev eth0 ingress");
    assert!(left.contains("pref 5"), "{left}");
    assert!(!left.contains("mirred"), "{left}");
    assert!(tc(&world.pod, "qdisc show dev eth0").contains("clsact"));
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn what_is_wired_later_is_found() {
    let world = World::new().await;
    let before = observe(&world.pod).await.unwrap();
    let mut plugs = plug_all(&world.pod, &before).await;
    world.wire("eth1", "10.1.0.2/24", "10.1.0.1/24");

    let after = observe(&world.pod).await.unwrap();
    let difference = after.diff(&[plugs[0].index]);
    plugs.extend(
        plug(&world.pod, &difference.added, 1, Backend::Userspace)
            .await
            .unwrap(),
    );

    let plan = after.plan(&[plugs[0].index, plugs[1].index]);
    assert_eq!(plan.interfaces[1].name, "eth1");
    let guest = Guest::start(&after.plan(&[plugs[1].index]), &plugs[1]).await;
    exchange(&world.host, &guest.namespace, [10, 1, 0, 2].into());
    ip(&world.pod, "link delete eth0");
    let gone = observe(&world.pod).await.unwrap();
    assert_eq!(gone.diff(&[plugs[0].index]).gone, [plugs[0].index]);
    unplug(&world.pod, plugs[0].index).await.unwrap();
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn what_a_pod_cant_have_is_named() {
    for (add, interface, kind) in [
        ("tuntap add tun9 mode tun", "tun9", "tun"),
        ("link add vlan9 link eth0 type vlan id 9", "vlan9", "vlan"),
        (
            "link add ipv9 link eth0 type ipvlan mode l3",
            "ipv9",
            "ipvlan",
        ),
        ("link add mvt9 link eth0 type macvtap", "mvt9", "macvtap"),
    ] {
        let world = World::new().await;
        ip(&world.pod, add);
        ip(&world.pod, &format!("link set {interface} up"));

        let refused = observe(&world.pod).await.unwrap_err();

        let named = format!("interface {interface} ({kind}): ");
        assert!(refused.to_string().contains(&named), "{refused}");
    }
}

#[tokio::test]
#[ignore = "needs root and traffic control"]
async fn a_tap_has_a_queue_for_each_pair() {
    let world = World::new().await;
    let observed = observe(&world.pod).await.unwrap();
    let interfaces: Vec<_> = observed.interfaces.iter().collect();

    let plugs = plug(&world.pod, &interfaces, 2, Backend::Vhost)
        .await
        .unwrap();

    assert_eq!((plugs[0].queues.len(), plugs[0].vhost.len()), (2, 2));
}

fn tc(namespace: &Namespace, arguments: &str) -> String {
    output(namespace, "tc", arguments)
}
