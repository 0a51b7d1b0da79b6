//! What infra's network is to be, checked.

use std::collections::HashSet;
use std::fmt::{self, Display};
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_protocol::agent::{self, ConfigureNetworkRequest};

use crate::error::{Error, Result, shorten};

const MAX_INTERFACES: usize = 32;
const MAX_ADDRESSES: usize = 64;
const MAX_ROUTES: usize = 1024;
const MAX_NEIGHBOURS: usize = 1024;
/// IFNAMSIZ without its zero byte.
const MAX_NAME: usize = 15;
/// Least that IPv4 works with (RFC 791), and most that virtio-net can say.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;
/// The metric that Linux gives an IPv6 route without one.
const IPV6_METRIC: u32 = 1024;

/// A hardware address.
pub type Mac = [u8; 6];

/// infra's network.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub interfaces: Vec<Interface>,
    /// In an order in which each can be added.
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
}

#[derive(Clone, Debug)]
pub struct Interface {
    /// Position among the machine's virtio-net devices.
    pub device: usize,
    pub name: String,
    pub mac: Mac,
    pub mtu: u32,
    pub addresses: Vec<Address>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
    /// The kernel makes a route for the prefix.
    pub prefix_route: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: IpAddr,
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
    pub interface: String,
    pub source: Option<IpAddr>,
    /// Never 0 in IPv6.
    pub metric: u32,
    /// Always 0 in IPv6.
    pub scope: u8,
    pub onlink: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub ip: IpAddr,
    pub mac: Mac,
    pub interface: String,
}

impl Plan {
    /// Checks a request.
    pub fn new(request: &ConfigureNetworkRequest) -> Result<Self> {
        bounded("interfaces", request.interfaces.len(), MAX_INTERFACES)?;
        bounded("routes", request.routes.len(), MAX_ROUTES)?;
        bounded("neighbours", request.neighbours.len(), MAX_NEIGHBOURS)?;
        let interfaces: Vec<Interface> = collect(&request.interfaces, Interface::new)?;
        once(
            "device",
            interfaces.iter().map(|interface| interface.device),
        )?;
        once(
            "interface",
            interfaces.iter().map(|interface| &interface.name),
        )?;

        let names: HashSet<&str> = interfaces
            .iter()
            .map(|interface| interface.name.as_str())
            .collect();
        let mut routes = collect(&request.routes, |route| Route::new(route, &names))?;
        once("route to", routes.iter().map(Route::identity))?;
        // A gateway must be on a link, and routes say what is.
        routes.sort_by_key(|route| route.gateway.is_some() && !route.onlink);

        let neighbours = collect(&request.neighbours, |neighbour| {
            Neighbour::new(neighbour, &names)
        })?;
        once(
            "neighbour",
            neighbours
                .iter()
                .map(|neighbour| format!("{} of {}", neighbour.ip, neighbour.interface)),
        )?;
        Ok(Self {
            interfaces,
            routes,
            neighbours,
        })
    }

    /// Takes IPv6 off the interfaces for which `disabled` says so.
    pub fn disable_ipv6(&mut self, disabled: impl Fn(&str) -> bool) {
        for interface in &mut self.interfaces {
            if disabled(&interface.name) {
                interface.addresses.retain(|address| address.ip.is_ipv4());
            }
        }
        self.routes
            .retain(|route| route.destination.is_ipv4() || !disabled(&route.interface));
        self.neighbours
            .retain(|neighbour| neighbour.ip.is_ipv4() || !disabled(&neighbour.interface));
    }
}

impl Interface {
    fn new(request: &agent::Interface) -> Result<Self> {
        let name = &request.name;
        let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
        if name.is_empty()
            || name.len() > MAX_NAME
            || !name.bytes().all(plain)
            || matches!(name.as_str(), "." | ".." | "lo" | "all" | "default")
        {
            return Err(invalid(format_args!(
                "{:?} is no name for an interface",
                shorten(name, 100)
            )));
        }
        bounded(
            "addresses of an interface",
            request.addresses.len(),
            MAX_ADDRESSES,
        )?;
        if !MTU.contains(&request.mtu) {
            return Err(invalid(format_args!(
                "an MTU of {} for interface {name} is not in {} to {}",
                request.mtu,
                MTU.start(),
                MTU.end()
            )));
        }
        let device = usize::try_from(request.device)
            .ok()
            .filter(|device| *device < MAX_INTERFACES)
            .ok_or_else(|| invalid(format_args!("device {} of {name}", request.device)))?;
        let addresses = collect(&request.addresses, |address| Address::new(address, name))?;
        once(
            "address",
            addresses
                .iter()
                .map(|address| format!("{}/{} of {name}", address.ip, address.prefix)),
        )?;
        Ok(Self {
            device,
            name: name.clone(),
            mac: mac(&request.mac, name)?,
            mtu: request.mtu,
            addresses,
        })
    }
}

impl Address {
    fn new(request: &agent::Address, interface: &str) -> Result<Self> {
        let what = || format!("an address of {interface}");
        let ip = ip(&request.ip, what)?;
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(invalid(format_args!("{}: {ip} is no host's", what())));
        }
        Ok(Self {
            ip,
            prefix: prefix(request.prefix, ip, what)?,
            prefix_route: !request.no_prefix_route,
        })
    }
}

impl Route {
    fn new(request: &agent::Route, interfaces: &HashSet<&str>) -> Result<Self> {
        let what = || format!("a route of {:?}", shorten(&request.interface, 100));
        let destination = ip(&request.destination, what)?;
        let prefix = prefix(request.prefix, destination, what)?;
        let target = format!("route to {destination}/{prefix}");
        if first_of(destination, prefix) != destination {
            return Err(invalid(format_args!("{target}: bits beyond the prefix")));
        }
        known(&target, &request.interface, interfaces)?;
        let beside = |bytes: &[u8], role: &str| -> Result<Option<IpAddr>> {
            if bytes.is_empty() {
                return Ok(None);
            }
            let ip = ip(bytes, || format!("{target}: its {role}"))?;
            if ip.is_ipv4() != destination.is_ipv4() || ip.is_unspecified() || ip.is_multicast() {
                return Err(invalid(format_args!("{target}: {ip} can't be its {role}")));
            }
            Ok(Some(ip))
        };
        let scope = u8::try_from(request.scope)
            .map_err(|_| invalid(format_args!("{target}: scope {}", request.scope)))?;
        let (metric, scope) = match (destination, request.metric) {
            (IpAddr::V4(_), metric) => (metric, scope),
            (IpAddr::V6(_), 0) => (IPV6_METRIC, 0),
            (IpAddr::V6(_), metric) => (metric, 0),
        };
        Ok(Self {
            destination,
            prefix,
            gateway: beside(&request.gateway, "gateway")?,
            interface: request.interface.clone(),
            source: beside(&request.source, "source")?,
            metric,
            scope,
            onlink: request.onlink,
        })
    }

    /// What the kernel tells routes apart by. In IPv6 one may have several gateways.
    fn identity(&self) -> String {
        let mut identity = format!("{} metric {}", self.target(), self.metric);
        if self.destination.is_ipv6() {
            if let Some(gateway) = self.gateway {
                identity.push_str(&format!(" via {gateway}"));
            }
            identity.push_str(&format!(" of {}", self.interface));
        }
        identity
    }

    /// Where it leads, as people write it.
    pub fn target(&self) -> String {
        format!("{}/{}", self.destination, self.prefix)
    }
}

impl Neighbour {
    fn new(request: &agent::Neighbour, interfaces: &HashSet<&str>) -> Result<Self> {
        let ip = ip(&request.ip, || {
            format!("a neighbour of {:?}", shorten(&request.interface, 100))
        })?;
        let what = format!("neighbour {ip}");
        known(&what, &request.interface, interfaces)?;
        Ok(Self {
            ip,
            mac: mac(&request.mac, &what)?,
            interface: request.interface.clone(),
        })
    }
}

/// The first address of a prefix.
fn first_of(ip: IpAddr, prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask))
        }
    }
}

fn ip(bytes: &[u8], what: impl Fn() -> String) -> Result<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(bytes));
    }
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).map_err(|_| {
        invalid(format_args!(
            "{}: an IP address is not of {} bytes",
            what(),
            bytes.len()
        ))
    })
}

fn prefix(prefix: u32, ip: IpAddr, what: impl Fn() -> String) -> Result<u8> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(prefix)
        .ok()
        .filter(|prefix| *prefix <= most)
        .ok_or_else(|| invalid(format_args!("{}: {ip} has no prefix {prefix}", what())))
}

fn mac(bytes: &[u8], of: &str) -> Result<Mac> {
    Mac::try_from(bytes)
        .ok()
        // Bit 0 of the first byte: a group's address (IEEE 802).
        .filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
        .ok_or_else(|| invalid(format_args!("the hardware address of {of} is no host's")))
}

fn known(what: &str, interface: &str, interfaces: &HashSet<&str>) -> Result<()> {
    if interfaces.contains(interface) {
        return Ok(());
    }
    Err(invalid(format_args!(
        "{what}: interface {:?} is not in the request",
        shorten(interface, 100)
    )))
}

fn bounded(what: &'static str, count: usize, limit: usize) -> Result<()> {
    match count {
        count if count > limit => Err(Error::TooMany { what, limit }),
        _ => Ok(()),
    }
}

fn once<T: Eq + Hash + Display>(what: &str, items: impl Iterator<Item = T>) -> Result<()> {
    let mut seen = HashSet::new();
    for item in items {
        if let Some(item) = seen.replace(item) {
            return Err(invalid(format_args!("{what} {item} is named twice")));
        }
    }
    Ok(())
}

fn collect<T, U>(items: &[T], each: impl Fn(&T) -> Result<U>) -> Result<Vec<U>> {
    items.iter().map(each).collect()
}

fn invalid(text: fmt::Arguments<'_>) -> Error {
    Error::Invalid(text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn interface(device: u32, name: &str) -> agent::Interface {
        agent::Interface {
            device,
            name: name.into(),
            mac: MAC.into(),
            mtu: 1500,
            addresses: vec![address([10, 0, 0, 2], 24)],
            ..Default::default()
        }
    }

    fn address(ip: [u8; 4], prefix: u32) -> agent::Address {
        agent::Address {
            ip: ip.into(),
            prefix,
            ..Default::default()
        }
    }

    fn route(destination: &[u8], prefix: u32, gateway: &[u8]) -> agent::Route {
        agent::Route {
            destination: destination.into(),
            prefix,
            gateway: gateway.into(),
            interface: "eth0".into(),
            ..Default::default()
        }
    }

    fn request() -> ConfigureNetworkRequest {
        ConfigureNetworkRequest {
            interfaces: vec![interface(0, "eth0")],
            ..Default::default()
        }
    }

    /// Why a changed request is refused.
    fn refusal(change: impl FnOnce(&mut ConfigureNetworkRequest)) -> String {
        let mut request = request();
        change(&mut request);
        Plan::new(&request).unwrap_err().to_string()
    }

    #[test]
    fn routes_on_the_link_come_before_those_with_a_gateway() {
        let mut request = request();
        let mut onlink = route(&[10, 9, 0, 0], 16, &[169, 254, 1, 1]);
        onlink.onlink = true;
        request.routes = vec![
            route(&[0; 4], 0, &[169, 254, 1, 2]),
            onlink,
            route(
                &[0; 16],
                0,
                &[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            ),
            route(&[169, 254, 1, 2], 32, &[]),
        ];

        let plan = Plan::new(&request).unwrap();

        let targets: Vec<_> = plan.routes.iter().map(Route::target).collect();
        assert_eq!(
            targets,
            ["10.9.0.0/16", "169.254.1.2/32", "0.0.0.0/0", "::/0"]
        );
    }

    #[test]
    fn an_ipv6_route_has_the_kernels_metric_and_no_scope() {
        let mut request = request();
        let mut wanted = route(&[0; 16], 0, &[]);
        wanted.scope = 253;
        request.routes = vec![wanted];

        let plan = Plan::new(&request).unwrap();

        assert_eq!((plan.routes[0].metric, plan.routes[0].scope), (1024, 0));
    }

    #[test]
    fn without_ipv6_an_interface_keeps_the_rest() {
        let mut request = request();
        request.interfaces[0].addresses.push(agent::Address {
            ip: vec![0xfd; 16],
            prefix: 64,
            ..Default::default()
        });
        request.interfaces.push(interface(1, "eth1"));
        request.routes = vec![route(&[0; 16], 0, &[]), route(&[0; 4], 0, &[])];

        let mut plan = Plan::new(&request).unwrap();
        plan.disable_ipv6(|name| name == "eth0");

        assert_eq!(plan.interfaces[0].addresses.len(), 1);
        assert_eq!(plan.routes.len(), 1);
        assert!(plan.routes[0].destination.is_ipv4());
    }

    #[test]
    fn names_are_an_interfaces() {
        for name in [
            "",
            "lo",
            "all",
            "..",
            "a/b",
            "eth%d",
            "eth0:1",
            "a b",
            "é",
            "0123456789abcdef",
        ] {
            let why = refusal(|request| request.interfaces[0].name = name.into());
            assert!(why.contains("no name for an interface"), "{name}: {why}");
        }
    }

    #[test]
    fn what_no_interface_can_have_is_refused() {
        for (change, expected) in [
            (
                (|interface| interface.mac = vec![1, 0, 0, 0, 0, 0]) as fn(&mut agent::Interface),
                "hardware address of eth0",
            ),
            (|interface| interface.mac = vec![0; 6], "hardware address"),
            (|interface| interface.mac = vec![2; 5], "hardware address"),
            (|interface| interface.mtu = 67, "MTU of 67"),
            (|interface| interface.mtu = 65_536, "MTU of 65536"),
            (|interface| interface.device = 32, "device 32 of eth0"),
            (
                |interface| interface.addresses[0].prefix = 33,
                "no prefix 33",
            ),
            (
                |interface| interface.addresses[0].ip = vec![1; 5],
                "5 bytes",
            ),
            (
                |interface| interface.addresses[0].ip = vec![224, 0, 0, 1],
                "no host's",
            ),
            (
                |interface| interface.addresses.push(address([10, 0, 0, 2], 24)),
                "10.0.0.2/24 of eth0 is named twice",
            ),
            (
                |interface| interface.addresses = vec![address([10, 0, 0, 2], 24); 65],
                "no more than 64",
            ),
        ] {
            let why = refusal(|request| change(&mut request.interfaces[0]));
            assert!(why.contains(expected), "{expected}: {why}");
        }
    }

    #[test]
    fn what_no_route_can_have_is_refused() {
        for (change, expected) in [
            (
                (|route| route.interface = "eth9".into()) as fn(&mut agent::Route),
                "interface \"eth9\" is not in the request",
            ),
            (|route| route.destination = vec![], "0 bytes"),
            (
                |route| route.destination = vec![10, 0, 0, 1],
                "beyond the prefix",
            ),
            (|route| route.prefix = 33, "no prefix 33"),
            (|route| route.gateway = vec![1; 16], "can't be its gateway"),
            (|route| route.source = vec![0; 4], "can't be its source"),
            (|route| route.scope = 256, "scope 256"),
        ] {
            let why = refusal(|request| {
                request.routes = vec![route(&[10, 0, 0, 0], 8, &[])];
                change(&mut request.routes[0]);
            });
            assert!(why.contains(expected), "{expected}: {why}");
        }
    }

    #[test]
    fn everything_is_bounded_and_named_once() {
        let routes = vec![route(&[10, 0, 0, 0], 8, &[]); 2];
        let why = refusal(|request| request.routes = routes.clone());
        assert!(why.contains("10.0.0.0/8 metric 0 is named twice"), "{why}");
        let why = refusal(|request| request.routes = vec![routes[0].clone(); 1025]);
        assert!(why.contains("no more than 1024 routes"), "{why}");
        let why = refusal(|request| request.neighbours = vec![agent::Neighbour::new(); 1025]);
        assert!(why.contains("no more than 1024 neighbours"), "{why}");
        let why = refusal(|request| request.interfaces = vec![interface(0, "eth0"); 33]);
        assert!(why.contains("no more than 32 interfaces"), "{why}");
        let why = refusal(|request| request.interfaces.push(interface(0, "eth1")));
        assert!(why.contains("device 0 is named twice"), "{why}");
        let why = refusal(|request| request.interfaces.push(interface(1, "eth0")));
        assert!(why.contains("interface eth0 is named twice"), "{why}");
    }
}
