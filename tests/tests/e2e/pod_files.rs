//! /etc/hosts, /etc/resolv.conf and /etc/hostname: one set per pod.

use hull_tests::hull::Hull;
use hull_tests::network::{bridge, host_network};
use hull_tests::pod::{Pod, sleepers};

const FILES: [&str; 3] = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];

#[test]
fn every_container_has_the_pods_own_files() {
    let _host = host_network();
    let hull = Hull::with_images(&["busybox"]);
    let fields = "  hostname: harbour
  hostAliases:
  - {ip: 192.0.2.7, hostnames: [lighthouse, lighthouse.example.org]}
  dnsConfig:
    nameservers: [192.0.2.53]
    searches: [sea.example.org]
    options: [{name: ndots, value: '3'}]
";
    let user = "    securityContext: {runAsUser: 1000}\n";
    let manifest = sleepers("named", &[("one", ""), ("two", user)], fields);
    let pod = Pod::start(&hull, "named", &manifest);
    let (_, hosts) = bridge(&hull, "hull");
    let address = pod.addresses()[0];

    for file in FILES {
        let read = |container| pod.sh(container, &format!("cat {file}"));
        assert_eq!(read("one"), read("two"), "{file}");
    }
    let lines = |file: &str| -> Vec<Vec<String>> {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        let text = pod.sh("one", &format!("cat {file}"));
        text.lines().map(words).collect()
    };
    let own = [address.to_string(), "harbour".to_owned()];
    let hosts_file = lines("/etc/hosts");
    assert!(hosts_file.contains(&own.to_vec()), "{hosts_file:?}");
    let alias = ["192.0.2.7", "lighthouse", "lighthouse.example.org"].map(str::to_owned);
    assert!(hosts_file.contains(&alias.to_vec()), "{hosts_file:?}");
    let resolver = lines("/etc/resolv.conf");
    let servers: Vec<&String> = resolver
        .iter()
        .filter(|words| words[0] == "nameserver")
        .map(|words| &words[1])
        .collect();
    assert_eq!(servers[0], &hosts[0], "names of pods first: {resolver:?}");
    assert_eq!(*servers[servers.len() - 1], "192.0.2.53");
    let has = |first: &str, word: &str| {
        let mut lines = resolver.iter().filter(|words| words[0] == first);
        lines.any(|words| words[1..].iter().any(|w| w == word))
    };
    assert!(has("search", "sea.example.org"), "{resolver:?}");
    assert!(has("options", "ndots:3"), "{resolver:?}");
    assert_eq!(
        pod.sh("two", "cat /etc/hostname; hostname"),
        "harbour\nharbour"
    );
    // Names are found in what the files say.
    let ping = pod.exec("one", "ping -c 1 -W 1 lighthouse");
    let said = String::from_utf8_lossy(&ping.stdout).into_owned();
    assert!(said.contains("(192.0.2.7)"), "{ping:?}");
}

#[test]
fn dns_policy_none_is_what_dns_config_says() {
    let _host = host_network();
    let hull = Hull::with_images(&["busybox"]);
    let fields = "  dnsPolicy: None
  dnsConfig: {nameservers: [192.0.2.53], searches: [example.org]}
";
    let pod = Pod::start(&hull, "plain", &sleepers("plain", &[("one", "")], fields));

    let resolver = pod.sh("one", "grep -v '^#' /etc/resolv.conf");

    let mut lines: Vec<&str> = resolver.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["nameserver 192.0.2.53", "search example.org"]);
}
