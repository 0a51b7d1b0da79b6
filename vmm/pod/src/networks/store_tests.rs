use super::*;
use crate::manifest;
use crate::state::{Claim, Registry};

/// Networks of an installation of its own, in documentation's and other unused addresses.
struct Lab {
    _root: tempfile::TempDir,
    registry: Registry,
    networks: Networks,
}

impl Lab {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::new(root.path().join("run"), root.path().join("data"));
        Self {
            registry: Registry::open(directories.clone(), |_, _| Ok(())).unwrap(),
            networks: Networks::open(&directories).unwrap(),
            _root: root,
        }
    }

    fn create(&self, name: &str, subnets: &[&str]) -> Result<Network, NetworkError> {
        self.networks.create(&Creation {
            name: name.into(),
            subnets: subnets.iter().map(|s| (*s).to_owned()).collect(),
            ..Creation::default()
        })
    }

    fn claim(&self, name: &str) -> (Claim, PodManifest) {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: [{{name: a, image: b}}]}}}}"
        );
        let manifest = manifest::parse("p.yaml", &text).unwrap().remove(0);
        let claim = self.registry.claim(name, "Never", vec![], vec![], None);
        (claim.unwrap(), manifest)
    }

    fn reserve(
        &self,
        name: &str,
        networks: &[&str],
        ports: &[&str],
    ) -> Result<(Claim, Attachment), NetworkError> {
        let (claim, manifest) = self.claim(name);
        let choice = Choice::Named(networks.iter().map(|n| (*n).to_owned()).collect());
        let ports: Vec<Asked> = ports
            .iter()
            .map(|port| Asked::by_flag(port.parse().unwrap()))
            .collect();
        match self
            .networks
            .reserve(&claim.dir, &manifest, &choice, &ports)
        {
            Ok(attachment) => Ok((claim, attachment)),
            Err(error) => {
                self.registry.abandon(claim).unwrap();
                Err(error)
            }
        }
    }
}

fn addresses(attachment: &Attachment) -> Vec<String> {
    let facts = attachment.facts();
    facts.addresses.iter().map(ToString::to_string).collect()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, NetworkError>) -> String {
    match result {
        Err(NetworkError::Refused(message)) => message,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_network_is_defined_shown_and_removed() {
    let lab = Lab::new();
    let creation = Creation {
        name: "web".into(),
        subnets: vec!["198.51.100.0/24".into()],
        gateways: vec!["198.51.100.9".into()],
        ipv6: true,
        internal: true,
        mtu: Some(1400),
        labels: [("a".to_owned(), "b".to_owned())].into(),
        ..Creation::default()
    };

    let network = lab.networks.create(&creation).unwrap();

    assert_eq!(lab.networks.find("web").unwrap(), network);
    assert_eq!(lab.networks.list().unwrap(), std::slice::from_ref(&network));
    assert_eq!(network.subnets.len(), 2);
    assert_eq!(network.subnets[0].gateway.to_string(), "198.51.100.9");
    assert_eq!(network.options["mtu"], "1400");
    assert_eq!(network.options["isolate"], "true", "from other networks");
    assert!(network.ipv6_enabled && network.internal && network.dns_enabled);
    assert!(!network.chosen_subnets);
    lab.networks.remove("web").unwrap();
    assert!(matches!(
        lab.networks.find("web"),
        Err(NetworkError::NoSuchNetwork(_))
    ));
}

#[test]
fn networks_without_a_subnet_get_different_ones() {
    let lab = Lab::new();

    let networks: Vec<Network> = ["a", "b", "c"]
        .iter()
        .map(|name| lab.create(name, &[]).unwrap())
        .collect();

    let pool: IpNet = "10.83.0.0/16".parse().unwrap();
    for (n, network) in networks.iter().enumerate() {
        let subnet = network.subnets[0].subnet;
        assert!(pool.contains(&subnet) && subnet.prefix_len() == 22);
        for other in &networks[..n] {
            assert!(!subnet::overlap(&subnet, &other.subnets[0].subnet));
            assert_ne!(network.network_interface, other.network_interface);
            assert_ne!(network.id, other.id);
        }
    }
}

#[test]
fn what_a_network_cant_be_is_refused_with_field_and_value() {
    let lab = Lab::new();
    lab.create("web", &["198.51.100.0/24"]).unwrap();
    let create = |change: fn(&mut Creation)| {
        let mut creation = Creation {
            name: "x".into(),
            ..Creation::default()
        };
        change(&mut creation);
        refusal(lab.networks.create(&creation))
    };

    let faults = [
        create(|c| c.name = "../x".into()),
        create(|c| c.name = "web".into()),
        create(|c| c.name = "last".into()),
        create(|c| c.subnets = vec!["198.51.100.128/25".into()]),
        create(|c| c.subnets = vec!["10.1.0.0/24".into(), "10.2.0.0/24".into()]),
        create(|c| c.gateways = vec!["10.1.0.1".into()]),
        create(|c| c.mtu = Some(67)),
        create(|c| (c.mtu, c.ipv6) = (Some(1279), true)),
    ];

    let wanted = [
        "network \"../x\": must be a name of",
        "network \"web\": there is one of that name",
        "network \"last\": has a meaning of its own",
        "--subnet 198.51.100.128/25: overlaps 198.51.100.0/24 of network web",
        "--subnet 10.2.0.0/24: a network has at most one",
        "--gateway 10.1.0.1: needs a --subnet",
        "--mtu 67: must be 68 to 65535",
        "--mtu 1279: must be 1280 to 65535",
    ];
    for (fault, wanted) in faults.iter().zip(wanted) {
        assert!(fault.starts_with(wanted), "{fault}");
    }
    assert_eq!(lab.networks.list().unwrap().len(), 1);
}

#[test]
fn a_definition_that_is_a_path_is_not_read() {
    let lab = Lab::new();

    let found = lab.networks.find("../pods/x");

    assert!(matches!(found, Err(NetworkError::NoSuchNetwork(_))));
}

#[test]
fn the_default_network_is_made_at_its_first_use() {
    let lab = Lab::new();
    assert!(lab.networks.list().unwrap().is_empty());

    let (_claim, attachment) = lab.reserve("web", &["hull"], &[]).unwrap();

    let network = lab.networks.find("hull").unwrap();
    assert!(network.chosen_subnets);
    let facts = attachment.facts();
    assert!(facts.connected);
    assert_eq!(facts.nameservers, [network.subnets[0].gateway]);
    assert!(matches!(
        lab.reserve("db", &["other"], &[]),
        Err(NetworkError::NoSuchNetwork(_))
    ));
}

#[test]
fn pods_get_different_addresses_until_there_is_none() {
    let lab = Lab::new();
    lab.create("small", &["198.51.100.0/29"]).unwrap();

    let pods: Vec<_> = ["a", "b", "c", "d", "e"]
        .iter()
        .map(|name| lab.reserve(name, &["small"], &[]).unwrap())
        .collect();
    let full = lab.reserve("f", &["small"], &[]);

    let mut all: Vec<_> = pods.iter().flat_map(|(_, a)| addresses(a)).collect();
    all.dedup();
    assert_eq!(all.len(), 5);
    assert!(matches!(full, Err(NetworkError::Exhausted { .. })));
}

#[test]
fn many_at_once_get_different_addresses() {
    let lab = Lab::new();
    lab.create("net", &["198.51.100.0/24"]).unwrap();
    let lab = &lab;

    let mut all: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|t| {
                scope.spawn(move || {
                    (0..8)
                        .flat_map(|n| {
                            let pod = lab.reserve(&format!("p{t}-{n}"), &["net"], &[]);
                            let (claim, attachment) = pod.unwrap();
                            std::mem::forget(claim);
                            addresses(&attachment)
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });

    all.sort();
    all.dedup();
    assert_eq!(all.len(), 64);
}

#[test]
fn addresses_come_back_with_the_pod_and_not_at_once() {
    let lab = Lab::new();
    lab.create("net", &["198.51.100.0/24", "2001:db8::/64"])
        .unwrap();
    let (one, attachment) = lab.reserve("one", &["net"], &[]).unwrap();
    let first = addresses(&attachment);
    lab.registry.abandon(one).unwrap();

    let (_two, second) = lab.reserve("two", &["net"], &[]).unwrap();

    assert_eq!(first, ["198.51.100.2", "2001:db8::2"]);
    assert_eq!(addresses(&second), ["198.51.100.3", "2001:db8::3"]);
    assert_eq!(lab.networks.users("net").unwrap(), ["two"]);
}

#[test]
fn a_network_in_use_stays() {
    let lab = Lab::new();
    lab.create("net", &["198.51.100.0/24"]).unwrap();
    let (claim, _) = lab.reserve("web", &["net"], &[]).unwrap();

    let refused = lab.networks.remove("net");
    lab.registry.abandon(claim).unwrap();

    assert!(matches!(refused, Err(NetworkError::InUse { pod, .. }) if pod == "web"));
    lab.networks.remove("net").unwrap();
}

#[test]
fn a_port_of_the_host_is_one_pods() {
    let lab = Lab::new();
    lab.create("net", &["198.51.100.0/24"]).unwrap();
    let _web = lab.reserve("web", &["net"], &["18080:80"]).unwrap();

    let taken = refusal(lab.reserve("other", &["net"], &["127.0.0.1:18080:8080"]));
    let twice = refusal(lab.reserve("other", &["net"], &["18081:1", "18081:2"]));
    let udp = lab.reserve("other", &["net"], &["18080:80/udp"]);

    assert!(
        taken.starts_with("--publish 127.0.0.1:18080:8080/tcp: pod web (id "),
        "{taken}"
    );
    assert_eq!(
        twice,
        "--publish 18081:2/tcp: is the same port of the host as --publish 18081:1/tcp"
    );
    assert!(udp.is_ok());
}

#[test]
fn a_pod_without_a_named_network_takes_nothing() {
    let lab = Lab::new();
    let (claim, manifest) = lab.claim("web");
    let namespace = Choice::Namespace("/run/netns/x".into());

    let none = lab
        .networks
        .reserve(&claim.dir, &manifest, &Choice::None, &[]);
    let foreign = lab.networks.reserve(&claim.dir, &manifest, &namespace, &[]);

    assert!(!none.unwrap().facts().connected);
    let foreign = foreign.unwrap();
    assert_eq!(foreign.namespace(), Some(Path::new("/run/netns/x")));
    assert!(foreign.facts().connected && foreign.memberships().is_empty());
    assert!(lab.networks.list().unwrap().is_empty());
}
