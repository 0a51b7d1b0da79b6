//! The files of `/etc` that a pod's containers share, as the kubelet writes them.

use std::fmt::Write as _;
use std::io::Read;
use std::net::IpAddr;

use crate::manifest::PodManifest;

/// Where the host says how names are looked up, the better source first: the first
/// has the real servers where the second points to a resolver on the host itself.
const RESOLV_CONF: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];
/// More is not read of the host's.
const MAX_RESOLV_CONF: u64 = 64 << 10;
/// Resolvers look at no more (resolv.conf(5), MAXNS).
const MAX_NAMESERVERS: usize = 3;

/// What the files tell of the pod's network. The default: a pod with loopback only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkFacts {
    /// The pod reaches more than itself.
    pub connected: bool,
    /// The pod's own, the first one first.
    pub addresses: Vec<IpAddr>,
    /// Where the network answers for names, and passes on what it doesn't know. Empty: the host's
    /// nameservers are asked.
    pub nameservers: Vec<IpAddr>,
}

/// `/etc/hosts`.
pub fn hosts(manifest: &PodManifest, network: &NetworkFacts) -> String {
    let mut text = String::from(
        "# Written by Hull for this pod.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    let own = match manifest.qualified_hostname() {
        Some(qualified) => format!("{qualified}\t{}", manifest.hostname()),
        None => manifest.hostname(),
    };
    let loopback = [IpAddr::from([127, 0, 0, 1])];
    let addresses = match network.addresses.as_slice() {
        [] => &loopback[..],
        addresses => addresses,
    };
    for address in addresses {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{address}\t{own}");
    }
    let aliases = manifest.spec().host_aliases.iter().flatten();
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default();
        if !names.is_empty() {
            let _ = writeln!(text, "{}\t{}", alias.ip, names.join("\t"));
        }
    }
    text
}

/// `/etc/resolv.conf`, by `dnsPolicy` and `dnsConfig`.
pub fn resolv_conf(manifest: &PodManifest, network: &NetworkFacts) -> String {
    let host = Resolver::parse(&hosts_own());
    resolver(manifest, network, host).to_string()
}

fn resolver(manifest: &PodManifest, network: &NetworkFacts, mut host: Resolver) -> Resolver {
    // Those on the host's loopback are out of the pod's reach.
    host.nameservers
        .retain(|server| !server.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()));
    let of_network: Vec<String> = network.nameservers.iter().map(IpAddr::to_string).collect();
    let spec = manifest.spec();
    let mut resolver = match spec.dns_policy.as_deref() {
        Some("None") => Resolver::default(),
        _ if !network.connected => Resolver::default(),
        Some("Default") if !host.nameservers.is_empty() => host,
        _ if of_network.is_empty() => host,
        // Names of pods first; the network's server asks the host's for others.
        _ => Resolver {
            nameservers: of_network,
            ..host
        },
    };
    if let Some(config) = &spec.dns_config {
        let extend = |list: &mut Vec<String>, more: &Option<Vec<String>>| {
            for text in more.iter().flatten() {
                if !list.contains(text) {
                    list.push(text.clone());
                }
            }
        };
        extend(&mut resolver.nameservers, &config.nameservers);
        extend(&mut resolver.searches, &config.searches);
        for option in config.options.iter().flatten() {
            let name = option.name.as_deref().unwrap_or_default();
            resolver
                .options
                .retain(|o| o.split(':').next() != Some(name));
            resolver.options.push(match option.value.as_deref() {
                None | Some("") => name.to_owned(),
                Some(value) => format!("{name}:{value}"),
            });
        }
    }
    resolver.nameservers.truncate(MAX_NAMESERVERS);
    resolver
}

/// The host's. Empty where it has none.
fn hosts_own() -> String {
    let read = |path: &&str| {
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .ok()?
            .take(MAX_RESOLV_CONF)
            .read_to_end(&mut bytes)
            .ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    RESOLV_CONF.iter().find_map(read).unwrap_or_default()
}

/// What resolv.conf(5) has room for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Resolver {
    nameservers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

impl Resolver {
    fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => resolver.nameservers.extend(words.next()),
                // The last one counts.
                Some("search" | "domain") => resolver.searches = words.collect(),
                Some("options") => resolver.options.extend(words),
                _ => {}
            }
        }
        resolver
    }
}

impl std::fmt::Display for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for server in &self.nameservers {
            writeln!(f, "nameserver {server}")?;
        }
        for (word, list) in [("search", &self.searches), ("options", &self.options)] {
            if !list.is_empty() {
                writeln!(f, "{word} {}", list.join(" "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn pod(spec: &str) -> PodManifest {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web}}, spec: {{{spec} containers: [{{name: a, image: b}}]}}}}"
        );
        manifest::parse("f", &text).unwrap().remove(0)
    }

    fn facts() -> NetworkFacts {
        NetworkFacts {
            connected: true,
            addresses: vec![[10, 83, 0, 2].into(), "fd00::2".parse().unwrap()],
            nameservers: vec![[10, 83, 0, 1].into()],
        }
    }

    fn resolved(spec: &str, network: &NetworkFacts) -> String {
        let host = "# by hand\nnameserver 127.0.0.53\nnameserver 192.0.2.1\ndomain old\n\
                    search example.com\noptions ndots:2 rotate\n";
        resolver(&pod(spec), network, Resolver::parse(host)).to_string()
    }

    #[test]
    fn host_aliases_are_in_hosts() {
        let pod = pod("hostAliases: [{ip: 10.0.0.1, hostnames: [db, db.example]}],");

        let hosts = hosts(&pod, &NetworkFacts::default());

        assert!(
            hosts.ends_with("127.0.0.1\tweb\n10.0.0.1\tdb\tdb.example\n"),
            "{hosts}"
        );
    }

    #[test]
    fn the_pod_finds_itself_by_its_addresses() {
        let plain = hosts(&pod(""), &facts());
        let qualified = hosts(&pod("hostname: one, subdomain: two,"), &facts());

        assert!(plain.ends_with("10.83.0.2\tweb\nfd00::2\tweb\n"), "{plain}");
        assert!(
            qualified.contains("10.83.0.2\tone.two.default.svc.cluster.local\tone\n"),
            "{qualified}"
        );
    }

    #[test]
    fn names_are_asked_of_the_network_or_of_the_host() {
        let rest = "search example.com\noptions ndots:2 rotate\n";
        let of_network = format!("nameserver 10.83.0.1\n{rest}");
        let of_host = format!("nameserver 192.0.2.1\n{rest}");
        let silent = NetworkFacts {
            nameservers: vec![],
            ..facts()
        };

        assert_eq!(resolved("", &facts()), of_network);
        assert_eq!(resolved("dnsPolicy: ClusterFirst,", &facts()), of_network);
        assert_eq!(resolved("dnsPolicy: Default,", &facts()), of_host);
        assert_eq!(resolved("", &silent), of_host);
        assert_eq!(resolved("", &NetworkFacts::default()), "");
    }

    #[test]
    fn a_dns_config_is_added_or_stands_alone() {
        let config = "dnsConfig: {nameservers: [192.0.2.9], searches: [a.example, example.com], \
                      options: [{name: ndots, value: '5'}, {name: edns0}]},";

        assert_eq!(
            resolved(config, &facts()),
            "nameserver 10.83.0.1\nnameserver 192.0.2.9\nsearch example.com a.example\n\
             options rotate ndots:5 edns0\n"
        );
        assert_eq!(
            resolved(&format!("dnsPolicy: None, {config}"), &facts()),
            "nameserver 192.0.2.9\nsearch a.example example.com\noptions ndots:5 edns0\n"
        );
    }
}
