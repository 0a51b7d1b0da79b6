//! Neighbours that infra knows without asking.

use std::collections::HashMap;
use std::net::IpAddr;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteProtocol, RouteType};

use super::netlink::Netlink;
use super::plan::{Mac, Neighbour};
use super::{ORIGIN, family};
use crate::error::{Doing, Result};

/// A permanent neighbour as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    index: u32,
    ip: IpAddr,
    mac: Mac,
}

/// Makes the planned neighbours known, and forgets those made before and not planned.
pub async fn apply(
    planned: &[Neighbour],
    indexes: &HashMap<String, u32>,
    pod: &Netlink,
) -> Result<()> {
    let wanted: Vec<(&Neighbour, Known)> = planned
        .iter()
        .filter_map(|neighbour| {
            let known = Known {
                index: *indexes.get(&neighbour.interface)?,
                ip: neighbour.ip,
                mac: neighbour.mac,
            };
            Some((neighbour, known))
        })
        .collect();
    let there = list(pod).await?;
    for (neighbour, known) in &wanted {
        if there.iter().any(|(there, _)| there == known) {
            continue;
        }
        pod.change(
            RouteNetlinkMessage::NewNeighbour(known.message()),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .await
        .doing(|| {
            let Neighbour { ip, interface, .. } = neighbour;
            format!("adding neighbour {ip} to interface {interface}")
        })?;
    }
    for (known, ours) in there {
        let planned = wanted
            .iter()
            .any(|(_, wanted)| wanted.index == known.index && wanted.ip == known.ip);
        if ours && !planned && indexes.values().any(|index| *index == known.index) {
            pod.change(RouteNetlinkMessage::DelNeighbour(known.message()), 0)
                .await
                .doing(|| format!("removing neighbour {}", known.ip))?;
        }
    }
    Ok(())
}

async fn list(pod: &Netlink) -> Result<Vec<(Known, bool)>> {
    let message = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    pod.list(message, |answer| match answer {
        RouteNetlinkMessage::NewNeighbour(message) => Known::new(&message),
        _ => None,
    })
    .await
    .doing(|| "listing neighbours".into())
}

impl Known {
    /// A listed neighbour, and whether it is ours.
    fn new(message: &NeighbourMessage) -> Option<(Self, bool)> {
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let (mut ip, mut mac, mut ours) = (None, None, false);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                    ip = Some(IpAddr::from(*found));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                    ip = Some(IpAddr::from(*found));
                }
                NeighbourAttribute::LinkLayerAddress(found) => {
                    mac = Mac::try_from(found.as_slice()).ok();
                }
                NeighbourAttribute::Protocol(origin) => {
                    ours = *origin == RouteProtocol::Other(ORIGIN);
                }
                _ => {}
            }
        }
        let known = Self {
            index: message.header.ifindex,
            ip: ip?,
            mac: mac?,
        };
        Some((known, ours))
    }

    fn message(&self) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = family(self.ip);
        message.header.ifindex = self.index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(match self.ip {
                IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
                IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
            }),
            NeighbourAttribute::LinkLayerAddress(self.mac.into()),
            NeighbourAttribute::Protocol(RouteProtocol::Other(ORIGIN)),
        ];
        message
    }
}

/// All permanent neighbours, for tests.
#[cfg(test)]
pub async fn describe(pod: &Netlink) -> Vec<String> {
    let known = list(pod).await.unwrap().into_iter();
    known
        .map(|(known, _)| format!("neighbour {} is {:02x?}", known.ip, known.mac))
        .collect()
}
