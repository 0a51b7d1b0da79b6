//! Interfaces: taken from the agent's own namespace, named, and made as planned.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::netlink::Netlink;
use super::plan::{Interface, Mac};
use crate::error::{Doing, Error, Result};

/// An interface as it is.
#[derive(Clone, Debug)]
struct Link {
    index: u32,
    name: String,
    mac: Option<Mac>,
    mtu: u32,
    up: bool,
    /// Position among the machine's virtio-net devices.
    device: Option<usize>,
}

/// Tells which of the machine's devices an interface belongs to.
pub type DeviceOf<'a> = &'a (dyn Fn(&LinkMessage) -> Option<usize> + Sync);

/// The name of the device under an interface, on the virtio bus.
pub fn virtio_device(message: &LinkMessage) -> Option<&str> {
    let mut on_virtio = false;
    let mut name = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::ParentDevBusName(bus) => on_virtio = bus == "virtio",
            LinkAttribute::ParentDevName(device) => name = Some(device.as_str()),
            _ => {}
        }
    }
    name.filter(|_| on_virtio)
}

/// Brings the planned interfaces into the pod's namespace and gives them their names,
/// hardware addresses and MTUs. Returns their indexes by name. A new one is down.
pub async fn bring(
    planned: &[Interface],
    device_of: DeviceOf<'_>,
    home: &Netlink,
    pod: &Netlink,
    namespace: BorrowedFd<'_>,
) -> Result<HashMap<String, u32>> {
    let there = list(pod, device_of).await?;
    let misplaced = |interface: &&Interface| {
        there
            .iter()
            .all(|link| link.device != Some(interface.device))
    };
    let missing: Vec<&Interface> = planned.iter().filter(misplaced).collect();
    if !missing.is_empty() {
        let candidates = list(home, device_of).await?;
        for interface in missing {
            let link = find(&candidates, interface)?;
            move_to(home, link, namespace, interface).await?;
        }
    }

    let there = list(pod, device_of).await?;
    // Names may have been exchanged, so all that change are free before any is taken.
    for interface in planned {
        let link = find(&there, interface)?;
        if link.name != interface.name && link.name != passing_name(interface) {
            rename(pod, link, passing_name(interface)).await?;
        }
    }
    let mut indexes = HashMap::new();
    for interface in planned {
        let link = find(&there, interface)?;
        if link.name != interface.name {
            rename(pod, link, interface.name.clone()).await?;
        }
        shape(pod, link, interface).await?;
        indexes.insert(interface.name.clone(), link.index);
    }
    Ok(indexes)
}

/// Brings the interfaces up that are not.
pub async fn bring_up(planned: &[Interface], device_of: DeviceOf<'_>, pod: &Netlink) -> Result<()> {
    let there = list(pod, device_of).await?;
    for interface in planned {
        let link = find(&there, interface)?;
        if !link.up {
            set(pod, change_of(link, LinkFlags::Up, LinkFlags::Up))
                .await
                .doing(|| format!("bringing interface {} up", interface.name))?;
        }
    }
    Ok(())
}

/// A name that no manifest's interface needs, for as long as its own is not free.
fn passing_name(interface: &Interface) -> String {
    format!("hull-device{}", interface.device)
}

fn find<'a>(links: &'a [Link], interface: &Interface) -> Result<&'a Link> {
    links
        .iter()
        .find(|link| link.device == Some(interface.device))
        .ok_or_else(|| Error::NotFound {
            kind: "network device",
            id: format!("{} for interface {}", interface.device, interface.name),
        })
}

async fn list(netlink: &Netlink, device_of: DeviceOf<'_>) -> Result<Vec<Link>> {
    let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
    netlink
        .list(message, |answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Link::new(&message, device_of),
            _ => None,
        })
        .await
        .doing(|| "listing interfaces".into())
}

impl Link {
    fn new(message: &LinkMessage, device_of: DeviceOf<'_>) -> Option<Self> {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            device: device_of(message),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => link.mac = Mac::try_from(mac.as_slice()).ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                _ => {}
            }
        }
        (!link.name.is_empty()).then_some(link)
    }
}

fn change_of(link: &Link, flags: LinkFlags, mask: LinkFlags) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = flags;
    message.header.change_mask = mask;
    message
}

async fn set(netlink: &Netlink, message: LinkMessage) -> std::io::Result<()> {
    netlink
        .change(RouteNetlinkMessage::SetLink(message), 0)
        .await
}

/// An interface that is down can be renamed by every kernel.
async fn rename(netlink: &Netlink, link: &Link, name: String) -> Result<()> {
    let doing = || format!("renaming interface {} to {name}", link.name);
    if link.up {
        set(netlink, change_of(link, LinkFlags::empty(), LinkFlags::Up))
            .await
            .doing(doing)?;
    }
    let mut message = change_of(link, LinkFlags::empty(), LinkFlags::empty());
    message.attributes.push(LinkAttribute::IfName(name.clone()));
    set(netlink, message).await.doing(doing)
}

async fn move_to(
    home: &Netlink,
    link: &Link,
    namespace: BorrowedFd<'_>,
    interface: &Interface,
) -> Result<()> {
    // In the pod another may have the name that the kernel gave this one.
    rename(home, link, passing_name(interface)).await?;
    let mut message = change_of(link, LinkFlags::empty(), LinkFlags::empty());
    message
        .attributes
        .push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    set(home, message)
        .await
        .doing(|| format!("moving interface {} into infra's network", interface.name))
}

async fn shape(pod: &Netlink, link: &Link, interface: &Interface) -> Result<()> {
    let name = &interface.name;
    let mut message = change_of(link, LinkFlags::empty(), LinkFlags::empty());
    if link.mac != Some(interface.mac) {
        if link.up {
            // In a restored machine. The kernel makes its own IPv6 address of the hardware's, when the interface comes up.
            set(pod, change_of(link, LinkFlags::empty(), LinkFlags::Up))
                .await
                .doing(|| format!("taking interface {name} down"))?;
        }
        message
            .attributes
            .push(LinkAttribute::Address(interface.mac.into()));
        set(pod, message.clone())
            .await
            .doing(|| format!("setting the hardware address of interface {name}"))?;
        message.attributes.clear();
    }
    if link.mtu != interface.mtu {
        message.attributes.push(LinkAttribute::Mtu(interface.mtu));
        set(pod, message)
            .await
            .doing(|| format!("setting the MTU of interface {name} to {}", interface.mtu))?;
    }
    Ok(())
}
