use std::fs::File;
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::super::{Asked, Choice, Creation};
use super::*;
use crate::manifest;
use crate::state::{Claim, Registry};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a test in a thread with mounts and a network of its own, in the place of the host's. What it
/// starts ends with it.
fn in_private_network(test: impl FnOnce(&Host) + Send + 'static) {
    std::thread::spawn(move || {
        crate::volumes::enter_private_namespace().unwrap();
        // SAFETY: the network namespace is no resource that the standard library shares.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        run("ip link set lo up");
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::new(root.path().join("run"), root.path().join("data"));
        let host = Host {
            registry: Registry::open(directories.clone(), |_, _| Ok(())).unwrap(),
            networks: Networks::open(&directories).unwrap(),
            directories,
        };
        test(&host);
    })
    .join()
    .unwrap();
}

struct Host {
    directories: Directories,
    registry: Registry,
    networks: Networks,
}

impl Host {
    fn netavark(&self) -> Netavark {
        Netavark::find(&self.directories, LIMIT).unwrap()
    }

    fn network(&self, name: &str, subnets: &[&str], internal: bool) {
        self.networks
            .create(&Creation {
                name: name.into(),
                subnets: subnets.iter().map(|s| (*s).to_owned()).collect(),
                mtu: Some(1400),
                internal,
                ..Creation::default()
            })
            .unwrap();
    }

    fn reserve(&self, pod: &str, networks: &[&str], ports: &[&str]) -> (Claim, Attachment) {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {pod}}}, spec: {{hostname: host-of-{pod}, containers: [{{name: a, image: b}}]}}}}"
        );
        let manifest = manifest::parse("p.yaml", &text).unwrap().remove(0);
        let claim = self
            .registry
            .claim(pod, "Never", vec![], vec![], None)
            .unwrap();
        let choice = Choice::Named(networks.iter().map(|n| (*n).to_owned()).collect());
        let ports: Vec<Asked> = ports
            .iter()
            .map(|port| Asked::by_flag(port.parse().unwrap()))
            .collect();
        let attachment = self
            .networks
            .reserve(&claim.dir, &manifest, &choice, &ports)
            .unwrap();
        (claim, attachment)
    }
}

/// A pod's network namespace.
fn namespace() -> StandIn {
    StandIn::new(&[]).unwrap()
}

fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn run_in(pod: &StandIn, line: &str) -> String {
    use std::os::fd::AsRawFd;
    let netns = format!("/proc/{}/fd/{}", std::process::id(), pod.netns.as_raw_fd());
    run(&format!("nsenter --net={netns} sh -c '{line}'"))
}

/// Without the rules and chains that netavark keeps for all networks.
fn rules() -> Vec<String> {
    run("iptables-save -t nat; iptables-save -t filter")
        .lines()
        .filter(|line| line.contains("198.51.100"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn pods_reach_each_other_by_name_and_the_host_by_its_ports() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24", "2001:db8::/64"], false);
        let netavark = host.netavark();
        let (_web, mut web) =
            host.reserve("web", &["net"], &["18080:80", "127.0.0.1:18053:53/udp"]);
        let (_db, mut db) = host.reserve("db", &["net"], &[]);
        let (web_ns, db_ns) = (namespace(), namespace());

        web.setup(&netavark, web_ns.netns.as_fd()).unwrap();
        db.setup(&netavark, db_ns.netns.as_fd()).unwrap();

        let interface = run_in(&web_ns, "ip address show eth0");
        assert!(interface.contains("mtu 1400"), "{interface}");
        assert!(interface.contains("inet 198.51.100.2/24"), "{interface}");
        assert!(interface.contains("inet6 2001:db8::2/64"), "{interface}");
        let server = web.facts().nameservers[0];
        for name in ["web", "host-of-web", web.dir.id().as_str()] {
            let answer = run_in(&db_ns, &format!("busybox nslookup {name} {server}"));
            assert!(answer.contains("198.51.100.2"), "{answer}");
        }
        let listen = "ip link set lo up; for n in 1 2 3; do timeout 20 busybox nc -l -p 80 -e echo served; done";
        let ask = |address: &str| {
            let ask = format!("timeout 3 busybox nc -w 2 {address} && exit");
            format!("for n in 1 2 3 4 5 6 7 8 9; do {ask}; sleep 0.3; done </dev/null")
        };
        std::thread::scope(|scope| {
            scope.spawn(|| run_in(&web_ns, listen));
            let answers = [
                run_in(&db_ns, &ask("198.51.100.2 80")),
                run(&ask("198.51.100.1 18080")),
                run(&ask("127.0.0.1 18080")),
            ];
            for answer in answers {
                assert!(answer.contains("served"), "{answer}");
            }
        });
        assert_eq!(
            rules().iter().filter(|rule| rule.contains("18080")).count(),
            2,
            "{:?}",
            rules()
        );

        web.teardown(&netavark, Some(web_ns.netns.as_fd())).unwrap();
        db.teardown(&netavark, Some(db_ns.netns.as_fd())).unwrap();

        assert_eq!(rules(), Vec::<String>::new());
        assert!(!run("ip link").contains("hull"), "{}", run("ip link"));
        assert!(
            Attachment::open(&host.directories, &web.dir)
                .unwrap()
                .is_none()
        );
    });
}

#[test]
fn a_pod_in_several_networks_has_an_interface_in_each() {
    in_private_network(|host| {
        host.network("front", &["198.51.100.0/25"], false);
        host.network("back", &["198.51.100.128/25"], true);
        let netavark = host.netavark();
        let (_web, mut web) = host.reserve("web", &["front", "back"], &[]);
        let pod = namespace();

        web.setup(&netavark, pod.netns.as_fd()).unwrap();

        let addresses = run_in(&pod, "ip -br address");
        assert!(addresses.contains("198.51.100.2/25"), "{addresses}");
        assert!(addresses.contains("198.51.100.130/25"), "{addresses}");
        let routes = run_in(&pod, "ip route");
        assert!(
            routes.contains("default via 198.51.100.1 dev eth0"),
            "{routes}"
        );
        assert_eq!(routes.matches("default").count(), 1, "{routes}");
        assert_eq!(web.facts().nameservers.len(), 2);
        web.teardown(&netavark, Some(pod.netns.as_fd())).unwrap();
        assert!(!run("ip link").contains("hull"));
    });
}

#[test]
fn setup_and_teardown_can_be_done_again() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        let netavark = host.netavark();
        let (_web, mut web) = host.reserve("web", &["net"], &["18080:80"]);
        let pod = namespace();

        web.setup(&netavark, pod.netns.as_fd()).unwrap();
        let once = rules();
        web.setup(&netavark, pod.netns.as_fd()).unwrap();
        assert_eq!(rules(), once);

        web.teardown(&netavark, Some(pod.netns.as_fd())).unwrap();
        web.teardown(&netavark, Some(pod.netns.as_fd())).unwrap();
        assert_eq!(rules(), Vec::<String>::new());
    });
}

#[test]
fn what_a_dead_pod_had_is_given_back() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        let (claim, mut web) = host.reserve("web", &["net"], &["18080:80"]);
        let pod = namespace();
        web.setup(&host.netavark(), pod.netns.as_fd()).unwrap();
        // Its supervisor dies, and with it the namespace, which the kernel ends in its own time: here, after the
        // release.
        let dir = claim.dir.clone();
        drop(claim);
        assert!(!rules().is_empty());

        release(&host.directories, &dir, LIMIT).unwrap();
        release(&host.directories, &dir, LIMIT).unwrap();

        assert_eq!(rules(), Vec::<String>::new());
        assert!(!run("ip link").contains("hull"), "{}", run("ip link"));
        assert!(host.networks.users("net").unwrap().is_empty());
        drop(pod);
    });
}

#[test]
fn a_pod_that_died_before_its_setup_is_given_back() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        let (claim, mut web) = host.reserve("web", &["net"], &["18080:80"]);
        web.record.wired = true;
        web.write().unwrap();

        release(&host.directories, &claim.dir, LIMIT).unwrap();

        assert!(host.networks.users("net").unwrap().is_empty());
    });
}

#[test]
fn a_failed_setup_leaves_nothing() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        let netavark = host.netavark();
        let (_web, mut web) = host.reserve("web", &["net"], &["18080:80"]);
        // netavark wants to make this name itself.
        let pod = StandIn::new(&["eth0"]).unwrap();

        let failed = web.setup(&netavark, pod.netns.as_fd());

        assert!(matches!(failed, Err(NetworkError::Netavark { .. })));
        assert!(!web.record.wired);
        assert_eq!(rules(), Vec::<String>::new());
        assert!(!run("ip link").contains("hull"));
    });
}

#[test]
fn a_subnet_that_the_host_has_come_to_use_is_refused() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        let (_web, mut web) = host.reserve("web", &["net"], &[]);
        run(
            "ip link add other type bridge; ip address add 198.51.100.77/26 dev other; ip link set other up",
        );

        let refused = web.setup(&host.netavark(), namespace().netns.as_fd());

        let message = refused.unwrap_err().to_string();
        assert!(message.contains("198.51.100.64/26"), "{message}");
        assert!(message.contains("through other"), "{message}");
    });
}

#[test]
fn subnets_that_hull_chose_make_way_for_the_hosts() {
    in_private_network(|host| {
        let claim = host.reserve("one", &["hull"], &[]).0;
        let first = host.networks.find("hull").unwrap();
        host.registry.abandon(claim).unwrap();
        let taken = first.subnets[0].gateway;
        run(&format!(
            "ip link add other type bridge; ip address add {taken}/22 dev other; ip link set other up"
        ));

        let (_two, two) = host.reserve("two", &["hull"], &[]);

        let second = host.networks.find("hull").unwrap();
        assert_ne!(second.subnets, first.subnets);
        assert_eq!(second.id, first.id);
        assert_eq!(two.memberships()[0].network, second);
    });
}

#[test]
fn a_bridge_of_somebody_else_is_not_joined() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        let bridge = host.networks.find("net").unwrap().network_interface;
        run(&format!("ip link add {bridge} type bridge"));

        let (_web, web) = host.reserve("web", &["net"], &[]);

        let joined = &web.memberships()[0].network;
        assert_ne!(joined.network_interface, bridge);
        assert_eq!(*joined, host.networks.find("net").unwrap());
    });
}

#[test]
fn netavark_is_told_in_podmans_form() {
    let root = tempfile::tempdir().unwrap();
    let directories = Directories::new(root.path().join("run"), root.path().join("data"));
    let host = Host {
        registry: Registry::open(directories.clone(), |_, _| Ok(())).unwrap(),
        networks: Networks::open(&directories).unwrap(),
        directories,
    };
    host.network("net", &["198.51.100.0/24"], false);
    let (_web, web) = host.reserve("web", &["net"], &["127.0.0.1:18080:80", "18053:53/udp"]);

    let options = web.record.options("0123456789ab");

    assert_eq!(options["container_name"], "web");
    assert_eq!(
        options["networks"]["net"],
        json!({"interface_name": "eth0", "static_ips": ["198.51.100.2"],
               "aliases": ["0123456789ab", "host-of-web"]})
    );
    assert_eq!(
        options["port_mappings"],
        json!([
            {"host_ip": "127.0.0.1", "host_port": 18080, "container_ip": "", "container_port": 80,
             "protocol": "tcp", "range": 1},
            {"host_ip": "", "host_port": 18053, "container_ip": "", "container_port": 53,
             "protocol": "udp", "range": 1},
        ])
    );
    let network = &options["network_info"]["net"];
    assert_eq!(network["driver"], "bridge");
    assert_eq!(
        network["subnets"],
        json!([{"subnet": "198.51.100.0/24", "gateway": "198.51.100.1"}])
    );
    assert_eq!(network["options"]["mtu"], "1400");
}

#[test]
fn aardvark_keeps_no_mounts_of_a_supervisor() {
    in_private_network(|host| {
        host.network("net", &["198.51.100.0/24"], false);
        // That of the main thread, which none of the tests leaves.
        let outside = File::open("/proc/self/ns/mnt").unwrap();
        let netavark = host.netavark().in_mounts(outside.into());
        let (_web, mut web) = host.reserve("web", &["net"], &[]);
        let pod = namespace();

        web.setup(&netavark, pod.netns.as_fd()).unwrap();

        let config = host.directories.run().join("networks/aardvark-dns");
        let pid = std::fs::read_to_string(config.join("aardvark.pid")).unwrap();
        let mounts = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
        assert_eq!(mounts(pid.trim()), mounts("self"));
        web.teardown(&netavark, Some(pod.netns.as_fd())).unwrap();
    });
}
