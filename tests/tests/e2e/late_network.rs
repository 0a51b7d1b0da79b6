//! A network namespace of somebody else's, which is wired while the pod runs.

use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::Pod;

const PATH: &str = "/run/netns/late";

/// A named network namespace; gone with its test.
struct Namespace;

impl Namespace {
    fn new() -> Self {
        ip("netns add late");
        Self
    }

    /// The pod's end is to be 10.99.0.2.
    fn wire(&self) {
        ip("link add late0 type veth peer name eth0 netns late");
        ip("address add 10.99.0.1/24 dev late0");
        ip("link set late0 up");
        ip("-n late address add 10.99.0.2/24 dev eth0");
        ip("-n late link set eth0 up");
        ip("-n late route add default via 10.99.0.1");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", "late"]).output();
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed");
    assert_success(&output, &format!("ip {arguments}"));
    String::from_utf8(output.stdout).unwrap()
}

fn wait_for_echo(address: &str) {
    eventually(address, Duration::from_secs(10), || {
        TcpStream::connect((address, 7)).ok()
    });
}

#[test]
fn what_comes_late_is_there_when_a_container_starts() {
    let hull = Hull::new();
    let namespace = Namespace::new();
    let manifest = hull.manifest(
        "late.yaml",
        "apiVersion: v1
kind: Pod
metadata: {name: late}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - {name: echo, image: busybox, command: [nc, -ll, -p, '7', -e, cat]}
  - {name: look, image: busybox, command: [sleep, '100000']}
",
    );
    let started = hull.run([
        "run".as_ref(),
        "-d".as_ref(),
        "--network".as_ref(),
        format!("ns:{PATH}").as_ref(),
        manifest.as_os_str(),
    ]);
    assert_success(&started, "hull run");
    let pod = Pod::running(&hull, "late");
    assert_eq!(pod.sh("look", "ls /sys/class/net"), "lo");

    namespace.wire();
    let _ = hull.ok(["kill", "late", "-c", "echo"]);

    wait_for_echo("10.99.0.2");
    assert_eq!(pod.sh("look", "ls /sys/class/net"), "eth0\nlo");
    assert!(pod.sh("look", "ip route").contains("default via 10.99.0.1"));
    assert_eq!(pod.inspect()["status"]["podIP"], "10.99.0.2");

    ip("-n late address add 10.99.0.3/24 dev eth0");
    let _ = hull.ok(["kill", "late", "-c", "echo"]);

    wait_for_echo("10.99.0.3");
    wait_for_echo("10.99.0.2");

    let _ = hull.ok(["rm", "--force", "late"]);
    let left = ip("-n late -brief link");
    assert!(!left.contains("hull"), "{left}");
    let tc = Command::new("tc")
        .args(["-n", "late", "qdisc", "show", "dev", "eth0", "ingress"])
        .output()
        .expect("iproute2 is installed");
    assert_eq!(String::from_utf8_lossy(&tc.stdout), "");
}
