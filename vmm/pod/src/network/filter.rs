//! What a guest may send: the rules at the ingress of its tap, and their form in traffic control.
//!
//! A packet that no rule lets through is dropped. Let through is what has the interface's
//! hardware address and
//!
//! - in ARP, is Ethernet and IPv4 and names the hardware address and an address of the interface as
//!   the sender's;
//! - in IPv4, has an address of the interface as its source;
//! - in IPv6, has an address of the interface or the link-local one of its hardware address as its
//!   source. Neighbour advertisements can be of these addresses only; router advertisements and
//!   redirects are not a pod's to send. ICMPv6 behind routing headers or destination options would
//!   escape this, so both are dropped; in fragments receivers don't take such messages
//!   (RFC 6980). Hop-by-hop options can be before listener reports only (RFC 3810).
//! - in IPv6 without a source, asks whether someone else has one of these addresses (RFC 4862,
//!   section 5.4.2), or is a listener report.
//!
//! VLAN tags and other protocols are dropped. The rules are those of cls_u32, which reads words of a
//! packet, counted from the start of its network header, of which the Ethernet header is 14 bytes
//! before. A word beyond the packet's end lets no rule of the same priority match.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32,
    TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::observe::{Found, link_local};

const ETH_P_ALL: u16 = 0x0003;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

/// Next headers of IPv6.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;

/// Types of ICMPv6.
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Errors, echo, router and neighbour solicitations: what says nothing about others.
const HARMLESS: [u8; 8] = [1, 2, 3, 4, 128, 129, 133, NEIGHBOUR_SOLICITATION];
const LISTENER_REPORTS: [u8; 3] = [131, 132, 143];

/// The first chain, where each packet begins.
const START: u32 = 0;
const FROM_OWN_ADDRESS: u32 = 1;
const ICMP: u32 = 2;
const LISTENER: u32 = 3;
const FROM_NOWHERE: u32 = 4;

/// Of our filter at an interface that isn't ours: any that others don't use, so that theirs come first.
const INTERFACE_PRIORITY: u16 = 0x4855;
/// After every other rule of a chain.
const LAST: u16 = 9;

/// `TC_ACT_GOTO_CHAIN` of linux/pkt_cls.h, to which the chain's number is added.
const GOTO_CHAIN: u32 = 2 << 28;
/// `TCA_GACT_PARMS` of linux/tc_act/tc_gact.h.
const GACT_PARMS: u16 = 2;

/// A word of a packet, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word {
    /// In bytes from the start of the network header.
    offset: i32,
    mask: u32,
    value: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Sent by the interface of this index.
    Redirect(u32),
    Continue {
        chain: u32,
    },
    Drop,
}

/// A filter at the ingress of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    chain: u32,
    /// The lowest first. All of one chain and priority have one protocol.
    priority: u16,
    protocol: u16,
    /// All must match.
    words: Vec<Word>,
    verdict: Verdict,
}

/// The rules for what comes from the tap of an interface.
pub fn from_guest(interface: &Found) -> Vec<Rule> {
    let redirect = Verdict::Redirect(interface.index);
    let to = |chain| Verdict::Continue { chain };
    let mut v4 = Vec::new();
    let mut v6 = vec![link_local(interface.mac)];
    for address in &interface.addresses {
        match address.ip {
            IpAddr::V4(ip) => v4.push(ip),
            IpAddr::V6(ip) => v6.push(ip),
        }
    }
    let from = sender(interface.mac);
    let with = |words: Vec<Word>| from.iter().copied().chain(words).collect();

    let mut rules = vec![];
    let mut add = |chain, priority, protocol, words, verdict| {
        rules.push(Rule {
            chain,
            priority,
            protocol,
            words,
            verdict,
        });
    };
    for ip in &v4 {
        add(START, 1, ETH_P_IP, with(vec![v4_source(*ip)]), redirect);
        add(START, 2, ETH_P_ARP, with(arp(interface.mac, *ip)), redirect);
    }
    for ip in &v6 {
        add(
            START,
            3,
            ETH_P_IPV6,
            with(v6_at(8, *ip)),
            to(FROM_OWN_ADDRESS),
        );
    }
    let nowhere = v6_at(8, Ipv6Addr::UNSPECIFIED);
    add(START, 3, ETH_P_IPV6, with(nowhere), to(FROM_NOWHERE));
    add(START, LAST, ETH_P_ALL, vec![], Verdict::Drop);

    for (header, verdict) in [
        (ICMPV6, to(ICMP)),
        (HOP_BY_HOP, to(LISTENER)),
        (ROUTING, Verdict::Drop),
        (DESTINATION_OPTIONS, Verdict::Drop),
    ] {
        add(
            FROM_OWN_ADDRESS,
            1,
            ETH_P_IPV6,
            vec![next_header(header)],
            verdict,
        );
    }
    add(FROM_OWN_ADDRESS, LAST, ETH_P_ALL, vec![], redirect);

    for kind in HARMLESS {
        add(ICMP, 1, ETH_P_IPV6, vec![first_byte(40, kind)], redirect);
    }
    for ip in &v6 {
        let words = neighbour_discovery(NEIGHBOUR_ADVERTISEMENT, *ip);
        add(ICMP, 2, ETH_P_IPV6, words, redirect);
    }
    add(ICMP, LAST, ETH_P_ALL, vec![], Verdict::Drop);

    for kind in LISTENER_REPORTS {
        // Eight bytes of options, and ICMPv6 behind them.
        let options = Word {
            offset: 40,
            mask: 0xffff_0000,
            value: u32::from(ICMPV6) << 24,
        };
        add(
            LISTENER,
            1,
            ETH_P_IPV6,
            vec![options, first_byte(48, kind)],
            redirect,
        );
    }
    add(LISTENER, LAST, ETH_P_ALL, vec![], Verdict::Drop);

    add(
        FROM_NOWHERE,
        1,
        ETH_P_IPV6,
        vec![next_header(HOP_BY_HOP)],
        to(LISTENER),
    );
    for ip in &v6 {
        let mut words = vec![next_header(ICMPV6)];
        words.extend(neighbour_discovery(NEIGHBOUR_SOLICITATION, *ip));
        add(FROM_NOWHERE, 2, ETH_P_IPV6, words, redirect);
    }
    add(FROM_NOWHERE, LAST, ETH_P_ALL, vec![], Verdict::Drop);
    rules
}

/// The rule for what comes in at the interface: all of it goes to the tap.
pub fn to_guest(tap: u32) -> Rule {
    Rule {
        chain: START,
        priority: INTERFACE_PRIORITY,
        protocol: ETH_P_ALL,
        words: Vec::new(),
        verdict: Verdict::Redirect(tap),
    }
}

/// Whether a filter of an interface is [`to_guest`]'s.
pub fn is_ours(message: &TcMessage) -> bool {
    message.header.info >> 16 == u32::from(INTERFACE_PRIORITY)
}

impl Rule {
    /// The filter, at the ingress of the interface of an index.
    pub fn message(&self, index: i32) -> TcMessage {
        let action = vec![self.verdict.action()];
        let (kind, options) = if self.words.is_empty() {
            let options = vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(action))];
            (TcFilterMatchAll::KIND, options)
        } else {
            let options = vec![
                TcOption::U32(TcFilterU32Option::Selector(self.selector())),
                TcOption::U32(TcFilterU32Option::Action(action)),
            ];
            (TcFilterU32::KIND, options)
        };
        let mut message = self.place(index);
        // The kind must be before the options.
        message.attributes = vec![
            TcAttribute::Kind(kind.to_owned()),
            TcAttribute::Chain(self.chain),
            TcAttribute::Options(options),
        ];
        message
    }

    /// All filters of the rule's chain and priority, to be removed.
    pub fn place(&self, index: i32) -> TcMessage {
        let mut message = TcMessage::with_index(index);
        message.header.parent = ingress();
        message.header.info = u32::from(self.priority) << 16 | u32::from(self.protocol.to_be());
        message.attributes = vec![TcAttribute::Chain(self.chain)];
        message
    }

    fn selector(&self) -> TcU32Selector {
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.keys = self.words.iter().map(Word::key).collect();
        // A rule has at most a dozen.
        selector.nkeys = u8::try_from(self.words.len()).unwrap_or(u8::MAX);
        selector
    }
}

/// The parent of the filters at an interface's ingress.
pub fn ingress() -> TcHandle {
    TcHandle {
        major: 0xffff,
        minor: TcHandle::MIN_INGRESS,
    }
}

impl Verdict {
    fn action(self) -> TcAction {
        let (kind, parameters) = match self {
            Self::Redirect(index) => {
                let mut mirror = TcMirror::default();
                mirror.generic.action = TcActionType::Stolen;
                mirror.eaction = TcMirrorActionType::EgressRedir;
                mirror.ifindex = index;
                let parameters = TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror));
                (TcActionMirror::KIND, parameters)
            }
            Self::Continue { chain } => ("gact", gact(GOTO_CHAIN | chain)),
            Self::Drop => ("gact", gact(i32::from(TcActionType::Shot).cast_unsigned())),
        };
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind(kind.to_owned()),
            TcActionAttribute::Options(vec![parameters]),
        ];
        action
    }
}

/// `struct tc_gact`: index, capabilities, action, two reference counts.
fn gact(action: u32) -> TcActionOption {
    let mut parameters = [0; 20];
    parameters[8..12].copy_from_slice(&action.to_ne_bytes());
    TcActionOption::Other(DefaultNla::new(GACT_PARMS, parameters.into()))
}

impl Word {
    fn key(&self) -> TcU32Key {
        let mut key = TcU32Key::default();
        key.off = self.offset;
        key.mask = self.mask;
        key.val = self.value;
        key
    }
}

fn word(offset: i32, value: [u8; 4]) -> Word {
    Word {
        offset,
        mask: u32::MAX,
        value: u32::from_be_bytes(value),
    }
}

fn first_half(offset: i32, value: [u8; 2]) -> Word {
    Word {
        offset,
        mask: 0xffff_0000,
        value: u32::from(u16::from_be_bytes(value)) << 16,
    }
}

fn first_byte(offset: i32, value: u8) -> Word {
    Word {
        offset,
        mask: 0xff00_0000,
        value: u32::from(value) << 24,
    }
}

/// Of the Ethernet header.
fn sender(mac: [u8; 6]) -> [Word; 2] {
    let [a, b, c, d, e, f] = mac;
    [word(-8, [a, b, c, d]), first_half(-4, [e, f])]
}

/// RFC 826: of which kind it is, and the sender's addresses.
fn arp(mac: [u8; 6], ip: Ipv4Addr) -> Vec<Word> {
    let [a, b, c, d, e, f] = mac;
    let [i, j, k, l] = ip.octets();
    vec![
        word(0, [0, 1, 8, 0]),
        first_half(4, [6, 4]),
        word(8, [a, b, c, d]),
        word(12, [e, f, i, j]),
        first_half(16, [k, l]),
    ]
}

fn v4_source(ip: Ipv4Addr) -> Word {
    word(12, ip.octets())
}

fn v6_at(offset: i32, ip: Ipv6Addr) -> Vec<Word> {
    let bits = u128::from(ip);
    [(0, 96), (4, 64), (8, 32), (12, 0)]
        .into_iter()
        .map(|(behind, shift)| Word {
            offset: offset + behind,
            mask: u32::MAX,
            value: low_word(bits >> shift),
        })
        .collect()
}

#[expect(clippy::cast_possible_truncation, reason = "the low bits are meant")]
fn low_word(bits: u128) -> u32 {
    bits as u32
}

fn next_header(header: u8) -> Word {
    Word {
        offset: 4,
        mask: 0x0000_ff00,
        value: u32::from(header) << 8,
    }
}

/// RFC 4861, sections 4.3 and 4.4: the type and the target, right behind the IPv6 header.
fn neighbour_discovery(kind: u8, target: Ipv6Addr) -> Vec<Word> {
    let mut words = vec![first_byte(40, kind)];
    words.extend(v6_at(48, target));
    words
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
