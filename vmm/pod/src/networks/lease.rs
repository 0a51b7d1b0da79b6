//! The next free address of a subnet.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::definition::NetworkSubnet;
use super::subnet::{address, hosts, number};

/// The first free address after `last`, and from the subnet's start when its end is reached. An
/// address that was just given back is so the last to be given again: neighbours and resolvers may
/// still remember who had it. None: all are taken.
pub fn next(
    subnet: &NetworkSubnet,
    taken: &BTreeSet<IpAddr>,
    last: Option<IpAddr>,
) -> Option<IpAddr> {
    let net = &subnet.subnet;
    let (first, end) = hosts(net);
    let size = end.checked_sub(first)?.checked_add(1)?;
    let start = last
        .filter(|last| net.contains(last))
        .map_or(first, |last| number(last).saturating_add(1));
    let offset = start.saturating_sub(first);
    // Of one more candidates than there are takers (pods and the gateway), one is free.
    let enough = u128::try_from(taken.len()).ok()?.checked_add(2)?;
    (0..size.min(enough))
        .map(|n| address(net, first + (offset % size + n) % size))
        .find(|candidate| *candidate != subnet.gateway && !taken.contains(candidate))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> NetworkSubnet {
        super::super::subnet::parse(text, None).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn every_address_is_given_once_and_then_none() {
        let subnet = subnet("10.0.0.0/29");
        let mut taken = BTreeSet::new();
        let mut last = None;

        while let Some(address) = next(&subnet, &taken, last) {
            assert!(taken.insert(address), "{address} twice");
            last = Some(address);
        }

        let all: Vec<String> = taken.iter().map(ToString::to_string).collect();
        assert_eq!(
            all,
            ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]
        );
    }

    #[test]
    fn what_was_given_back_comes_last() {
        let subnet = subnet("10.0.0.0/24");
        let taken = BTreeSet::from([ip("10.0.0.3")]);

        assert_eq!(
            next(&subnet, &taken, Some(ip("10.0.0.2"))),
            Some(ip("10.0.0.4"))
        );
        assert_eq!(
            next(&subnet, &taken, Some(ip("10.0.0.254"))),
            Some(ip("10.0.0.2"))
        );
        // Of another subnet, as after a change of it.
        assert_eq!(
            next(&subnet, &taken, Some(ip("10.9.9.9"))),
            Some(ip("10.0.0.2"))
        );
    }

    #[test]
    fn large_subnets_take_no_longer() {
        let subnet = subnet("fd00::/64");

        assert_eq!(next(&subnet, &BTreeSet::new(), None), Some(ip("fd00::2")));
        let last = Some(ip("fd00::ffff:ffff:ffff:fffe"));
        assert_eq!(next(&subnet, &BTreeSet::new(), last), Some(ip("fd00::2")));
    }
}
