//! A tap beside each interface, and the traffic between them.

use std::io;
use std::os::fd::OwnedFd;

use rtnetlink::LinkUnspec;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage,
};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::filter::{self, Rule};
use super::kind::tap_name;
use super::netlink::Netlink;
use super::observe::Found;
use super::tap::{self, Backend};
use super::{Doing, Namespace, NetworkError};

/// The qdisc that has nothing but filters for what comes in.
const INGRESS: &str = "ingress";

/// An interface that has its tap, for one network device of a machine.
#[derive(Debug)]
pub struct Plug {
    /// The interface's index.
    pub index: u32,
    /// The tap's descriptors, one for each pair of queues: non-blocking, and with an Ethernet and a
    /// virtio-net header before each packet. The tap is there as long as one of them is open.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, once for each pair of queues. Empty: `hull-vmm` serves them.
    pub vhost: Vec<OwnedFd>,
}

/// Makes a tap beside each interface and redirects all traffic: what comes in to the guest, and what
/// the guest sends, if it is its own, out. All are plugged or none is.
///
/// # Errors
/// When a device or a kernel module is missing, or an interface has a tap.
pub async fn plug(
    namespace: &Namespace,
    interfaces: &[&Found],
    queue_pairs: u8,
    backend: Backend,
) -> Result<Vec<Plug>, NetworkError> {
    tap::check()?;
    let netlink = namespace.netlink()?;
    let mut plugs: Vec<Plug> = Vec::new();
    for interface in interfaces {
        match plug_one(namespace, &netlink, interface, queue_pairs, backend).await {
            Ok(plug) => plugs.push(plug),
            Err(error) => {
                for plug in plugs.iter().rev() {
                    undo(&netlink, plug.index).await;
                }
                return Err(error);
            }
        }
    }
    Ok(plugs)
}

/// Removes what [`plug`] has put at an interface, whoever did: its own kernel sees its traffic again.
/// The tap goes with its descriptors. An interface that is gone has nothing.
///
/// # Errors
/// When the kernel refuses.
pub async fn unplug(namespace: &Namespace, index: u32) -> Result<(), NetworkError> {
    release(&namespace.netlink()?, index).await
}

async fn plug_one(
    namespace: &Namespace,
    netlink: &Netlink,
    interface: &Found,
    queue_pairs: u8,
    backend: Backend,
) -> Result<Plug, NetworkError> {
    let name = tap_name(interface.index);
    let plug = Plug {
        index: interface.index,
        queues: namespace
            .run(|| tap::make(&name, queue_pairs))
            .doing(|| format!("making the tap {name} of {}", interface.name))?,
        vhost: tap::open_vhost(backend, queue_pairs)?,
    };
    let tap = wire_tap(netlink, interface, &name).await?;
    // Last, so that the interface is left alone until everything behind it is there.
    if let Err(error) = redirect(netlink, interface, tap).await {
        undo(netlink, interface.index).await;
        return Err(error);
    }
    Ok(plug)
}

/// After a failure, which is what the caller is told.
async fn undo(netlink: &Netlink, index: u32) {
    if let Err(error) = release(netlink, index).await {
        let source = std::error::Error::source(&error);
        tracing::warn!(source, "{error}");
    }
}

/// Brings the tap up with its rules, and returns its index.
async fn wire_tap(netlink: &Netlink, interface: &Found, name: &str) -> Result<u32, NetworkError> {
    let index = index_of(netlink, name)
        .await
        .doing(|| format!("looking for the tap {name}"))?;
    match netlink.change(without_addresses(index), 0).await {
        // A kernel without IPv6 gives it none.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
        other => other,
    }
    .doing(|| format!("keeping addresses from the tap {name}"))?;
    add_ingress(netlink, index, name).await?;
    for rule in filter::from_guest(interface) {
        add(netlink, index, name, &rule).await?;
    }
    let up = LinkUnspec::new_with_index(index)
        .mtu(interface.mtu.into())
        .up()
        .build();
    netlink
        .change(RouteNetlinkMessage::SetLink(up), 0)
        .await
        .doing(|| format!("bringing the tap {name} up"))?;
    Ok(index)
}

async fn redirect(netlink: &Netlink, interface: &Found, tap: u32) -> Result<(), NetworkError> {
    // There is one already if a supervisor was killed.
    release(netlink, interface.index).await?;
    add_ingress(netlink, interface.index, &interface.name).await?;
    let rule = filter::to_guest(tap);
    add(netlink, interface.index, &interface.name, &rule).await
}

async fn index_of(netlink: &Netlink, name: &str) -> io::Result<u32> {
    let links = netlink
        .list(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .await?;
    links
        .into_iter()
        .find_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => link
                .attributes
                .contains(&LinkAttribute::IfName(name.to_owned()))
                .then_some(link.header.index),
            _ => None,
        })
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The namespace's kernel would give the tap a link-local address and tell the guest of it.
fn without_addresses(index: u32) -> RouteNetlinkMessage {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let families = vec![AfSpecUnspec::Inet6(vec![mode])];
    RouteNetlinkMessage::SetLink(
        LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(families))
            .build(),
    )
}

/// Makes a place for filters, if nobody else has.
async fn add_ingress(netlink: &Netlink, index: u32, name: &str) -> Result<(), NetworkError> {
    let message = RouteNetlinkMessage::NewQueueDiscipline(ingress(index));
    match netlink.change(message, NLM_F_CREATE | NLM_F_EXCL).await {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map_err(|error| traffic_control(name, error)),
    }
}

async fn add(netlink: &Netlink, index: u32, name: &str, rule: &Rule) -> Result<(), NetworkError> {
    let message = RouteNetlinkMessage::NewTrafficFilter(rule.message(index.cast_signed()));
    netlink
        .change(message, NLM_F_CREATE | NLM_F_EXCL)
        .await
        .map_err(|error| traffic_control(name, error))
}

fn traffic_control(name: &str, source: io::Error) -> NetworkError {
    let doing = format!("redirecting the traffic of {name}");
    // What the kernel says when a module can't be loaded.
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => NetworkError::TrafficControl { doing, source },
        _ => NetworkError::Io { doing, source },
    }
}

fn ingress(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    message.attributes = vec![TcAttribute::Kind(INGRESS.to_owned())];
    message
}

async fn release(netlink: &Netlink, index: u32) -> Result<(), NetworkError> {
    let doing = || format!("leaving the traffic of interface {index} alone");
    if filters(netlink, index)
        .await
        .doing(doing)?
        .iter()
        .any(filter::is_ours)
    {
        // To which tap it goes makes no difference.
        let place = filter::to_guest(0).place(index.cast_signed());
        let removed = netlink
            .change(RouteNetlinkMessage::DelTrafficFilter(place), 0)
            .await;
        unless_gone(removed).doing(doing)?;
    }
    // If others have filters there, the place is theirs as well. One that they left empty is made again
    // by whoever wants it.
    if has_ingress(netlink, index).await.doing(doing)?
        && filters(netlink, index).await.doing(doing)?.is_empty()
    {
        let message = RouteNetlinkMessage::DelQueueDiscipline(ingress(index));
        unless_gone(netlink.change(message, 0).await).doing(doing)?;
    }
    Ok(())
}

/// Only of this kind: with another (clsact) there may be filters for what goes out, too.
async fn has_ingress(netlink: &Netlink, index: u32) -> io::Result<bool> {
    let asked = TcMessage::with_index(index.cast_signed());
    let listed = unless_gone(
        netlink
            .list(RouteNetlinkMessage::GetQueueDiscipline(asked))
            .await,
    )?;
    Ok(listed.into_iter().any(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc) => {
            qdisc.header.index == index.cast_signed()
                && qdisc
                    .attributes
                    .contains(&TcAttribute::Kind(INGRESS.to_owned()))
        }
        _ => false,
    }))
}

async fn filters(netlink: &Netlink, index: u32) -> io::Result<Vec<TcMessage>> {
    let mut asked = TcMessage::with_index(index.cast_signed());
    asked.header.parent = filter::ingress();
    let listed = unless_gone(
        netlink
            .list(RouteNetlinkMessage::GetTrafficFilter(asked))
            .await,
    )?;
    Ok(listed
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
            _ => None,
        })
        .collect())
}

/// What is not there has nothing that is to be removed.
fn unless_gone<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error)
            if [Some(libc::ENODEV), Some(libc::ENOENT), Some(libc::EINVAL)]
                .contains(&error.raw_os_error()) =>
        {
            Ok(T::default())
        }
        other => other,
    }
}
