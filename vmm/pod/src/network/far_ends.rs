//! The far ends of a namespace's veth pairs, which stay on the host for a moment when the namespace is gone: the kernel
//! takes namespaces apart in its own time.

use std::os::fd::BorrowedFd;

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use super::netlink::Netlink;
use super::{Doing, Result, namespace};

/// The host's indices of the far ends of all veths in a namespace.
///
/// # Errors
/// When the namespace can't be entered or its interfaces can't be listed.
pub fn far_ends(netns: BorrowedFd<'_>) -> Result<Vec<u32>> {
    namespace::within(netns, || {
        let mut netlink = Netlink::open().doing("opening netlink")?;
        let links = netlink.links().doing("listing interfaces")?;
        Ok(links.iter().filter_map(far_end).collect())
    })
}

/// Removes veths of the calling thread's network namespace, and so both ends of each. One that is gone already, and
/// what has come to be something else, is left alone.
///
/// # Errors
/// When they can't be listed or removed.
pub fn remove_veths(indices: &[u32]) -> Result<()> {
    if indices.is_empty() {
        return Ok(());
    }
    let mut netlink = Netlink::open().doing("opening netlink")?;
    for link in netlink.links().doing("listing interfaces")? {
        if !indices.contains(&link.header.index) || !is_veth(&link) {
            continue;
        }
        let mut message = LinkMessage::default();
        message.header.index = link.header.index;
        match netlink.change(RouteNetlinkMessage::DelLink(message), 0) {
            // The kernel was faster.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            removed => removed.doing(format!("removing interface {}", link.header.index))?,
        }
    }
    Ok(())
}

fn far_end(link: &LinkMessage) -> Option<u32> {
    let end = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        });
    end.filter(|_| is_veth(link))
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    })
}
