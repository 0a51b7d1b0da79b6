//! What a pod can't do on the host's networks.

use std::net::IpAddr;
use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::Hull;
use hull_tests::network::{Frames, bridge, host_network};
use hull_tests::pod::Pod;

/// A server on port 7000 in a container that may do anything to its network.
fn pod(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: network
    command: [echo-server, '7000']
    securityContext: {{capabilities: {{add: [NET_ADMIN, NET_RAW]}}}}
"
    )
}

/// Whether an echo comes back.
fn reaches(pod: &Pod, address: IpAddr, limit: u32) -> bool {
    let (family, address) = match address {
        IpAddr::V4(ip) => ("TCP4", ip.to_string()),
        IpAddr::V6(ip) => ("TCP6", format!("[{ip}]")),
    };
    let script =
        format!("echo hello | socat -t 10 - {family}:{address}:7000,connect-timeout={limit}");
    let output = pod.exec("main", &script);
    output.stdout == b"hello\n"
}

#[test]
fn pods_of_two_networks_do_not_reach_each_other() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    for network in ["left", "right"] {
        let _ = hull.ok(["network", "create", "--ipv6", network]);
    }
    let left = Pod::start_with(&hull, "left-one", &pod("left-one"), &["--network", "left"]);
    let near = Pod::start_with(&hull, "left-two", &pod("left-two"), &["--network", "left"]);
    let far = Pod::start_with(
        &hull,
        "right-one",
        &pod("right-one"),
        &["--network", "right"],
    );
    let addresses = left.addresses();
    assert_eq!(addresses.len(), 2, "IPv4 and IPv6");

    for address in addresses {
        eventually("the same network", Duration::from_secs(2), || {
            reaches(&near, address, 10).then_some(())
        });
        assert!(!reaches(&far, address, 3), "another network: {address}");
        // Also when it knows the way, and the host forwards.
        let (_, gateways) = bridge(&hull, "right");
        let gateway = gateways
            .iter()
            .find(|gateway| gateway.contains(':') == address.is_ipv6())
            .unwrap();
        let _ = far.sh("main", &format!("ip route add {address} via {gateway}"));
        assert!(!reaches(&far, address, 3), "by a route: {address}");
    }
    // By name neither.
    assert!(near.exec("main", "getent hosts left-one").status.success());
    assert!(!far.exec("main", "getent hosts left-one").status.success());
}

#[test]
fn frames_with_addresses_of_others_are_dropped_on_the_host() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let _ = hull.ok(["network", "create", "--ipv6", "shared"]);
    let hostile = Pod::start_with(&hull, "hostile", &pod("hostile"), &["--network", "shared"]);
    let victim = Pod::start_with(&hull, "victim", &pod("victim"), &["--network", "shared"]);
    let of = |pod: &Pod| {
        let addresses = pod.addresses();
        assert_eq!(addresses.len(), 2, "IPv4 and IPv6");
        format!("{} {}", addresses[0], addresses[1])
    };
    let frames = Frames::count();

    let sent = hostile.sh(
        "main",
        &format!("frames eth0 {} {}", of(&hostile), of(&victim)),
    );
    // The last that are sent are the last that come.
    std::thread::sleep(Duration::from_secs(1));
    let seen = frames.end();

    // The honest ones, which are sent and counted in the same way, all come.
    let (own, spoofed): (Vec<&str>, Vec<&str>) =
        sent.split(' ').partition(|sort| sort.starts_with("own-"));
    assert!(own.len() == 4 && spoofed.len() > 10, "{sent}");
    for sort in own {
        assert!(seen.get(sort).is_some_and(|n| *n >= 10), "{sort}: {seen:?}");
    }
    for sort in spoofed {
        assert_eq!(seen.get(sort), None, "{sort}: {seen:?}");
    }

    // An address that it takes for its own is of no use to it.
    let taken = victim.addresses()[0];
    let host = bridge(&hull, "shared").1[0].clone();
    let script = format!(
        "ip address add {taken}/32 dev eth0; ping -c 2 -W 3 {host} && ! ping -c 2 -W 3 -I {taken} {host}"
    );
    let _ = hostile.sh("main", &script);
}
