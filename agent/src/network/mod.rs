//! infra's network: interfaces, addresses, routes and neighbours, made as the supervisor says;
//! and connections to ports in it.
//!
//! What the agent makes in infra's network carries [`ORIGIN`], so that a later call can tell it
//! from what the kernel and the containers have made, which stays.
//!
//! Whoever enters a network namespace does it on a thread of its own, which ends with the work:
//! a worker of the runtime goes on to other tasks.

mod addresses;
mod channels;
mod devices;
pub mod forward;
mod links;
mod neighbours;
mod netlink;
mod plan;
mod routes;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use rtnetlink::packet_route::AddressFamily;
use tokio::sync::oneshot;

use crate::error::{Doing, Error, Result};
use crate::helper::infra::{sysctl_interface, sysctl_path};
use crate::process::Process;

use links::DeviceOf;
use netlink::Netlink;
use plan::Interface;
pub use plan::Plan;

/// The origin ("protocol") of addresses, routes and neighbours that the agent has made.
/// Known to nobody else; values below 16 are the kernel's own, and routing daemons have
/// theirs in rtnetlink.h.
const ORIGIN: u8 = 72;

/// The calling thread's network namespace.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Makes infra's network what the plan says. `sysctls` are those that name an interface.
pub async fn configure(
    infra: &Process,
    plan: Plan,
    sysctls: BTreeMap<String, String>,
) -> Result<()> {
    let infra = infra.clone();
    on_own_thread(move || {
        let devices = devices::network_devices(Path::new(devices::SYSFS))?;
        block_on(async {
            let home = Netlink::open().doing(|| "opening netlink".into())?;
            infra
                .enter_network()
                .doing(|| "entering infra's network".into())?;
            let device_of = |message: &_| {
                let name = links::virtio_device(message)?;
                devices.iter().position(|device| device == name)
            };
            apply(plan, &sysctls, &device_of, &home).await
        })
    })
    .await
}

/// Applies a plan in the calling thread's namespace, taking interfaces from `home`.
async fn apply(
    mut plan: Plan,
    sysctls: &BTreeMap<String, String>,
    device_of: DeviceOf<'_>,
    home: &Netlink,
) -> Result<()> {
    let pod = Netlink::open().doing(|| "opening netlink in infra's network".into())?;
    let namespace = File::open(OWN_NAMESPACE).doing(|| format!("opening {OWN_NAMESPACE}"))?;
    let indexes = links::bring(&plan.interfaces, device_of, home, &pod, namespace.as_fd()).await?;
    for Interface { name, .. } in &plan.interfaces {
        channels::use_all(name)?;
    }
    // They may decide what the interface does when it comes up.
    ignore_routers(&plan.interfaces, sysctls)?;
    set_sysctls(sysctls)?;
    // A sysctl of the pod may have turned IPv6 off. Elsewhere it is set after the addresses, and
    // takes them away.
    plan.disable_ipv6(ipv6_is_disabled);
    addresses::apply(&plan.interfaces, &indexes, &pod).await?;
    links::bring_up(&plan.interfaces, device_of, &pod).await?;
    routes::apply(&plan.routes, &indexes, &pod).await?;
    neighbours::apply(&plan.neighbours, &indexes, &pod).await
}

/// Addresses and routes come from the plan, so no router of the network gives the pod others, but
/// where a sysctl of the pod's own has it so.
fn ignore_routers(interfaces: &[Interface], sysctls: &BTreeMap<String, String>) -> Result<()> {
    for Interface { name, .. } in interfaces {
        for setting in ["accept_ra", "autoconf"] {
            if sysctls.contains_key(&format!("net.ipv6.conf.{name}.{setting}")) {
                continue;
            }
            match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), "0") {
                // No IPv6, in the guest or with so small an MTU.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                written => written.doing(|| format!("turning {setting} of {name} off"))?,
            }
        }
    }
    Ok(())
}

fn set_sysctls(sysctls: &BTreeMap<String, String>) -> Result<()> {
    for (name, value) in sysctls {
        let path = sysctl_path(name)
            .ok_or_else(|| Error::Invalid(format!("sysctl {name} is not the pod's own")))?;
        fs::write(path, value).doing(|| match sysctl_interface(name) {
            Some(interface) => format!("setting sysctl {name} of interface {interface}"),
            None => format!("setting sysctl {name}"),
        })?;
    }
    Ok(())
}

/// Whether IPv6 is turned off on an interface of the calling thread's namespace.
fn ipv6_is_disabled(interface: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    // Where that can't be read, an address will say what is wrong.
    fs::read_to_string(path).is_ok_and(|value| value.trim() == "1")
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Runs work that enters a namespace.
async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, done) = oneshot::channel();
    std::thread::Builder::new()
        .name("network".into())
        .spawn(move || {
            // Only who waits no longer does not take it.
            let _ = sender.send(work());
        })
        .doing(|| "starting a thread".into())?;
    done.await
        .map_err(|_| Error::State("the agent failed in infra's network".into()))?
}

/// Runs `work` to its end on the calling thread and no other.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .doing(|| "making a runtime".into())?
        .block_on(work)
}
