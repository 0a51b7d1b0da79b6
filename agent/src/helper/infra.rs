//! infra: the process that holds the pod's network, IPC and UTS namespaces, and on
//! wish its PID namespace, for as long as the pod lives.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::path::PathBuf;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::ForkResult;
use rustix::process::{DumpableBehavior, WaitOptions, set_dumpable_behavior};
use rustix::thread::{UnshareFlags, set_name};
use serde::{Deserialize, Serialize};

/// The name of infra, and of the helper that makes it, in the process list.
pub const NAME: &str = "infra";

/// What infra is to hold.
#[derive(Debug, Serialize, Deserialize)]
pub struct Infra {
    pub hostname: String,
    pub share_pids: bool,
    /// Checked by [`sysctl_path`].
    pub sysctls: BTreeMap<String, String>,
    /// cgroup.procs of infra's cgroup.
    pub cgroup_procs: PathBuf,
}

/// The file of a sysctl that belongs to one of infra's namespaces, else None.
pub fn sysctl_path(name: &str) -> Option<PathBuf> {
    let named = |prefix: &str| name.starts_with(prefix);
    let ipc = named("kernel.shm") || named("kernel.msg") || name == "kernel.sem";
    if !(ipc || named("fs.mqueue.") || named("net.")) {
        return None;
    }
    let plain = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
    };
    if name.len() > 256 || !name.split('.').all(plain) {
        return None;
    }
    Some(PathBuf::from("/proc/sys").join(name.replace('.', "/")))
}

/// The interface that a sysctl belongs to, if that is not there from the beginning.
pub fn sysctl_interface(name: &str) -> Option<&str> {
    let mut parts = name.split('.');
    let [net, family, group] = [parts.next()?, parts.next()?, parts.next()?];
    let interface = parts.next()?;
    parts.next()?;
    let named = net == "net"
        && matches!(family, "ipv4" | "ipv6" | "mpls")
        && matches!(group, "conf" | "neigh")
        && !matches!(interface, "all" | "default" | "lo");
    named.then_some(interface)
}

fn failed<E: Display>(what: impl Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Makes the namespaces that every pod has. This process is in them then.
pub fn make_namespaces() -> Result<(), String> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: no descriptor table is unshared, and this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(failed("making namespaces"))?;
    loopback_up().map_err(failed("bringing the loopback interface up"))
}

/// Makes these namespaces the pod's, and the process in them. Returns its number; it is a child
/// of this helper, and the agent inherits it.
pub fn start(infra: &Infra) -> Result<i32, String> {
    std::fs::write(&infra.cgroup_procs, "0").map_err(failed("entering infra's cgroup"))?;
    if infra.share_pids {
        // SAFETY: as above.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }
            .map_err(failed("making a PID namespace"))?;
    }
    rustix::system::sethostname(infra.hostname.as_bytes())
        .map_err(failed("setting the hostname"))?;
    for (name, value) in &infra.sysctls {
        let path = sysctl_path(name).ok_or(format!("sysctl {name} is not the pod's own"))?;
        std::fs::write(path, value).map_err(failed(format!("setting sysctl {name}")))?;
    }
    // The pod's last process to be killed for want of memory.
    std::fs::write("/proc/self/oom_score_adj", "-998").map_err(failed("protecting infra"))?;

    // SAFETY: this process has one thread, so the child may go on as it likes.
    match unsafe { nix::unistd::fork() }.map_err(failed("starting infra"))? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => hold(),
    }
}

/// Waits for a signal to end, and reaps what a shared PID namespace leaves to its process 1.
fn hold() -> ! {
    // Without these infra still holds the namespaces, which is its work.
    let _ = set_name(c"infra");
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = rustix::process::chdir("/");
    // SAFETY: nothing uses a descriptor of this process from here on.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };

    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    let blocked = signals.thread_block();
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        match blocked.and_then(|()| signals.wait()) {
            Ok(Signal::SIGTERM | Signal::SIGINT) => std::process::exit(0),
            Ok(_) => {}
            // Never: but spinning would be worse than the pod's end.
            Err(_) => std::process::exit(1),
        }
    }
}

fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call.
    let result = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SIOCSIFFLAGS,
            &raw const request,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_of_an_interface_name_it() {
        assert_eq!(
            sysctl_interface("net.ipv4.conf.eth0.rp_filter"),
            Some("eth0")
        );
        assert_eq!(
            sysctl_interface("net.ipv6.neigh.net1.retrans_time_ms"),
            Some("net1")
        );
        for name in [
            "net.ipv4.conf.all.forwarding",
            "net.ipv6.conf.default.accept_ra",
            "net.ipv4.neigh.lo.base_reachable_time",
            "net.ipv4.conf.eth0",
            "net.ipv4.tcp_syncookies",
            "net.core.somaxconn",
            "kernel.shmmax",
        ] {
            assert_eq!(sysctl_interface(name), None, "{name}");
        }
    }

    #[test]
    fn only_the_pods_own_sysctls_have_a_path() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_unprivileged_port_start"),
            Some("/proc/sys/net/ipv4/ip_unprivileged_port_start".into())
        );
        assert!(sysctl_path("kernel.shmmax").is_some());
        for name in [
            "kernel.core_pattern",
            "vm.swappiness",
            "net.",
            "net..x",
            "net./../kernel.core_pattern",
            "net.ipv4/../../kernel/core_pattern",
            "",
        ] {
            assert_eq!(sysctl_path(name), None, "{name}");
        }
    }
}
