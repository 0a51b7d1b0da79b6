//! Linux's own network driver on a tap of the host's, served by `hull-vmm` and by the host's kernel.
//!
//! Needs, besides what all of these tests need, `/dev/net/tun` and `/dev/vhost-net`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hull_machine::client::{Machine, MachineSpec, NetSpec, Tap};
use hull_machine::config::NetLimits;
use hull_machine::control::ExitReason;

use super::guest::{image, spec};

/// Generous: emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(300);
const PAIRS: usize = 2;

/// Waits for the link, and sends a megabyte to the host, which sends it back.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/load); do
    insmod "/modules/$module"
done
exec > /dev/hvc0 2>&1

net=/sys/class/net/eth0
ifconfig eth0 HOST.2 netmask 255.255.255.0 up
echo "eth0: $(cat $net/address) $(cat $net/mtu) $(ls $net/queues | wc -l)"
echo "carrier: $(cat $net/carrier)"
until [ "$(cat $net/carrier)" = 1 ]; do sleep 0.1; done
ping -c 2 -w 60 HOST.1 > /dev/null && echo 'ping: answered'
yes 'a line of the pattern' | head -c 1048576 > /pattern
nc HOST.1 7 < /pattern > /back
cmp /pattern /back && echo 'echo: same'
ifconfig eth0 down
ifconfig eth0 hw ether 02:00:00:00:00:99 up && echo "taken: $(cat $net/address)"
ping -c 2 -w 60 HOST.1 > /dev/null && echo 'ping: answered again'
poweroff -f
"#;

/// The queues of a new tap with an address. It is gone when they are closed.
fn tap(name: &str, host: &str) -> Vec<OwnedFd> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let queues = (0..PAIRS)
        .map(|_| {
            let tun = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .unwrap();
            // SAFETY: all zeroes is an `ifreq`.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from.cast_signed();
            }
            request.ifr_ifru.ifru_flags = flags.try_into().unwrap();
            // SAFETY: the request reads and writes an `ifreq`, which outlives it.
            let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &request) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
            tun.into()
        })
        .collect();
    let address = format!("{host}.1");
    let status = Command::new("/bin/busybox")
        .args(["ifconfig", name, &address, "netmask", "255.255.255.0", "up"])
        .status()
        .unwrap();
    assert!(status.success());
    queues
}

/// Sends one client back what it has sent.
fn echo_once(host: &str) {
    let listener = TcpListener::bind(format!("{host}.1:7")).unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut data = Vec::new();
        client.read_to_end(&mut data).unwrap();
        client.write_all(&data).unwrap();
    });
}

fn machine(host: &str, tap: Option<Tap>) -> (MachineSpec, File) {
    let image = image("6.12");
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, &INIT.replace("HOST", host), "");
    let net = NetSpec {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1400,
        queue_pairs: u8::try_from(PAIRS).unwrap(),
        tap,
        limits: NetLimits::default(),
    };
    (spec.vcpus(2).net(net), console)
}

/// Names of the machine's threads.
fn threads(machine: &Machine) -> Vec<String> {
    fs::read_dir(format!("/proc/{}/task", machine.pid()))
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap())
        .collect()
}

/// Runs a machine to its end, and brings its tap when it says that it has none. Returns what it has said, and its
/// threads' names when its packets came through.
fn run(spec: MachineSpec, console: File, mut late: Option<Tap>) -> (String, Vec<String>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let binary = Path::new(env!("CARGO_BIN_EXE_hull-vmm"));
        let (machine, _) = Machine::launch(binary, spec).await.unwrap();
        let (said, mut lines) = tokio::sync::mpsc::unbounded_channel();
        tokio::task::spawn_blocking(move || {
            for line in BufReader::new(console).lines() {
                said.send(line.unwrap()).unwrap();
            }
        });
        let mut all = String::new();
        let mut names = Vec::new();
        let follow = async {
            while let Some(line) = lines.recv().await {
                println!("{line}");
                if line.starts_with("carrier: 0") {
                    let tap = late.take().expect("the link is up from the start");
                    machine.plug_net(0, tap).await.unwrap();
                }
                if line.starts_with("echo: ") {
                    names = threads(&machine);
                }
                all.push_str(&line);
                all.push('\n');
            }
        };
        let follow = async {
            follow.await;
            machine.wait().await
        };
        let reason = tokio::time::timeout(PATIENCE, follow).await;
        assert_eq!(reason, Ok(ExitReason::PowerOff));
        (all, names)
    })
}

#[track_caller]
fn assert_said(said: &str) {
    for line in [
        "eth0: 02:00:00:00:00:01 1400 4",
        "ping: answered",
        "echo: same",
        "taken: 02:00:00:00:00:99",
        "ping: answered again",
    ] {
        assert!(said.contains(line), "{line:?} is missing");
    }
}

#[test]
#[ignore = "needs KVM"]
fn packets_go_through_hull_vmm() {
    let queues = tap("hulltest0", "10.111.0");
    echo_once("10.111.0");
    let tap = Tap {
        queues,
        vhost: Vec::new(),
    };
    let (spec, console) = machine("10.111.0", Some(tap));

    let (said, threads) = run(spec, console, None);

    assert_said(&said);
    assert!(said.contains("carrier: 1"));
    assert!(!threads.iter().any(|name| name.starts_with("vhost")));
}

#[test]
#[ignore = "needs KVM"]
fn packets_go_through_the_kernel_of_a_tap_plugged_late() {
    let queues = tap("hulltest1", "10.111.1");
    echo_once("10.111.1");
    let open = |_| {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/vhost-net")
    };
    let tap = Tap {
        queues,
        vhost: (0..PAIRS).map(|pair| open(pair).unwrap().into()).collect(),
    };
    let (spec, console) = machine("10.111.1", None);

    let (said, threads) = run(spec, console, Some(tap));

    assert_said(&said);
    assert!(said.contains("carrier: 0"));
    assert!(threads.iter().any(|name| name.starts_with("vhost")));
}
