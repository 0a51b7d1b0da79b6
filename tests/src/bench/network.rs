//! A pod's network against its peers on one bridge. Every contender serves at the same time, and the host is the client
//! of one after another.

#![allow(clippy::unwrap_used, reason = "a benchmark reports by panicking")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::options::Options;
use super::report::{Report, Table};
use super::series::{Contender as Measured, interleave};
use crate::eventually;
use crate::hull::{Hull, assert_success, target};
use crate::pod::Pod;

/// Each measurement, in seconds.
const SECONDS: &str = "2";
/// The last of the network's addresses, which it gives to pods last.
const PODMAN: u32 = 2;
const QEMU: u32 = 3;
/// Of the default network, below the data directory.
const DEFINITION: &str = "networks/hull.json";
/// What every contender runs.
const SERVE: &str = "iperf3 -s & sockperf server --tcp -i 0.0.0.0 -p 11111 & \
                     exec sockperf server -i 0.0.0.0 -p 11112";

/// Who answers at an address.
struct Contender {
    name: &'static str,
    address: String,
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert_success(&output, &format!("{program} {args:?}"));
    String::from_utf8(output.stdout).expect("text")
}

/// A root file system of busybox, iperf3 and sockperf, with the libraries that they need.
fn root(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    let mut files: BTreeSet<PathBuf> = ["/usr/bin/iperf3", "/usr/bin/sockperf"]
        .map(PathBuf::from)
        .into();
    for program in files.clone() {
        let libraries = run("ldd", &[program.to_str().unwrap()]);
        let words = libraries.split_whitespace();
        files.extend(
            words
                .filter(|word| word.starts_with('/'))
                .map(PathBuf::from),
        );
    }
    for file in files {
        let to = root.join(file.strip_prefix("/").unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&file, to).unwrap();
    }
    let script = "set -e; mkdir -p bin dev proc sys tmp etc
cp /bin/busybox bin/; for name in $(bin/busybox --list); do [ -e bin/$name ] || ln -s busybox bin/$name; done
echo root:x:0:0:root:/root:/bin/sh > etc/passwd";
    sh(&root, script);
    root
}

fn sh(dir: &Path, script: &str) {
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .output()
        .unwrap();
    assert_success(&output, script);
}

/// A pod whose packets the kernel's vhost-net serves, or `hull-vmm`.
fn pod<'a>(hull: &'a Hull, name: &str, vhost: &str) -> Pod<'a> {
    let manifest = format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: localhost/bench-network
    command: [sh, -c, \"{SERVE}\"]
"
    );
    let path = hull.manifest(&format!("{name}.yaml"), &manifest);
    let output = hull
        .command([OsStr::new("run"), OsStr::new("-d"), path.as_os_str()])
        .env("HULL_VHOST_NET", vhost)
        .output()
        .unwrap();
    assert_success(&output, "hull run");
    Pod::running(hull, name)
}

/// A container in the network of Hull's: podman reads the same definitions.
struct Container;

impl Container {
    fn start(hull: &Hull, dir: &Path, address: &str) -> Self {
        let networks = dir.join("networks");
        std::fs::create_dir(&networks).unwrap();
        std::fs::copy(hull.data_dir().join(DEFINITION), dir.join(DEFINITION)).unwrap();
        let conf = dir.join("containers.conf");
        let text = format!("[network]\nnetwork_config_dir = {networks:?}\n");
        std::fs::write(&conf, text).unwrap();
        let output = Command::new("podman")
            .env("CONTAINERS_CONF", conf)
            .args(["--runtime", "crun", "run", "--detach", "--rm"])
            .args(["--name", "bench-network", "--network", "hull", "--ip"])
            .args([address, "localhost/bench-network", "sh", "-c", SERVE])
            .output()
            .unwrap();
        assert_success(&output, "podman run");
        Self
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = Command::new("podman")
            .args(["rm", "--force", "--time", "0", "bench-network"])
            .output();
    }
}

/// QEMU's microvm with vhost-net, on a tap of the bridge's.
struct Microvm(Child);

impl Microvm {
    fn start(dir: &Path, root: &Path, bridge: &str, address: &str) -> Self {
        let modules = target("kernels/6.12/modules/kernel");
        for module in [
            "drivers/virtio/virtio_mmio.ko",
            "net/core/failover.ko",
            "drivers/net/net_failover.ko",
            "drivers/net/virtio_net.ko",
        ] {
            let name = Path::new(module).file_name().unwrap();
            std::fs::copy(modules.join(module), root.join("tmp").join(name)).unwrap();
        }
        let init = format!(
            "#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in virtio_mmio failover net_failover virtio_net; do insmod /tmp/$module.ko; done
ip link set lo up; ip addr add {address}/22 dev eth0; ip link set eth0 up
{SERVE}
"
        );
        std::fs::write(root.join("init"), init).unwrap();
        sh(
            root,
            "chmod +x init; find . | cpio --quiet -o -H newc > ../initramfs",
        );
        sh(
            dir,
            &format!(
                "modprobe vhost_net; ip tuntap add bench mode tap vnet_hdr && ip link set bench master {bridge} up"
            ),
        );
        // The kernel of these modules: the tuned one has no virtio-mmio.
        let guest = target("guest-6.12");
        let log = std::fs::File::create(dir.join("qemu.log")).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,pic=off,pit=off,rtc=off", "-accel", "kvm"])
            .args([
                "-cpu",
                "host",
                "-m",
                "512",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
            .args([
                "-netdev",
                "tap,id=net,ifname=bench,script=no,downscript=no,vhost=on",
            ])
            .args(["-device", "virtio-net-device,netdev=net"])
            .args(["-append", "console=ttyS0 quiet panic=-1", "-kernel"])
            .arg(guest.join("vmlinux"))
            .arg("-initrd")
            .arg(dir.join("initramfs"))
            .stdin(Stdio::null())
            .stdout(log)
            .spawn()
            .expect("qemu-system-x86_64");
        Self(child)
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = Command::new("ip").args(["link", "del", "bench"]).output();
    }
}

/// What iperf3 says at the end of a run.
fn iperf(address: &str, more: &[&str]) -> Value {
    let mut args = vec!["-J", "-c", address, "-t", SECONDS];
    args.extend(more);
    serde_json::from_str(&run("iperf3", &args)).expect("JSON")
}

/// Mbit/s that arrived.
fn throughput(address: &str, more: &[&str]) -> f64 {
    let end = &iperf(address, more)["end"];
    end["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e6
}

/// Packets of 64 bytes a second that arrived, in thousands.
fn packets(address: &str, more: &[&str]) -> f64 {
    let mut args = vec!["-u", "-b", "0", "-l", "64"];
    args.extend(more);
    let sum = &iperf(address, &args)["end"]["sum"];
    let number = |field| sum[field].as_f64().unwrap();
    (number("packets") - number("lost_packets")) / number("seconds") / 1e3
}

/// Half of the way there and back takes so many µs, in the middle of all.
fn latency(address: &str, protocol: &[&str]) -> f64 {
    let mut args = vec!["ping-pong", "-i", address, "-t", SECONDS];
    args.extend(protocol);
    let said = run("sockperf", &args);
    let line = said
        .lines()
        .find(|line| line.contains("percentile 50.000"))
        .unwrap_or_else(|| panic!("{said}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// An address of a network's only subnet, counted from its end.
fn from_end(network: &Value, n: u32) -> String {
    let subnet = network["subnets"][0]["subnet"].as_str().expect("a subnet");
    let (address, prefix) = subnet.split_once('/').expect("a prefix");
    let first = u32::from(address.parse::<Ipv4Addr>().unwrap());
    let size = 1 << (32 - prefix.parse::<u32>().unwrap());
    Ipv4Addr::from(first + size - n).to_string()
}

type Measure = fn(&str) -> f64;

const MEASURES: [(&str, &str, Measure); 8] = [
    ("TCP into the pod, 1 stream", "Mb/s", |a| throughput(a, &[])),
    ("TCP out of the pod, 1 stream", "Mb/s", |a| {
        throughput(a, &["-R"])
    }),
    ("TCP into the pod, 4 streams", "Mb/s", |a| {
        throughput(a, &["-P", "4"])
    }),
    ("TCP out of the pod, 4 streams", "Mb/s", |a| {
        throughput(a, &["-R", "-P", "4"])
    }),
    ("UDP packets of 64 bytes into the pod", "k/s", |a| {
        packets(a, &[])
    }),
    ("UDP packets of 64 bytes out of the pod", "k/s", |a| {
        packets(a, &["-R"])
    }),
    ("TCP request and response", "us", |a| {
        latency(a, &["--tcp", "-p", "11111"])
    }),
    ("UDP request and response", "us", |a| {
        latency(a, &["-p", "11112"])
    }),
];

/// # Panics
/// When something doesn't serve.
pub fn measure(options: &Options, report: &mut Report) {
    let hull = Hull::without_images();
    let dir = hull.work_dir().to_owned();
    let root = root(&dir);
    sh(
        &root,
        "tar -c . | podman import - localhost/bench-network
podman save --output ../image.tar localhost/bench-network",
    );
    let image = dir.join("image.tar");
    let _ = hull.ok([OsStr::new("load"), image.as_os_str()]);
    let vhost = pod(&hull, "vhost", "on");
    let user = pod(&hull, "user", "off");
    let network = std::fs::read(hull.data_dir().join(DEFINITION)).unwrap();
    let network: Value = serde_json::from_slice(&network).unwrap();
    let bridge = network["network_interface"].as_str().expect("a bridge");
    let (podman, qemu) = (from_end(&network, PODMAN), from_end(&network, QEMU));
    let _container = Container::start(&hull, &dir, &podman);
    let _microvm = Microvm::start(&dir, &root, bridge, &qemu);

    let contender = |name, address: &str| Contender {
        name,
        address: address.to_owned(),
    };
    let address = |pod: &Pod<'_>| {
        pod.inspect()["status"]["podIP"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let contenders = [
        contender("podman, crun", &podman),
        contender("QEMU microvm, vhost-net", &qemu),
        contender("Hull, vhost-net", &address(&vhost)),
        contender("Hull, hull-vmm", &address(&user)),
    ];
    for one in &contenders {
        eventually(one.name, Duration::from_secs(20), || {
            std::net::TcpStream::connect((one.address.as_str(), 5201)).ok()
        });
    }

    for (title, unit, measure) in MEASURES {
        let measured = contenders
            .iter()
            .map(|one| Measured::new(one.name, move |_| measure(&one.address)))
            .collect();
        let rows = interleave(options.rounds(), false, measured);
        report.add(Table::new(title, unit, rows));
    }
}
