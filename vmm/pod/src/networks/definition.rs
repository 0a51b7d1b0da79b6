//! A network's definition, in podman's and netavark's own form.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The network of pods that ask for none by name. Made at its first use.
pub const DEFAULT_NETWORK: &str = "hull";

/// The kernel's least for IPv4 (RFC 791), and its most for a veth.
pub(super) const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
/// RFC 8200, section 5.
pub(super) const MTU_IPV6_MIN: u32 = 1280;

/// `NAME.json`. netavark reads it as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub name: String,
    /// 64 random hexadecimal digits. netavark names its firewall chains by it.
    pub id: String,
    pub driver: Driver,
    /// The bridge; it is there while a pod uses the network.
    pub network_interface: String,
    pub created: Timestamp,
    pub subnets: Vec<NetworkSubnet>,
    pub ipv6_enabled: bool,
    /// No way out, and none in.
    pub internal: bool,
    /// Pods are found by their names.
    pub dns_enabled: bool,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    pub ipam_options: BTreeMap<String, String>,
    /// Hull chose the subnets, and may choose others as long as no pod uses the network.
    #[serde(default)]
    pub chosen_subnets: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    Bridge,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSubnet {
    pub subnet: IpNet,
    /// The bridge's own address, where aardvark-dns listens.
    pub gateway: IpAddr,
}

impl Network {
    /// Where names are answered.
    pub fn nameservers(&self) -> impl Iterator<Item = IpAddr> {
        let enabled = self.dns_enabled;
        self.subnets
            .iter()
            .filter(move |_| enabled)
            .map(|subnet| subnet.gateway)
    }
}

/// # Errors
/// The rule that the name breaks. What it allows is fit for a file's name.
pub(super) fn check_name(name: &str) -> Result<(), &'static str> {
    let middle = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
    let fits = name.len() <= 63
        && name.bytes().all(middle)
        && name
            .bytes()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric());
    if !fits {
        return Err(
            "must be a name of letters, digits, '_', '.' and '-', at most 63 long, that begins with a letter or digit",
        );
    }
    if ["none", "host"].contains(&name) {
        return Err("has a meaning of its own; choose another name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_are_fit_for_files() {
        let good = ["a", "my-net_1.x", "0"];
        let bad = [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            ".a",
            "a b",
            "ä",
            "none",
            &"a".repeat(64),
        ];
        assert!(good.iter().all(|name| check_name(name).is_ok()));
        assert!(!bad.iter().any(|name| check_name(name).is_ok()));
    }
}
