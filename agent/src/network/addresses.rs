//! Addresses of infra's interfaces.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Netlink;
use super::plan::{Address, Interface};
use super::{ORIGIN, family};
use crate::error::{Doing, Result};

/// An address as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    index: u32,
    ip: IpAddr,
    prefix: u8,
    ours: bool,
}

/// Gives the interfaces their addresses, and takes away those given before and not planned.
pub async fn apply(
    planned: &[Interface],
    indexes: &HashMap<String, u32>,
    pod: &Netlink,
) -> Result<()> {
    let wanted: Vec<(&Interface, u32, &Address)> = planned
        .iter()
        .filter_map(|interface| Some((interface, *indexes.get(&interface.name)?)))
        .flat_map(|(interface, index)| {
            let addresses = interface.addresses.iter();
            addresses.map(move |address| (interface, index, address))
        })
        .collect();
    let is = |known: &Known, index: u32, address: &Address| {
        known.index == index && known.ip == address.ip && known.prefix == address.prefix
    };

    // First what goes: a later address of the same IPv4 network may go with it.
    for known in list(pod).await? {
        let planned = wanted
            .iter()
            .any(|(_, index, address)| is(&known, *index, address));
        if known.ours && !planned && indexes.values().any(|index| *index == known.index) {
            remove(pod, &known).await?;
        }
    }
    let there = list(pod).await?;
    for (interface, index, address) in wanted {
        if !there.iter().any(|known| is(known, index, address)) {
            let message = message(index, address);
            pod.change(
                RouteNetlinkMessage::NewAddress(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .await
            .doing(|| {
                let Address { ip, prefix, .. } = address;
                format!(
                    "adding address {ip}/{prefix} to interface {}",
                    interface.name
                )
            })?;
        }
    }
    Ok(())
}

async fn remove(pod: &Netlink, known: &Known) -> Result<()> {
    let address = Address {
        ip: known.ip,
        prefix: known.prefix,
        prefix_route: true,
    };
    let removed = pod
        .change(
            RouteNetlinkMessage::DelAddress(message(known.index, &address)),
            0,
        )
        .await;
    match removed {
        // It went with another.
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        other => other.doing(|| format!("removing address {}/{}", known.ip, known.prefix)),
    }
}

fn message(index: u32, address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.index = index;
    let mut flags = AddressFlags::empty();
    if address.ip.is_ipv6() {
        // The host's interface has it already: nobody else can.
        flags |= AddressFlags::Nodad;
    }
    if !address.prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    message.attributes = vec![
        AddressAttribute::Local(address.ip),
        AddressAttribute::Address(address.ip),
        AddressAttribute::Flags(flags),
        AddressAttribute::Protocol(AddressProtocol::Other(ORIGIN)),
    ];
    if let IpAddr::V4(ip) = address.ip
        && let Some(broadcast) = broadcast(ip, address.prefix)
    {
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    message
}

/// The last address of the network; networks of one or two have none (RFC 3021).
fn broadcast(ip: Ipv4Addr, prefix: u8) -> Option<Ipv4Addr> {
    let hosts = u32::MAX.checked_shr(u32::from(prefix))?;
    (prefix < 31).then(|| Ipv4Addr::from_bits(ip.to_bits() | hosts))
}

async fn list(pod: &Netlink) -> Result<Vec<Known>> {
    let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    pod.list(message, |answer| match answer {
        RouteNetlinkMessage::NewAddress(message) => Known::new(&message),
        _ => None,
    })
    .await
    .doing(|| "listing addresses".into())
}

impl Known {
    fn new(message: &AddressMessage) -> Option<Self> {
        let (mut local, mut address, mut ours) = (None, None, false);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => local = Some(*ip),
                AddressAttribute::Address(ip) => address = Some(*ip),
                AddressAttribute::Protocol(origin) => {
                    ours = *origin == AddressProtocol::Other(ORIGIN);
                }
                _ => {}
            }
        }
        matches!(
            message.header.family,
            AddressFamily::Inet | AddressFamily::Inet6
        )
        .then_some(Self {
            index: message.header.index,
            ip: local.or(address)?,
            prefix: message.header.prefix_len,
            ours,
        })
    }
}

/// All addresses, for tests; but for those that the kernel makes when it likes.
#[cfg(test)]
pub async fn describe(pod: &Netlink) -> Vec<String> {
    let known = list(pod).await.unwrap().into_iter();
    known
        .filter(|known| known.ours || !known.ip.to_string().starts_with("fe80"))
        .map(|known| format!("address {}/{} of {}", known.ip, known.prefix, known.index))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_more_than_two_have_a_broadcast_address() {
        let ip = Ipv4Addr::new(10, 1, 2, 3);
        assert_eq!(broadcast(ip, 16), Some(Ipv4Addr::new(10, 1, 255, 255)));
        assert_eq!(broadcast(ip, 0), Some(Ipv4Addr::BROADCAST));
        assert_eq!(broadcast(ip, 31), None);
        assert_eq!(broadcast(ip, 32), None);
    }
}
