//! Traffic control: what becomes of the frames that an interface receives.
//!
//! The classifier is u32 throughout, which every kernel with traffic control has. It reads words
//! at offsets from the network header; the Ethernet header lies before it, at -14.
//!
//! What the guest sends comes in at the tap. One filter for each address lets through
//! - IPv4 with the interface's hardware address and that source address,
//! - ARP for IPv4 over Ethernet, with both also as the sender's in the packet,
//! - IPv6 likewise, the link-local address of the hardware address included, and the unspecified
//!   one, from which duplicate addresses are looked for.
//!
//! All else is dropped: other protocols, tagged frames, others' addresses. So a pod has no more
//! on the node's network than the addresses it was given.
//!
//! IPv6 has a second look, for neighbour discovery (RFC 4861) is part of it: the pod is no router,
//! and answers for its own addresses only. Discovery holds only with a hop limit of 255, which no
//! forwarder can give; so what has that and is not plainly something harmless is dropped, however
//! many extension headers it hides behind.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::netlink::Netlink;

/// Kind and handle of the queueing discipline for what is received.
const INGRESS: &str = "ingress";
const INGRESS_HANDLE: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// Priority of the first filter, by which our filters are told from others'.
const FIRST: u16 = 0x4855;
/// Filters of one priority are for one protocol.
const PRIORITIES: std::ops::RangeInclusive<u16> = FIRST..=FIRST + 3;

/// Ethernet's numbers of protocols.
const ALL: u16 = 0x0003;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// Where the source's hardware address is.
const ETHERNET_SOURCE: i32 = -8;
/// RFC 791, section 3.1.
const IPV4_SOURCE: i32 = 12;
/// RFC 8200, section 3: the next header and the hop limit after it, and the source.
const IPV6_NEXT: i32 = 6;
const IPV6_SOURCE: i32 = 8;
/// RFC 4861, section 4: the type, and in solicitations and advertisements of neighbours the target.
const ICMPV6_TYPE: i32 = 40;
const ICMPV6_TARGET: i32 = 48;
/// RFC 826: what the addresses are of and their lengths, then (after the operation) the sender's.
const ARP_SENDER_MAC: i32 = 8;
const ARP_SENDER_IP: i32 = 14;

/// Numbers of protocols (IANA), here of the header after IPv6's.
const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Types of ICMPv6 (IANA).
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// The hop limit of what no other node has forwarded.
const NEVER_FORWARDED: u8 = 255;

/// Chains of filters: the one that frames come to, and those for IPv6 from the interface's
/// addresses and from the unspecified one. A frame that passes one unmatched goes to the
/// namespace's stack, so the last filter of each matches all.
const ARRIVAL: u32 = 0;
const FROM_OWN: u32 = 1;
const FROM_UNSPECIFIED: u32 = 2;

/// TC_ACT_GOTO_CHAIN in linux/pkt_cls.h, to which the chain's number is added.
const GOTO_CHAIN: i32 = 2 << 28;

/// TCA_GACT_PARMS in linux/tc_act/tc_gact.h: a `struct tc_gact`, of five words.
const GACT_PARAMETERS: u16 = 2;

/// What becomes of a frame that a filter matches.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    /// Another interface sends it, and nobody here sees it.
    Redirect(u32),
    Drop,
    /// Another chain has the say.
    Chain(u32),
}

/// A filter at the ingress of an interface.
#[derive(Clone, Debug)]
struct Filter {
    chain: u32,
    priority: u16,
    protocol: u16,
    /// All must match.
    keys: Vec<TcU32Key>,
    verdict: Verdict,
}

/// Has interface `to` send all that `from` receives.
pub fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    Filter {
        chain: ARRIVAL,
        priority: FIRST,
        protocol: ALL,
        keys: Vec::new(),
        verdict: Verdict::Redirect(to),
    }
    .add(netlink, from)
}

/// Has interface `to` send what `from` receives from the holder of these addresses, and drops the
/// rest.
pub fn redirect_own(
    netlink: &mut Netlink,
    from: u32,
    to: u32,
    mac: [u8; 6],
    addresses: impl Iterator<Item = IpAddr>,
) -> io::Result<()> {
    for filter in own(to, mac, addresses) {
        filter.add(netlink, from)?;
    }
    Ok(())
}

fn own(to: u32, mac: [u8; 6], addresses: impl Iterator<Item = IpAddr>) -> Vec<Filter> {
    let (v4, mut v6) = split(addresses);
    v6.push(link_local(mac));
    let arrival = |place: u16, protocol, keys: Vec<TcU32Key>, verdict| Filter {
        chain: ARRIVAL,
        priority: FIRST + place,
        protocol,
        keys: [words(ETHERNET_SOURCE, &mac), keys].concat(),
        verdict,
    };
    // The last first, so that there is no time in which anything goes to the stack.
    let mut filters = vec![Filter {
        chain: ARRIVAL,
        priority: FIRST + 3,
        protocol: ALL,
        keys: Vec::new(),
        verdict: Verdict::Drop,
    }];
    filters.extend(from_own(to, &v6));
    filters.extend(from_unspecified(to, &v6));
    let pass = Verdict::Redirect(to);
    for ip in v4 {
        filters.push(arrival(0, IPV4, words(IPV4_SOURCE, &ip.octets()), pass));
        filters.push(arrival(1, ARP, arp(mac, ip), pass));
    }
    let from = |ip: Ipv6Addr, chain| {
        let source = words(IPV6_SOURCE, &ip.octets());
        arrival(2, IPV6, source, Verdict::Chain(chain))
    };
    filters.extend(v6.into_iter().map(|ip| from(ip, FROM_OWN)));
    filters.push(from(Ipv6Addr::UNSPECIFIED, FROM_UNSPECIFIED));
    filters
}

fn split(addresses: impl Iterator<Item = IpAddr>) -> (Vec<Ipv4Addr>, Vec<Ipv6Addr>) {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for ip in addresses {
        match ip {
            IpAddr::V4(ip) => v4.push(ip),
            IpAddr::V6(ip) => v6.push(ip),
        }
    }
    (v4, v6)
}

/// What IPv6 from the interface's addresses may be: anything but a router's word, or one about
/// others' addresses.
fn from_own(to: u32, addresses: &[Ipv6Addr]) -> Vec<Filter> {
    let near = |next: u8| words(IPV6_NEXT, &[next, NEVER_FORWARDED]);
    let icmp = |kind: u8| [near(ICMPV6), words(ICMPV6_TYPE, &[kind])].concat();
    let mut keys: Vec<Vec<TcU32Key>> = addresses
        .iter()
        .map(|ip| {
            let target = words(ICMPV6_TARGET, &ip.octets());
            [icmp(NEIGHBOUR_ADVERTISEMENT), target].concat()
        })
        .collect();
    keys.extend(
        [
            ECHO_REQUEST,
            ECHO_REPLY,
            ROUTER_SOLICITATION,
            NEIGHBOUR_SOLICITATION,
        ]
        .map(icmp),
    );
    keys.extend([TCP, UDP].map(near));
    let hop_limit = IPV6_NEXT + 1;
    chain(
        FROM_OWN,
        keys.into_iter()
            .map(|keys| (keys, Verdict::Redirect(to)))
            .chain([
                (words(hop_limit, &[NEVER_FORWARDED]), Verdict::Drop),
                (Vec::new(), Verdict::Redirect(to)),
            ]),
    )
}

/// What IPv6 from the unspecified address may be: the question whether an address is free, for
/// the interface's own only, lest others be kept from theirs; and reports of multicast listeners
/// (RFC 3810), which alone have a hop-by-hop header and a hop limit of 1.
fn from_unspecified(to: u32, addresses: &[Ipv6Addr]) -> Vec<Filter> {
    let questions = addresses.iter().map(|ip| {
        [
            words(IPV6_NEXT, &[ICMPV6, NEVER_FORWARDED]),
            words(ICMPV6_TYPE, &[NEIGHBOUR_SOLICITATION]),
            words(ICMPV6_TARGET, &ip.octets()),
        ]
        .concat()
    });
    chain(
        FROM_UNSPECIFIED,
        questions
            .chain([words(IPV6_NEXT, &[HOP_BY_HOP, 1])])
            .map(|keys| (keys, Verdict::Redirect(to)))
            .chain([(Vec::new(), Verdict::Drop)]),
    )
}

/// Filters of a chain of its own, asked in this order.
fn chain(number: u32, rules: impl Iterator<Item = (Vec<TcU32Key>, Verdict)>) -> Vec<Filter> {
    rules
        .map(|(keys, verdict)| Filter {
            chain: number,
            priority: FIRST,
            protocol: IPV6,
            keys,
            verdict,
        })
        .collect()
}

/// ARP of IPv4 (0x0800, 4 bytes) over Ethernet (1, 6 bytes), from this sender.
fn arp(mac: [u8; 6], ip: Ipv4Addr) -> Vec<TcU32Key> {
    [
        words(0, &[0, 1, 8, 0, 6, 4]),
        words(ARP_SENDER_MAC, &mac),
        words(ARP_SENDER_IP, &ip.octets()),
    ]
    .concat()
}

/// Keys that compare bytes, word by word. An offset that is no multiple of four begins within a word.
fn words(offset: i32, bytes: &[u8]) -> Vec<TcU32Key> {
    let mut keys: Vec<TcU32Key> = Vec::new();
    for (at, byte) in (offset..).zip(bytes) {
        let place = at.rem_euclid(4);
        let shift = 8 * (3 - place);
        if keys.last().is_none_or(|key| key.off != at - place) {
            let mut key = TcU32Key::default();
            key.off = at - place;
            keys.push(key);
        }
        if let Some(key) = keys.last_mut() {
            key.val |= u32::from(*byte) << shift;
            key.mask |= 0xff << shift;
        }
    }
    keys
}

/// What Linux gives an interface of this hardware address (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// Prepares an interface for filters; it has none then.
///
/// # Errors
/// `AlreadyExists` if another program did so before. What is left of a pod that is gone is removed.
pub fn prepare(netlink: &mut Netlink, interface: u32) -> io::Result<()> {
    let add = |netlink: &mut Netlink| {
        let mut message = message(interface, TcHandle::INGRESS);
        message.attributes = vec![TcAttribute::Kind(INGRESS.into())];
        netlink.change(
            RouteNetlinkMessage::NewQueueDiscipline(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    };
    match add(netlink) {
        Err(error)
            if error.kind() == io::ErrorKind::AlreadyExists && is_ours(netlink, interface)? =>
        {
            clear(netlink, interface)?;
            add(netlink)
        }
        added => added,
    }
}

/// Takes all filters off what an interface receives. Nothing there, or no such interface: all the better.
pub fn clear(netlink: &mut Netlink, interface: u32) -> io::Result<()> {
    let message = message(interface, TcHandle::INGRESS);
    match netlink.change(RouteNetlinkMessage::DelQueueDiscipline(message), 0) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        removed => removed,
    }
}

/// Whether an interface's ingress has filters of ours alone.
fn is_ours(netlink: &mut Netlink, interface: u32) -> io::Result<bool> {
    let message = message(interface, INGRESS_HANDLE);
    let filters = RouteNetlinkMessage::GetTrafficFilter(message);
    let ours = netlink.list(filters, |answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(message) => {
            let priority = u16::try_from(message.header.info >> 16).unwrap_or(0);
            Some(PRIORITIES.contains(&priority))
        }
        _ => None,
    })?;
    Ok(!ours.is_empty() && ours.iter().all(|ours| *ours))
}

/// A message about the ingress of an interface.
fn message(interface: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.parent = parent;
    message.header.handle = match parent {
        TcHandle::INGRESS => INGRESS_HANDLE,
        _ => TcHandle::UNSPEC,
    };
    message
}

impl Filter {
    fn add(&self, netlink: &mut Netlink, interface: u32) -> io::Result<()> {
        let mut message = message(interface, INGRESS_HANDLE);
        message.header.info = u32::from(self.priority) << 16 | u32::from(self.protocol.to_be());
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = u8::try_from(self.keys.len()).map_err(io::Error::other)?;
        selector.keys.clone_from(&self.keys);
        let options = [
            TcFilterU32Option::Selector(selector),
            TcFilterU32Option::Action(vec![self.verdict.action()]),
        ];
        message.attributes = vec![
            TcAttribute::Kind(TcFilterU32::KIND.into()),
            TcAttribute::Chain(self.chain),
            TcAttribute::Options(options.map(TcOption::U32).into()),
        ];
        netlink.change(
            RouteNetlinkMessage::NewTrafficFilter(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }
}

impl Verdict {
    fn action(self) -> TcAction {
        let (kind, option) = match self {
            Self::Redirect(to) => {
                let mut mirror = TcMirror::default();
                mirror.generic.action = TcActionType::Stolen;
                mirror.eaction = TcMirrorActionType::EgressRedir;
                mirror.ifindex = to;
                let option = TcActionMirrorOption::Parms(mirror);
                (TcActionMirror::KIND, TcActionOption::Mirror(option))
            }
            Self::Drop => ("gact", gact(TcActionType::Shot.into())),
            Self::Chain(number) => ("gact", gact(GOTO_CHAIN | number.cast_signed())),
        };
        let mut built = TcAction::default();
        built.attributes = vec![
            TcActionAttribute::Kind(kind.into()),
            TcActionAttribute::Options(vec![option]),
        ];
        built
    }
}

fn gact(action: i32) -> TcActionOption {
    // Index, capabilities, action and two counts.
    let parameters = [0, 0, action, 0, 0].map(i32::to_ne_bytes).concat();
    TcActionOption::Other(DefaultNla::new(GACT_PARAMETERS, parameters))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0xaa, 0xbb, 0xcc];

    fn plain(keys: &[TcU32Key]) -> Vec<(i32, u32, u32)> {
        keys.iter()
            .map(|key| (key.off, key.val, key.mask))
            .collect()
    }

    #[test]
    fn bytes_are_compared_by_aligned_words() {
        assert_eq!(
            plain(&words(ETHERNET_SOURCE, &MAC)),
            [(-8, 0x0200_00aa, u32::MAX), (-4, 0xbbcc_0000, 0xffff_0000)]
        );
        assert_eq!(
            plain(&words(ARP_SENDER_IP, &[10, 1, 2, 3])),
            [(12, 0x0a01, 0xffff), (16, 0x0203_0000, 0xffff_0000)]
        );
    }

    fn filters() -> Vec<Filter> {
        let addresses = [[10, 0, 0, 2].into(), "fd00::2".parse().unwrap()];
        own(7, MAC, addresses.into_iter())
    }

    #[test]
    fn whatever_arrives_is_asked_for_its_hardware_address_or_dropped() {
        let mut filters = filters();
        filters.retain(|filter| filter.chain == ARRIVAL);

        filters.sort_by_key(|filter| filter.priority);
        let protocols: Vec<u16> = filters.iter().map(|filter| filter.protocol).collect();
        assert_eq!(protocols, [IPV4, ARP, IPV6, IPV6, IPV6, ALL]);
        let last = filters.pop().unwrap();
        assert!(matches!(last.verdict, Verdict::Drop));
        assert!(last.keys.is_empty());
        let source = words(ETHERNET_SOURCE, &MAC);
        for filter in filters {
            assert!(PRIORITIES.contains(&filter.priority));
            assert!(filter.keys.starts_with(&source), "{filter:?}");
            assert!(filter.keys.len() > source.len(), "{filter:?}");
        }
    }

    #[test]
    fn no_chain_lets_a_frame_through_to_the_stack() {
        for number in [FROM_OWN, FROM_UNSPECIFIED] {
            let filters = filters();
            let mut chain = filters.iter().filter(|filter| filter.chain == number);
            assert!(chain.next_back().unwrap().keys.is_empty());
            assert!(chain.all(|filter| !filter.keys.is_empty()));
        }
    }

    #[test]
    fn the_link_local_address_is_made_of_the_hardware_address() {
        assert_eq!(link_local(MAC).to_string(), "fe80::ff:feaa:bbcc");
    }
}
