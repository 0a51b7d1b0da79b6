//! A host's network, a pod's namespace with an interface to it, and guests.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hull_pod::agent::network::Plan;
use hull_pod::network::{Namespace, Plug};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub const HOST_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
pub const GUEST_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
pub const HOST_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
pub const GUEST_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));

/// Two namespaces and a veth pair between them, wired as CNI does it.
pub struct World {
    /// Stands for the host's: `host-eth0` is the other end of the pod's `eth0`.
    pub host: Namespace,
    pub pod: Namespace,
}

impl World {
    pub async fn new() -> Self {
        let world = Self {
            host: Namespace::create().await.unwrap(),
            pod: Namespace::create().await.unwrap(),
        };
        world.wire("eth0", "10.0.0.2/24", "10.0.0.1/24");
        ip(&world.pod, "link set eth0 mtu 1450");
        ip(&world.pod, "address add fd00::2/64 dev eth0 nodad");
        ip(&world.host, "address add fd00::1/64 dev host-eth0 nodad");
        ip(&world.pod, "route add default via 10.0.0.1");
        ip(&world.pod, "route add default via fd00::1");
        world
    }

    /// Adds an interface to the pod.
    pub fn wire(&self, name: &str, of_pod: &str, of_host: &str) {
        let there = self.host.path();
        let there = there.display();
        ip(
            &self.pod,
            &format!("link add {name} type veth peer name host-{name} netns {there}"),
        );
        ip(&self.pod, &format!("address add {of_pod} dev {name}"));
        ip(
            &self.host,
            &format!("address add {of_host} dev host-{name}"),
        );
        ip(&self.host, &format!("link set host-{name} up"));
        ip(&self.pod, &format!("link set {name} up"));
    }
}

/// A guest with one interface. Its kernel is this one; what would be its machine copies packets.
pub struct Guest {
    pub namespace: Namespace,
    stop: Arc<AtomicBool>,
    machine: Option<JoinHandle<()>>,
}

impl Guest {
    /// Does what the agent and `hull-vmm` do.
    pub async fn start(plan: &Plan, plug: &Plug) -> Self {
        let namespace = Namespace::create().await.unwrap();
        let interface = &plan.interfaces[0];
        let name = &interface.name;
        let device = inside(&namespace, || Ok(crate::frames::tap(name))).unwrap();
        let [a, b, c, d, e, f] = interface.mac;
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let mtu = interface.mtu;
        ip(
            &namespace,
            &format!("link set {name} address {mac} mtu {mtu} up"),
        );
        for address in &interface.addresses {
            let (address, prefix) = (address.ip, address.prefix);
            ip(
                &namespace,
                &format!("address add {address}/{prefix} dev {name}"),
            );
        }
        let stop = Arc::new(AtomicBool::new(false));
        let queue = plug.queues[0].try_clone().unwrap();
        let machine = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || copy(&queue, &device, &stop))
        };
        let guest = Self {
            namespace,
            stop,
            machine: Some(machine),
        };
        guest.wait_for_addresses().await;
        guest
    }

    /// Until it has asked whether someone else has its IPv6 addresses, and nobody had.
    async fn wait_for_addresses(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        while !ip(&self.namespace, "-6 address show tentative").is_empty() {
            assert!(Instant::now() < end, "an address is still tentative");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(machine) = self.machine.take() {
            let _ = machine.join();
        }
    }
}

/// Copies packets both ways.
fn copy(queue: &OwnedFd, device: &OwnedFd, stop: &AtomicBool) {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    let mut packet = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let mut ready = [
            PollFd::new(queue, PollFlags::IN),
            PollFd::new(device, PollFlags::IN),
        ];
        poll(&mut ready, Some(&timeout)).unwrap();
        for (from, to) in [(queue, device), (device, queue)] {
            while let Ok(length) = rustix::io::read(from, &mut packet[..]) {
                rustix::io::write(to, &packet[..length]).unwrap();
            }
        }
    }
}

/// Runs something on a thread in a namespace.
pub fn inside<T: Send>(
    namespace: &Namespace,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let file = File::open(namespace.path())?;
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            })
            .join()
            .unwrap()
    })
}

pub fn ip(namespace: &Namespace, arguments: &str) -> String {
    output(namespace, "ip", arguments)
}

/// What a program says that runs in a namespace, which it finds by its path.
pub fn output(namespace: &Namespace, program: &str, arguments: &str) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", namespace.path().display()))
        .arg(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {said}");
    String::from_utf8(output.stdout).unwrap()
}
