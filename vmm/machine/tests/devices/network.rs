//! Network interfaces on taps in a network namespace of the test's own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread::JoinHandle;

use hull_machine::client::PlugError;
use hull_machine::control::{ExitReason, PlugRefused};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::MIB;
use crate::guest::{image, run_beside, spec};

/// Talks over `eth0`, and waits for `eth1`.
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
dmesg -n 1
exec > /dev/hvc0 2>&1

say() { echo "$1: $(cat /sys/class/net/$1/address) $(cat /sys/class/net/$1/mtu) $(cat /sys/class/net/$1/carrier)"; }
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
nc 10.1.0.1 7003 < /dev/null && echo 'plugged: connected'

device=$(readlink -f /sys/class/net/eth0/device/..)
echo ${device##*/} > /sys/bus/pci/drivers/virtio-pci/unbind
echo ${device##*/} > /sys/bus/pci/drivers/virtio-pci/bind
ip link set eth0 up
ip addr add 10.0.0.2/24 dev eth0
nc 10.0.0.1 7004 < /dev/null && echo 'rebound: connected'
poweroff -f
"#;

fn pattern() -> Vec<u8> {
    let mut pattern = b"a line of the pattern\n".repeat(MIB / 22 + 1);
    pattern.truncate(MIB);
    pattern
}

/// A tap with an address, in the calling thread's network namespace.
fn tap(name: &str, address: &str) -> OwnedFd {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&u16::try_from(flags).unwrap().to_le_bytes());
    // SAFETY: the request is as long as a `struct ifreq`, and outlives the call.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    ip(&["addr", "add", address, "dev", name]);
    ip(&["link", "set", name, "up"]);
    tap.into()
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

#[track_caller]
fn assert_works(series: &'static str) {
    // The namespace is the thread's, and of the threads and processes that it makes.
    std::thread::spawn(|| talk(series)).join().unwrap();
}

fn talk(series: &str) {
    // SAFETY: nothing in this process counts on sharing a network namespace with this thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    let image = image(series);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, "");
    let spec = spec
        .net([2, 0, 0, 0, 0, 10], 1500, Some(tap("first", "10.0.0.1/24")))
        .net([2, 0, 0, 0, 0, 11], 9000, None);
    let second = tap("second", "10.1.0.1/24");
    let spare = second.try_clone().unwrap();
    let sends = once(7000, |mut stream| stream.write_all(&pattern()).unwrap());
    let receives = once(7001, |mut stream| {
        let mut data = vec![0; MIB];
        stream.read_exact(&mut data).unwrap();
        data
    });
    let asked = once(7002, drop);
    let connects = [once(7003, drop), once(7004, drop)];

    let (reason, said) = run_beside(spec, console, async move |machine| {
        tokio::task::spawn_blocking(|| asked.join())
            .await
            .unwrap()
            .unwrap();
        machine.plug_net(1, second).await.unwrap();
        let taken = machine.plug_net(1, spare.try_clone().unwrap()).await;
        let missing = machine.plug_net(2, spare).await;
        assert_eq!(refusal(taken), Some(PlugRefused::Plugged));
        assert_eq!(refusal(missing), Some(PlugRefused::NoInterface));
    });

    assert_eq!(reason, ExitReason::PowerOff);
    for line in [
        "eth0: 02:00:00:00:00:0a 1500 1",
        "eth1: 02:00:00:00:00:0b 9000 0",
        "received: same",
        "echo: answered",
        "eth1: 02:00:00:00:00:0b 9000 1",
        "plugged: connected",
        "rebound: connected",
    ] {
        assert!(said.contains(line), "{line:?} is missing");
    }
    sends.join().unwrap();
    assert!(receives.join().unwrap() == pattern());
    for connect in connects {
        connect.join().unwrap();
    }
}

fn refusal(result: Result<(), PlugError>) -> Option<PlugRefused> {
    match result {
        Err(PlugError::Refused { source, .. }) => Some(source),
        _ => None,
    }
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_talks_over_its_interfaces() {
    assert_works("6.12");
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_talks_over_its_interfaces() {
    assert_works("6.1");
}
