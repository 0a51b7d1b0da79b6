//! Which addresses the host reaches already, as its routing tables say (proc_pid_net(5)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// An address range that the host reaches through an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub interface: String,
    pub destination: IpNet,
}

/// The host's routes, without the default ones and those that every host has. A table that isn't
/// there (a kernel without IPv6) has none.
pub fn of_host() -> Vec<Route> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let mut routes = ipv4(&read("/proc/thread-self/net/route"));
    routes.extend(ipv6(&read("/proc/thread-self/net/ipv6_route")));
    routes
}

fn ipv4(table: &str) -> Vec<Route> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // In the byte order of the machine.
        let number = |n: usize| u32::from_str_radix(fields.get(n)?, 16).ok();
        let destination = Ipv4Addr::from(number(1)?.to_ne_bytes());
        let mask = Ipv4Addr::from(number(7)?.to_ne_bytes());
        let destination = IpNet::with_netmask(destination.into(), mask.into()).ok()?;
        keep(fields.first()?, destination)
    };
    table.lines().skip(1).filter_map(line).collect()
}

fn ipv6(table: &str) -> Vec<Route> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let address = u128::from_str_radix(fields.first()?, 16).ok()?;
        let prefix = u8::from_str_radix(fields.get(1)?, 16).ok()?;
        let destination = IpNet::new(Ipv6Addr::from(address).into(), prefix).ok()?;
        keep(fields.get(9)?, destination)
    };
    table.lines().filter_map(line).collect()
}

fn keep(interface: &str, destination: IpNet) -> Option<Route> {
    let everywhere = match destination.addr() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local(),
    };
    (destination.prefix_len() > 0 && !everywhere).then(|| Route {
        interface: interface.to_owned(),
        destination,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read_without_what_every_host_has() {
        let four = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                    eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                    eth0\t0000530A\t00000000\t0001\t0\t0\t0\t00FCFFFF\t0\t0\t0\n\
                    odd line\n";
        let six = "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 \
                   00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth1\n\
                   fe800000000000000000000000000000 40 00000000000000000000000000000000 00 \
                   00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth1\n";
        let route = |interface: &str, destination: &str| Route {
            interface: interface.into(),
            destination: destination.parse().unwrap(),
        };

        assert_eq!(ipv4(four), [route("eth0", "10.83.0.0/22")]);
        assert_eq!(ipv6(six), [route("eth1", "fd00::/64")]);
    }
}
