//! Which interfaces of a network namespace a pod can have.

use rtnetlink::packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};

/// The names of our own taps begin so.
const TAP_PREFIX: &str = "hull-";

/// The name of the tap beside an interface: at most 15 bytes, and the same whoever computes it.
pub fn tap_name(index: u32) -> String {
    format!("{TAP_PREFIX}{index}")
}

/// What an interface is, in the words of `ip link`, and `physical` if it is none of the kernel's making.
pub fn kind(link: &LinkMessage) -> String {
    match info_kind(link) {
        Some(kind) => kind.to_string(),
        None => "physical".to_owned(),
    }
}

/// Whether the pod is to have it at all.
///
/// Not: the loopback interface, our own taps, ports of a bridge or bond (the pod has the bridge), and
/// what is down. The kernel makes tunnels in every namespace (`tunl0`, `gretap0`, ...), and
/// only that tells them apart; what CNI and others wire is up when they are done.
pub fn concerns_the_pod(link: &LinkMessage, name: &str) -> bool {
    let loopback = link.header.flags.contains(LinkFlags::Loopback);
    let own_tap = info_kind(link) == Some(&InfoKind::Tun) && name.starts_with(TAP_PREFIX);
    let port = link
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::Controller(index) if *index != 0));
    link.header.flags.contains(LinkFlags::Up) && !loopback && !own_tap && !port
}

/// Whether the traffic of an interface can be redirected to a guest's with the same hardware address.
///
/// # Errors
/// Why it can't.
pub fn check(link: &LinkMessage) -> Result<(), &'static str> {
    if link.header.link_layer_type != LinkLayerType::Ether {
        return Err("it carries no Ethernet frames");
    }
    let kind = info_kind(link);
    match kind {
        Some(InfoKind::MacVtap | InfoKind::IpVtap) => {
            return Err("its packets go to a character device; use macvlan or ipvlan");
        }
        Some(InfoKind::IpVlan) if ipvlan_mode(link) != Some(IpVlanMode::L2) => {
            return Err("it answers no ARP in this mode; use mode l2");
        }
        _ => {}
    }
    // A dummy says so, too, but nobody is there who could ask.
    if link.header.flags.contains(LinkFlags::Noarp) && kind != Some(&InfoKind::Dummy) {
        return Err("it has no ARP, and the guest would ask in vain");
    }
    Ok(())
}

/// The interface of the same namespace on which this one stands, if it shares its packets.
pub fn lower(link: &LinkMessage) -> Option<u32> {
    let shares = matches!(
        info_kind(link),
        Some(InfoKind::Vlan | InfoKind::MacVlan | InfoKind::IpVlan)
    );
    let elsewhere = link
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Link(index) if shares && !elsewhere => Some(*index),
            _ => None,
        })
}

fn info(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    link.attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        })
        .flatten()
}

fn info_kind(link: &LinkMessage) -> Option<&InfoKind> {
    info(link).find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

fn ipvlan_mode(link: &LinkMessage) -> Option<IpVlanMode> {
    info(link).find_map(|info| match info {
        LinkInfo::Data(InfoData::IpVlan(data)) => data.iter().find_map(|data| match data {
            InfoIpVlan::Mode(mode) => Some(*mode),
            _ => None,
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(kind: InfoKind) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.link_layer_type = LinkLayerType::Ether;
        link.header.flags = LinkFlags::Up;
        link.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])];
        link
    }

    fn ipvlan(mode: IpVlanMode) -> LinkMessage {
        let mut link = link(InfoKind::IpVlan);
        let data = InfoData::IpVlan(vec![InfoIpVlan::Mode(mode)]);
        link.attributes
            .push(LinkAttribute::LinkInfo(vec![LinkInfo::Data(data)]));
        link
    }

    #[test]
    fn ethernet_is_taken() {
        for kind in [
            InfoKind::Veth,
            InfoKind::MacVlan,
            InfoKind::Vlan,
            InfoKind::Tun,
        ] {
            assert_eq!(check(&link(kind)), Ok(()));
        }
        assert_eq!(check(&ipvlan(IpVlanMode::L2)), Ok(()));
    }

    #[test]
    fn what_has_no_hardware_address_of_its_own_is_not() {
        let mut tun = link(InfoKind::Tun);
        tun.header.link_layer_type = LinkLayerType::None;
        let mut vrf = link(InfoKind::Vrf);
        vrf.header.flags |= LinkFlags::Noarp;

        for link in [
            tun,
            vrf,
            ipvlan(IpVlanMode::L3),
            ipvlan(IpVlanMode::L3S),
            link(InfoKind::MacVtap),
        ] {
            assert!(check(&link).is_err(), "{}", kind(&link));
        }
    }

    #[test]
    fn what_is_down_or_a_port_or_a_tap_of_ours_is_left_alone() {
        let mut down = link(InfoKind::GreTap);
        down.header.flags = LinkFlags::empty();
        let mut port = link(InfoKind::Veth);
        port.attributes.push(LinkAttribute::Controller(7));

        assert!(!concerns_the_pod(&down, "gretap0"));
        assert!(!concerns_the_pod(&port, "veth0"));
        assert!(!concerns_the_pod(&link(InfoKind::Tun), "hull-3"));
        assert!(concerns_the_pod(&link(InfoKind::Tun), "tap0"));
        assert!(concerns_the_pod(&link(InfoKind::Veth), "hull-3"));
    }

    #[test]
    fn a_vlan_stands_on_another_of_the_namespace() {
        let mut here = link(InfoKind::Vlan);
        here.attributes.push(LinkAttribute::Link(2));
        let mut elsewhere = here.clone();
        elsewhere.attributes.push(LinkAttribute::LinkNetNsId(0));
        let mut pair = link(InfoKind::Veth);
        pair.attributes.push(LinkAttribute::Link(2));

        assert_eq!(lower(&here), Some(2));
        assert_eq!(lower(&elsewhere), None);
        assert_eq!(lower(&pair), None);
    }

    #[test]
    fn the_longest_tap_name_fits() {
        assert_eq!(tap_name(u32::MAX >> 1).len(), 15);
    }
}
