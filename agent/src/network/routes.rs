//! Routes of the main table in infra.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Netlink;
use super::plan::Route;
use super::{ORIGIN, family};
use crate::error::{Doing, Result};

/// One way of a route as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    destination: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
    index: u32,
    source: Option<IpAddr>,
    metric: u32,
    scope: u8,
}

/// Makes the planned routes, in their order, and takes away those made before and not planned.
pub async fn apply(planned: &[Route], indexes: &HashMap<String, u32>, pod: &Netlink) -> Result<()> {
    let wanted: Vec<(&Route, Way)> = planned
        .iter()
        .filter_map(|route| Some((route, Way::of(route, *indexes.get(&route.interface)?))))
        .collect();
    let there = list(pod).await?;
    for (route, way) in &wanted {
        // Also the kernel's own will do, and a container's.
        if there.iter().any(|(known, _)| known == way) {
            continue;
        }
        // IPv4 has one route of a destination and metric, IPv6 one with several ways.
        let flags = match route.destination {
            IpAddr::V4(_) => NLM_F_CREATE | NLM_F_REPLACE,
            IpAddr::V6(_) => NLM_F_CREATE | NLM_F_APPEND,
        };
        pod.change(
            RouteNetlinkMessage::NewRoute(way.message(route.onlink)),
            flags,
        )
        .await
        .doing(|| {
            let via = match route.gateway {
                Some(gateway) => format!(" via {gateway}"),
                None => String::new(),
            };
            let target = route.target();
            format!(
                "adding route {target}{via} to interface {}",
                route.interface
            )
        })?;
    }
    for (way, ours) in there {
        let planned = wanted.iter().any(|(_, wanted)| *wanted == way);
        if ours && !planned && indexes.values().any(|index| *index == way.index) {
            remove(pod, &way).await?;
        }
    }
    Ok(())
}

async fn remove(pod: &Netlink, way: &Way) -> Result<()> {
    let removed = pod
        .change(RouteNetlinkMessage::DelRoute(way.message(false)), 0)
        .await;
    match removed {
        // Another took its place.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other.doing(|| format!("removing route {}/{}", way.destination, way.prefix)),
    }
}

async fn list(pod: &Netlink) -> Result<Vec<(Way, bool)>> {
    let mut ways = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let listed = pod
            .list(
                RouteNetlinkMessage::GetRoute(message),
                |answer| match answer {
                    RouteNetlinkMessage::NewRoute(message) => Some(Way::all(&message)),
                    _ => None,
                },
            )
            .await;
        match listed {
            // A kernel without IPv6 has no routes of it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            other => ways.extend(
                other
                    .doing(|| "listing routes".into())?
                    .into_iter()
                    .flatten(),
            ),
        }
    }
    Ok(ways)
}

impl Way {
    fn of(route: &Route, index: u32) -> Self {
        Self {
            destination: route.destination,
            prefix: route.prefix,
            gateway: route.gateway,
            index,
            source: route.source,
            metric: route.metric,
            scope: route.scope,
        }
    }

    fn message(&self, onlink: bool) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(self.destination);
        message.header.destination_prefix_length = self.prefix;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Other(ORIGIN);
        message.header.scope = RouteScope::from(self.scope);
        message.header.kind = RouteType::Unicast;
        if onlink {
            message.header.flags = RouteFlags::Onlink;
        }
        let mut attributes = vec![
            RouteAttribute::Oif(self.index),
            RouteAttribute::Priority(self.metric),
        ];
        if self.prefix > 0 {
            attributes.push(RouteAttribute::Destination(self.destination.into()));
        }
        attributes.extend(self.gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
        attributes.extend(self.source.map(|ip| RouteAttribute::PrefSource(ip.into())));
        message.attributes = attributes;
        message
    }

    /// The ways of a listed route, and whether it is ours.
    fn all(message: &RouteMessage) -> Vec<(Self, bool)> {
        let header = &message.header;
        let (any, scope) = match header.address_family {
            AddressFamily::Inet => (Ipv4Addr::UNSPECIFIED.into(), header.scope.into()),
            AddressFamily::Inet6 => (Ipv6Addr::UNSPECIFIED.into(), 0),
            _ => return Vec::new(),
        };
        if header.kind != RouteType::Unicast || header.table != RouteHeader::RT_TABLE_MAIN {
            return Vec::new();
        }
        let ours = header.protocol == RouteProtocol::Other(ORIGIN);
        let mut way = Self {
            destination: any,
            prefix: header.destination_prefix_length,
            gateway: None,
            index: 0,
            source: None,
            metric: 0,
            scope,
        };
        let mut ways = Vec::new();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(ip) => way.destination = address(ip).unwrap_or(any),
                RouteAttribute::Gateway(ip) => way.gateway = address(ip),
                RouteAttribute::PrefSource(ip) => way.source = address(ip),
                RouteAttribute::Oif(index) => way.index = *index,
                RouteAttribute::Priority(metric) => way.metric = *metric,
                RouteAttribute::MultiPath(hops) => ways.clone_from(hops),
                _ => {}
            }
        }
        if ways.is_empty() {
            return vec![(way, ours)];
        }
        ways.iter()
            .map(|hop| {
                let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Gateway(ip) => address(ip),
                    _ => None,
                });
                let index = hop.interface_index;
                (
                    Self {
                        gateway,
                        index,
                        ..way
                    },
                    ours,
                )
            })
            .collect()
    }
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// All routes, for tests.
#[cfg(test)]
pub async fn describe(pod: &Netlink) -> Vec<String> {
    let part = |name: &str, ip: Option<IpAddr>| ip.map(|ip| format!(" {name} {ip}"));
    let known = list(pod).await.unwrap().into_iter();
    known
        .map(|(way, _)| {
            format!(
                "route {}/{}{}{} metric {} scope {} of {}",
                way.destination,
                way.prefix,
                part("via", way.gateway).unwrap_or_default(),
                part("from", way.source).unwrap_or_default(),
                way.metric,
                way.scope,
                way.index
            )
        })
        .collect()
}
