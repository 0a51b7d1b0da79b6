//! Network interfaces on taps in a network namespace of the test's own, served by `hull-vmm` and by the host's kernel.
//!
//! Needs, besides what all of these tests need, `/dev/net/tun` and `/dev/vhost-net`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hull_machine::client::{Machine, NetSpec, PlugError};
use hull_machine::config::{DirectionLimits, NetLimits, RateLimit, TapDescriptors};
use hull_machine::control::{ExitReason, PlugRefused};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::MIB;
use crate::guest::{image, run_beside, spec};

/// Queue pairs, and processors, of which each uses one.
const PAIRS: u8 = 2;
/// Bytes that the second interface lets through in a second, and bytes that go through it.
const RATE: u64 = 50_000;
const LIMITED: usize = 200_000;

/// MiB of memory that are added.
const ADDED: u64 = 256;

/// Talks over `eth0`, and waits for `eth1`.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
# Most of the packets and, once it is bound again, all of the interface is in memory that is added.
echo online > /sys/devices/system/memory/auto_online_blocks
for module in $(cat /modules/load 2> /dev/null); do
    insmod "/modules/$module"
done
dmesg -n 1
exec > /dev/hvc0 2>&1

say() {
    net=/sys/class/net/$1
    echo "$1: $(cat $net/address) $(cat $net/mtu) $(cat $net/carrier) $(ls $net/queues | wc -l)"
}
ip link set eth0 up
ip addr add 10.0.0.2/24 dev eth0
ip link set eth1 up
ip addr add 10.1.0.2/24 dev eth1
say eth0
say eth1

yes 'a line of the pattern' | head -c 1048576 > /pattern
nc 10.0.0.1 7000 < /dev/null > /back
cmp /pattern /back && echo 'received: same'
nc 10.0.0.1 7001 < /pattern > /dev/null
ping -c 3 -s 8000 10.0.0.1 > /dev/null && echo 'echo: answered'

# The host plugs a tap when it is asked to.
nc 10.0.0.1 7002 < /dev/null
until [ "$(cat /sys/class/net/eth1/carrier)" = 1 ]; do sleep 1; done
say eth1
nc 10.1.0.1 7003 < /dev/null > /limited
nc 10.0.0.1 7003 < /dev/null
echo "plugged: $(wc -c < /limited)"

# Linux leaves the buffers to the device then, and posts no more.
nc 10.0.0.1 7005 < /dev/null
ip link set eth0 down
sleep 6
ip link set eth0 address 02:00:00:00:00:99 up
say eth0
ping -c 3 10.0.0.1 > /dev/null && echo 'echo: answered with another address'

device=$(readlink -f /sys/class/net/eth0/device/..)
echo ${device##*/} > /sys/bus/pci/drivers/virtio-pci/unbind
echo ${device##*/} > /sys/bus/pci/drivers/virtio-pci/bind
ip link set eth0 up
ip addr add 10.0.0.2/24 dev eth0
nc 10.0.0.1 7004 < /dev/null && echo 'rebound: connected'

# The host removes the tap then, and brings another when it hears that this is seen.
until [ "$(cat /sys/class/net/eth0/carrier)" = 0 ]; do sleep 1; done
nc 10.1.0.1 7006 < /dev/null
until [ "$(cat /sys/class/net/eth0/carrier)" = 1 ]; do sleep 1; done
ping -c 3 10.0.0.1 > /dev/null && echo 'echo: answered by another tap'
poweroff -f
"#;

fn pattern() -> Vec<u8> {
    let mut pattern = b"a line of the pattern\n".repeat(MIB / 22 + 1);
    pattern.truncate(MIB);
    pattern
}

/// Who moves packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    HullVmm,
    /// Where there are no limits.
    Kernel,
}

/// A tap with an address, in the calling thread's network namespace.
fn tap(name: &str, address: &str, server: Server) -> TapDescriptors {
    let queues = (0..PAIRS).map(|_| queue(name)).collect();
    // The same for each with this IP address, which the guest may have in its cache of neighbours.
    let mac = format!("02:00:00:00:01:{:02}", address.as_bytes()[3] - b'0');
    ip(&["link", "set", name, "address", &mac]);
    ip(&["addr", "add", address, "dev", name]);
    ip(&["link", "set", name, "up"]);
    let vhost = match server {
        Server::HullVmm => 0,
        Server::Kernel => PAIRS,
    };
    TapDescriptors {
        queues,
        vhost: (0..vhost).map(|_| open("/dev/vhost-net").into()).collect(),
    }
}

fn queue(name: &str) -> OwnedFd {
    let tap = open("/dev/net/tun");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&u16::try_from(flags).unwrap().to_le_bytes());
    // SAFETY: the request is as long as a `struct ifreq`, and outlives the call.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    tap.into()
}

fn open(device: &str) -> File {
    File::options().read(true).write(true).open(device).unwrap()
}

fn ip(arguments: &[&str]) {
    assert!(
        Command::new("ip")
            .args(arguments)
            .status()
            .unwrap()
            .success()
    );
}

/// Takes one connection to a port.
fn once<T: Send + 'static>(
    port: u16,
    talk: impl FnOnce(std::net::TcpStream) -> T + Send + 'static,
) -> JoinHandle<T> {
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    std::thread::spawn(move || talk(listener.accept().unwrap().0))
}

/// Sends datagrams for some seconds after a connection, more than buffers and the tap hold.
fn flood() -> JoinHandle<()> {
    once(7005, |stream| {
        drop(stream);
        let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(5) {
            // There may be no room.
            let _ = socket.send_to(&[0; 1000], "10.0.0.2:9");
        }
    })
}

/// Sends to one connection what the second interface lets through in some seconds. Gives how long that took, until the
/// guest connects again.
fn send_limited() -> JoinHandle<Duration> {
    let listener = TcpListener::bind(("0.0.0.0", 7003)).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let started = Instant::now();
        stream.write_all(&[7; LIMITED]).unwrap();
        drop(stream);
        listener.accept().unwrap();
        started.elapsed()
    })
}

fn interface(last_byte: u8, mtu: u16, limits: NetLimits) -> NetSpec {
    NetSpec {
        udp_segmentation: true,
        mac: [2, 0, 0, 0, 0, last_byte],
        mtu,
        queue_pairs: PAIRS,
        limits,
    }
}

fn limits() -> NetLimits {
    NetLimits {
        receive: DirectionLimits {
            bandwidth: Some(RateLimit {
                per_second: NonZeroU64::new(RATE).unwrap(),
                burst: 1,
            }),
            packets: None,
        },
        transmit: DirectionLimits::default(),
    }
}

/// How many queue pairs the kernel serves.
fn kernel_threads(machine: &Machine) -> usize {
    fs::read_dir(format!("/proc/{}/task", machine.pid()))
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap())
        .filter(|name| name.starts_with("vhost"))
        .count()
}

#[track_caller]
fn assert_works(kernel: &'static str, server: Server) {
    // The namespace is the thread's, and of the threads and processes that it makes.
    std::thread::spawn(move || talk(kernel, server))
        .join()
        .unwrap();
}

fn talk(kernel: &str, server: Server) {
    // SAFETY: nothing in this process counts on sharing a network namespace with this thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    let image = image(kernel);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, "");
    let first = tap("first", "10.0.0.1/24", server);
    let spec = spec
        .vcpus(PAIRS)
        .memory_device(ADDED)
        .net(interface(10, 1500, NetLimits::default()), Some(first))
        .net(interface(11, 9000, limits()), None);
    let second = tap("second", "10.1.0.1/24", server);
    let sends = once(7000, |mut stream| stream.write_all(&pattern()).unwrap());
    let receives = once(7001, |mut stream| {
        let mut data = vec![0; MIB];
        stream.read_exact(&mut data).unwrap();
        data
    });
    let asked = once(7002, drop);
    let limited = send_limited();
    let flooded = flood();
    let rebound = once(7004, drop);
    let lost = once(7006, drop);
    let (mut served, mut took) = (Vec::new(), Duration::ZERO);

    let (reason, said) = run_beside(spec, console, async |machine| {
        machine.resize_memory(ADDED).await.unwrap();
        joined(asked).await;
        let added = machine.added_memory().await.unwrap();
        assert_eq!(added.plugged_mib, ADDED);
        served.push(kernel_threads(machine));
        let wrong = machine.plug_net(1, TapDescriptors::default()).await;
        machine.plug_net(1, second).await.unwrap();
        let taken = machine.plug_net(1, TapDescriptors::default()).await;
        let missing = machine.plug_net(2, TapDescriptors::default()).await;
        assert_eq!(refusal(wrong), Some(PlugRefused::Descriptors));
        assert_eq!(refusal(taken), Some(PlugRefused::Plugged));
        assert_eq!(refusal(missing), Some(PlugRefused::NoInterface));
        took = joined(limited).await;
        served.push(kernel_threads(machine));

        joined(rebound).await;
        ip(&["link", "delete", "first"]);
        joined(lost).await;
        served.push(kernel_threads(machine));
        let third = tap("third", "10.0.0.1/24", server);
        machine.plug_net(0, third).await.unwrap();
    });

    assert_eq!(reason, ExitReason::PowerOff);
    for line in [
        "eth0: 02:00:00:00:00:0a 1500 1 4",
        "eth1: 02:00:00:00:00:0b 9000 0 4",
        "received: same",
        "echo: answered",
        "eth1: 02:00:00:00:00:0b 9000 1 4",
        &format!("plugged: {LIMITED}"),
        "eth0: 02:00:00:00:00:99 1500 1 4",
        "echo: answered with another address",
        "rebound: connected",
        "echo: answered by another tap",
    ] {
        assert!(said.contains(line), "{line:?} is missing");
    }
    sends.join().unwrap();
    assert!(receives.join().unwrap() == pattern());
    flooded.join().unwrap();
    let seconds = LIMITED as u64 / RATE;
    assert!(took >= Duration::from_secs(seconds), "{took:?}");
    // The limited interface is never the kernel's.
    let pairs = if server == Server::Kernel {
        usize::from(PAIRS)
    } else {
        0
    };
    assert_eq!(served, [pairs, pairs, 0]);
}

async fn joined<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    tokio::task::spawn_blocking(|| thread.join())
        .await
        .unwrap()
        .unwrap()
}

fn refusal(result: Result<(), PlugError>) -> Option<PlugRefused> {
    match result {
        Err(PlugError::Refused { source, .. }) => Some(source),
        _ => None,
    }
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_talks_over_interfaces_that_hull_vmm_serves() {
    assert_works("default", Server::HullVmm);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_talks_over_interfaces_that_hull_vmm_serves() {
    assert_works("6.1", Server::HullVmm);
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_talks_over_interfaces_that_the_kernel_serves() {
    assert_works("default", Server::Kernel);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_talks_over_interfaces_that_the_kernel_serves() {
    assert_works("6.1", Server::Kernel);
}
