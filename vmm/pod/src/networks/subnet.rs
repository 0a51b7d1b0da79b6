//! Which addresses a network has: the pool that subnets are taken of, and the rules for others.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::definition::NetworkSubnet;

/// Subnets are taken of 10.83.0.0/16: private (RFC 1918), and apart from the pools of podman
/// (10.88 to 10.255), docker (172.17 and up) and common clusters (10.96, 10.244, 10.42).
const POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 83, 0, 0), 16);
/// 1021 pods: as many ports as a Linux bridge has (1023), and a gateway.
const CHOSEN_PREFIX: u8 = 22;
/// Below these there is no room for a gateway and a pod.
const MAX_PREFIX_IPV4: u8 = 30;
const MAX_PREFIX_IPV6: u8 = 126;

/// Reads what a user gives as a subnet and its gateway. Without a gateway it is the first address.
///
/// # Errors
/// What is wrong, with the value.
pub fn parse(subnet: &str, gateway: Option<&str>) -> Result<NetworkSubnet, String> {
    let net: IpNet = subnet
        .parse()
        .map_err(|_| format!("--subnet {subnet}: must be ADDRESS/PREFIX, as 10.1.2.0/24"))?;
    let net = net.trunc();
    let max = match net {
        IpNet::V4(_) => MAX_PREFIX_IPV4,
        IpNet::V6(_) => MAX_PREFIX_IPV6,
    };
    if net.prefix_len() > max {
        return Err(format!(
            "--subnet {subnet}: is too small; the prefix must be at most {max}"
        ));
    }
    let unusable = match net.network() {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_multicast() || ip.is_unspecified(),
    };
    if unusable {
        return Err(format!("--subnet {subnet}: is not for hosts"));
    }
    let Some(text) = gateway else {
        return Ok(with_first_gateway(net));
    };
    let gateway: IpAddr = text
        .parse()
        .map_err(|_| format!("--gateway {text}: must be an IP address"))?;
    let (first, last) = hosts(&net);
    if !net.contains(&gateway) || !(first..=last).contains(&number(gateway)) {
        return Err(format!("--gateway {text}: is no host's address in {net}"));
    }
    Ok(NetworkSubnet {
        subnet: net,
        gateway,
    })
}

/// A piece of the pool that overlaps nothing that is taken. `start` says where to begin looking, so
/// that installations beside each other don't choose the same.
pub fn choose(start: usize, taken: &[IpNet]) -> Option<NetworkSubnet> {
    let pieces: Vec<Ipv4Net> = POOL.subnets(CHOSEN_PREFIX).ok()?.collect();
    let begin = start.checked_rem(pieces.len())?;
    pieces[begin..]
        .iter()
        .chain(&pieces[..begin])
        .map(|piece| IpNet::V4(*piece))
        .find(|piece| !taken.iter().any(|other| overlap(piece, other)))
        .map(with_first_gateway)
}

/// A random unique local prefix of IPv6 (RFC 4193, section 3.2).
///
/// # Errors
/// When the kernel's random numbers can't be read.
pub fn choose_ipv6() -> io::Result<NetworkSubnet> {
    let mut address = [0; 16];
    address[0] = 0xfd;
    rustix::rand::getrandom(&mut address[1..6], rustix::rand::GetRandomFlags::empty())?;
    let net = Ipv6Net::new(Ipv6Addr::from(address), 64).map_err(io::Error::other)?;
    Ok(with_first_gateway(IpNet::V6(net)))
}

fn with_first_gateway(subnet: IpNet) -> NetworkSubnet {
    let gateway = address(&subnet, hosts(&subnet).0);
    NetworkSubnet { subnet, gateway }
}

/// The numbers of the first and the last address for hosts.
pub fn hosts(net: &IpNet) -> (u128, u128) {
    let (first, last) = (number(net.network()), number(net.broadcast()));
    (first.saturating_add(1), last.saturating_sub(1))
}

/// An address as a number, and back in the family of `net`.
pub fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    }
}

pub fn address(net: &IpNet, number: u128) -> IpAddr {
    match net {
        // Numbers of the family don't exceed it.
        IpNet::V4(_) => IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into()),
        IpNet::V6(_) => IpAddr::V6(number.into()),
    }
}

pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_gateway_is_the_first_address_unless_given() {
        let chosen = parse("10.1.2.99/24", None).unwrap();
        assert_eq!(chosen.subnet, net("10.1.2.0/24"));
        assert_eq!(chosen.gateway.to_string(), "10.1.2.1");
        let given = parse("fd00:1::/64", Some("fd00:1::ff")).unwrap();
        assert_eq!(given.gateway.to_string(), "fd00:1::ff");
    }

    #[test]
    fn faults_name_flag_and_value() {
        let faults = [
            ("x", None, "--subnet x: must be ADDRESS/PREFIX"),
            ("10.0.0.0/31", None, "--subnet 10.0.0.0/31: is too small"),
            ("fd00::/127", None, "--subnet fd00::/127: is too small"),
            (
                "127.0.0.0/8",
                None,
                "--subnet 127.0.0.0/8: is not for hosts",
            ),
            ("0.0.0.0/0", None, "--subnet 0.0.0.0/0: is not for hosts"),
            (
                "10.0.0.0/24",
                Some("10.0.1.1"),
                "--gateway 10.0.1.1: is no host's",
            ),
            (
                "10.0.0.0/24",
                Some("10.0.0.255"),
                "--gateway 10.0.0.255: is no host's",
            ),
            ("10.0.0.0/24", Some("::1"), "--gateway ::1: is no host's"),
        ];
        for (subnet, gateway, wanted) in faults {
            let fault = parse(subnet, gateway).unwrap_err();
            assert!(fault.starts_with(wanted), "{fault}");
        }
    }

    #[test]
    fn what_is_taken_is_not_chosen() {
        let taken = [net("10.83.0.0/21"), net("10.83.8.7/32")];

        assert_eq!(choose(0, &taken).unwrap().subnet, net("10.83.12.0/22"));
        assert_eq!(choose(63, &taken).unwrap().subnet, net("10.83.252.0/22"));
        assert!(choose(0, &[net("10.0.0.0/8")]).is_none());
    }

    #[test]
    fn chosen_ipv6_prefixes_are_unique_and_local() {
        let (one, two) = (choose_ipv6().unwrap(), choose_ipv6().unwrap());

        assert_ne!(one, two);
        assert!(net("fd00::/8").contains(&one.subnet));
        assert_eq!(one.subnet.prefix_len(), 64);
        assert!(one.subnet.contains(&one.gateway));
    }
}
