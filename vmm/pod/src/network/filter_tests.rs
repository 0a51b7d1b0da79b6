//! The rules, run on frames as the kernel runs them.

use super::*;
use crate::agent::network::Address;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const OWN: [u8; 4] = [10, 0, 0, 2];
const OTHER: [u8; 4] = [10, 0, 0, 3];
const OWN6: &str = "fd00::2";
const OTHER6: &str = "fd00::3";
const TCP: u8 = 6;
const FRAGMENT: u8 = 44;

fn interface() -> Found {
    let address = |ip: IpAddr, prefix| Address {
        ip,
        prefix,
        prefix_route: true,
    };
    Found {
        index: 2,
        kind: "veth".into(),
        name: "eth0".into(),
        mac: MAC,
        mtu: 1500,
        addresses: vec![address(OWN.into(), 24), address(OWN6.parse().unwrap(), 64)],
    }
}

/// What becomes of a frame.
#[track_caller]
fn verdict(frame: &[u8]) -> Verdict {
    let rules = from_guest(&interface());
    let mut chain = START;
    loop {
        match in_chain(&rules, chain, frame) {
            Verdict::Continue { chain: next } => chain = next,
            end => return end,
        }
    }
}

fn in_chain(rules: &[Rule], chain: u32, frame: &[u8]) -> Verdict {
    let protocol = u16::from_be_bytes([frame[12], frame[13]]);
    for priority in 0..=LAST {
        for rule in rules
            .iter()
            .filter(|rule| (rule.chain, rule.priority) == (chain, priority))
            .filter(|rule| [ETH_P_ALL, protocol].contains(&rule.protocol))
        {
            match matches(rule, frame) {
                None => break,
                Some(true) => return rule.verdict,
                Some(false) => {}
            }
        }
    }
    panic!("chain {chain} has an end");
}

/// None: a word is beyond the end.
fn matches(rule: &Rule, frame: &[u8]) -> Option<bool> {
    for word in &rule.words {
        let at = usize::try_from(word.offset + 14).unwrap();
        let bytes = frame.get(at..at + 4)?;
        let value = u32::from_be_bytes(bytes.try_into().unwrap());
        if value & word.mask != word.value {
            return Some(false);
        }
    }
    Some(true)
}

#[track_caller]
fn passes(frame: &[u8]) {
    assert_eq!(verdict(frame), Verdict::Redirect(2));
}

#[track_caller]
fn is_dropped(frame: &[u8]) {
    assert_eq!(verdict(frame), Verdict::Drop);
}

fn frame(mac: [u8; 6], protocol: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &mac[..], &protocol.to_be_bytes(), payload].concat()
}

fn arp_frame(mac: [u8; 6], sender_mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let start = [0, 1, 8, 0, 6, 4, 0, 2];
    let payload = [&start[..], &sender_mac, &sender, &[0; 6], &[10, 0, 0, 1]].concat();
    frame(mac, ETH_P_ARP, &payload)
}

fn v4_frame(mac: [u8; 6], source: [u8; 4]) -> Vec<u8> {
    let mut payload = vec![0; 20];
    payload[12..16].copy_from_slice(&source);
    frame(mac, ETH_P_IP, &payload)
}

fn v6_frame(source: &str, next: u8, behind: &[u8]) -> Vec<u8> {
    let source: Ipv6Addr = source.parse().unwrap();
    let start = [0x60, 0, 0, 0, 0, 0, next, 255];
    let payload = [&start[..], &source.octets(), &[0xff; 16], behind].concat();
    frame(MAC, ETH_P_IPV6, &payload)
}

fn icmp(kind: u8, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat()
}

fn behind_options(next: u8, icmp: &[u8]) -> Vec<u8> {
    [&[next, 0, 5, 2, 0, 0, 1, 0], icmp].concat()
}

#[test]
fn own_packets_pass() {
    passes(&v4_frame(MAC, OWN));
    passes(&arp_frame(MAC, MAC, OWN));
    passes(&v6_frame(OWN6, TCP, &[]));
    passes(&v6_frame("fe80::ff:fe00:1", TCP, &[]));
    passes(&v6_frame(OWN6, FRAGMENT, &[0; 8]));
}

#[test]
fn a_foreign_hardware_address_is_dropped() {
    let mut v6 = v6_frame(OWN6, TCP, &[]);
    v6[6..12].copy_from_slice(&OTHER_MAC);

    is_dropped(&v4_frame(OTHER_MAC, OWN));
    is_dropped(&arp_frame(OTHER_MAC, MAC, OWN));
    is_dropped(&v6);
}

#[test]
fn a_foreign_source_is_dropped() {
    is_dropped(&v4_frame(MAC, OTHER));
    is_dropped(&v4_frame(MAC, [0; 4]));
    is_dropped(&v6_frame(OTHER6, TCP, &[]));
    is_dropped(&v6_frame("fe80::1", TCP, &[]));
    is_dropped(&v6_frame("::", TCP, &[]));
}

#[test]
fn arp_in_the_name_of_others_is_dropped() {
    is_dropped(&arp_frame(MAC, OTHER_MAC, OWN));
    is_dropped(&arp_frame(MAC, MAC, OTHER));
}

#[test]
fn arp_of_another_form_is_dropped() {
    let mut other = arp_frame(MAC, MAC, OWN);
    other[14 + 4] = 8;

    is_dropped(&other);
}

#[test]
fn advertisements_of_own_addresses_pass() {
    passes(&v6_frame(OWN6, ICMPV6, &icmp(136, OWN6)));
    passes(&v6_frame(OWN6, ICMPV6, &icmp(136, "fe80::ff:fe00:1")));
}

#[test]
fn advertisements_of_others_and_of_routers_are_dropped() {
    is_dropped(&v6_frame(OWN6, ICMPV6, &icmp(136, OTHER6)));
    is_dropped(&v6_frame("fe80::ff:fe00:1", ICMPV6, &icmp(134, "::")));
    is_dropped(&v6_frame(OWN6, ICMPV6, &icmp(137, OTHER6)));
}

#[test]
fn advertisements_behind_other_headers_are_dropped() {
    for header in [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS] {
        let advertisement = behind_options(ICMPV6, &icmp(136, OTHER6));

        is_dropped(&v6_frame(OWN6, header, &advertisement));
    }
    let nested = behind_options(DESTINATION_OPTIONS, &[ICMPV6, 0, 1, 4, 0, 0, 0, 0]);
    is_dropped(&v6_frame(OWN6, HOP_BY_HOP, &nested));
}

#[test]
fn questions_and_echo_pass() {
    for kind in [1, 2, 3, 128, 129, 133, 135] {
        passes(&v6_frame(OWN6, ICMPV6, &icmp(kind, OTHER6)));
    }
}

#[test]
fn listener_reports_pass() {
    let report = behind_options(ICMPV6, &icmp(143, "::"));

    passes(&v6_frame(OWN6, HOP_BY_HOP, &report));
    passes(&v6_frame("::", HOP_BY_HOP, &report));
    is_dropped(&v6_frame(OWN6, ICMPV6, &icmp(130, "::")));
}

#[test]
fn without_a_source_one_can_ask_for_own_addresses_only() {
    passes(&v6_frame("::", ICMPV6, &icmp(135, OWN6)));
    is_dropped(&v6_frame("::", ICMPV6, &icmp(135, OTHER6)));
    is_dropped(&v6_frame("::", ICMPV6, &icmp(136, OWN6)));
}

#[test]
fn other_protocols_and_tags_are_dropped() {
    let plain = v4_frame(MAC, OWN);
    let tag = [0x81, 0, 0, 5];

    is_dropped(&[&plain[..12], &tag, &plain[12..]].concat());
    is_dropped(&frame(MAC, 0x88cc, &[0; 46]));
    is_dropped(&frame(MAC, 64, &[0; 46]));
}

#[test]
fn what_is_cut_off_is_dropped() {
    let advertisement = v6_frame(OWN6, ICMPV6, &icmp(136, OWN6));
    let arp = arp_frame(MAC, MAC, OWN);

    for length in 14..54 + 24 {
        is_dropped(&advertisement[..length]);
    }
    for length in 14..14 + 18 {
        is_dropped(&arp[..length]);
    }
}

#[test]
fn an_interface_without_addresses_sends_link_local_only() {
    let mut bare = interface();
    bare.addresses.clear();
    let protocols = from_guest(&bare);

    assert!(protocols.iter().all(|rule| rule.protocol != ETH_P_IP));
    assert!(protocols.iter().all(|rule| rule.protocol != ETH_P_ARP));
}

#[test]
fn every_chain_ends() {
    let rules = from_guest(&interface());

    for chain in [START, FROM_OWN_ADDRESS, ICMP, LISTENER, FROM_NOWHERE] {
        let last = rules.iter().rfind(|rule| rule.chain == chain).unwrap();
        assert!(last.words.is_empty());
    }
}
