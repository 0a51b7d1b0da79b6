//! The pod's network as the agent is told it, and connections to its ports.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use hull_protocol::agent::{self, ConfigureNetworkRequest, ForwardRequest};

use super::{Agent, AgentError};

/// What the guest's network is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// At most 32.
    pub interfaces: Vec<Interface>,
    /// At most 1024, in any order.
    pub routes: Vec<Route>,
    /// At most 1024.
    pub neighbours: Vec<Neighbour>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Position among the machine's network devices.
    pub device: u32,
    /// At most 15 bytes.
    pub name: String,
    pub mac: [u8; 6],
    /// 68 to 65535.
    pub mtu: u32,
    /// At most 64.
    pub addresses: Vec<Address>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    /// In bits.
    pub prefix: u8,
    /// The kernel makes a route for the prefix. If not, the plan's routes have it or there is none.
    pub prefix_route: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its bits beyond the prefix are zero.
    pub destination: IpAddr,
    pub prefix: u8,
    /// None: on the link.
    pub gateway: Option<IpAddr>,
    /// One of the plan's.
    pub interface: String,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    pub metric: u32,
    /// As in rtnetlink(7). Without a meaning in IPv6.
    pub scope: u8,
    /// The gateway is on the link although no other route says so.
    pub onlink: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    pub ip: IpAddr,
    pub mac: [u8; 6],
    /// One of the plan's.
    pub interface: String,
}

impl Agent {
    /// Makes the pod's network in the guest what the plan says. Saying it again changes nothing.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn configure_network(&self, plan: &Plan) -> Result<(), AgentError> {
        let request = request(plan);
        self.call(
            "ConfigureNetwork",
            self.client.configure_network(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Connects to a TCP port in the pod's network: of `host`, or of its loopback interface. The
    /// stream is in blocking mode.
    ///
    /// # Errors
    /// [`AgentError::Refused`] with code UNAVAILABLE if nothing listens there; else see
    /// [`AgentError`].
    pub async fn forward(&self, host: Option<IpAddr>, port: u16) -> Result<OwnedFd, AgentError> {
        let (number, stream) = self.open_stream().await?;
        let request = ForwardRequest {
            stream: number,
            port: port.into(),
            host: host.map(|host| host.to_string()).unwrap_or_default(),
            ..Default::default()
        };
        self.call("Forward", self.client.forward(self.context(), &request))
            .await?;
        Ok(stream)
    }
}

fn request(plan: &Plan) -> ConfigureNetworkRequest {
    ConfigureNetworkRequest {
        interfaces: plan.interfaces.iter().map(interface).collect(),
        routes: plan.routes.iter().map(route).collect(),
        neighbours: plan
            .neighbours
            .iter()
            .map(|neighbour| agent::Neighbour {
                ip: bytes(neighbour.ip),
                mac: neighbour.mac.into(),
                interface: neighbour.interface.clone(),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn interface(interface: &Interface) -> agent::Interface {
    agent::Interface {
        device: interface.device,
        name: interface.name.clone(),
        mac: interface.mac.into(),
        mtu: interface.mtu,
        addresses: interface
            .addresses
            .iter()
            .map(|address| agent::Address {
                ip: bytes(address.ip),
                prefix: address.prefix.into(),
                no_prefix_route: !address.prefix_route,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn route(route: &Route) -> agent::Route {
    agent::Route {
        destination: bytes(route.destination),
        prefix: route.prefix.into(),
        gateway: route.gateway.map(bytes).unwrap_or_default(),
        interface: route.interface.clone(),
        source: route.source.map(bytes).unwrap_or_default(),
        metric: route.metric,
        scope: route.scope.into(),
        onlink: route.onlink,
        ..Default::default()
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_said_in_bytes() {
        let plan = Plan {
            interfaces: vec![Interface {
                device: 1,
                name: "eth0".into(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1450,
                addresses: vec![Address {
                    ip: [10, 0, 0, 2].into(),
                    prefix: 24,
                    prefix_route: false,
                }],
            }],
            routes: vec![Route {
                destination: [0; 16].into(),
                prefix: 0,
                gateway: None,
                interface: "eth0".into(),
                source: Some([0xfd; 16].into()),
                metric: 5,
                scope: 253,
                onlink: false,
            }],
            neighbours: vec![Neighbour {
                ip: [10, 0, 0, 1].into(),
                mac: [2, 0, 0, 0, 0, 9],
                interface: "eth0".into(),
            }],
        };

        let request = request(&plan);

        let interface = &request.interfaces[0];
        assert_eq!((interface.device, interface.mtu), (1, 1450));
        assert_eq!(interface.addresses[0].ip, [10, 0, 0, 2]);
        assert!(interface.addresses[0].no_prefix_route);
        let route = &request.routes[0];
        assert_eq!(route.destination, [0; 16]);
        assert!(route.gateway.is_empty());
        assert_eq!(route.source, [0xfd; 16]);
        assert_eq!((route.metric, route.scope), (5, 253));
        assert_eq!(request.neighbours[0].mac, [2, 0, 0, 0, 0, 9]);
    }
}
