//! A container with NET_ADMIN rules its pod's network, by every generation of tools.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use hull_tests::hull::Hull;
use hull_tests::network::host_network;
use hull_tests::pod::Pod;
use hull_tests::{eventually, scaled};

/// Servers on ports 7000 (which says `plain`) and 7004 (which takes what isn't addressed to it, and
/// says `caught`), and a user 1000 without any right.
const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: ruled}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: admin
    image: network
    command:
    - sh
    - -c
    - |
      socat TCP4-LISTEN:7000,fork,reuseaddr SYSTEM:'echo plain' &
      exec socat TCP4-LISTEN:7004,fork,reuseaddr,ip-transparent SYSTEM:'echo caught'
    securityContext: {capabilities: {add: [NET_ADMIN]}}
  - name: user
    image: network
    command: [sleep, '100000']
    securityContext: {runAsUser: 1000}
";

/// What a server says to the host; empty when it can't be reached.
fn said_outside(address: SocketAddr) -> String {
    let mut text = String::new();
    if let Ok(mut stream) = TcpStream::connect_timeout(&address, scaled(Duration::from_secs(1))) {
        let _ = stream.read_to_string(&mut text);
    }
    text.trim_end().to_owned()
}

/// The same rules in one tool's words. Each begins with an empty table.
struct Words {
    name: &'static str,
    clear: &'static str,
    refuse: &'static str,
    refuse_user: &'static str,
    redirect: &'static str,
    dnat: &'static str,
    tproxy: &'static str,
    established: &'static str,
    refuse_ipv6: &'static str,
}

const NFT: Words = Words {
    name: "nft",
    clear: "nft flush ruleset",
    refuse: "nft 'table inet t { chain c { type filter hook input priority filter; tcp dport 7000 reject with tcp reset; }; }'",
    refuse_user: "nft 'table inet t { chain c { type filter hook output priority filter; meta skuid 1000 tcp dport 7000 reject with tcp reset; }; }'",
    redirect: "nft 'table inet t { chain c { type nat hook output priority -100; tcp dport 7002 redirect to :7000; }; }'",
    dnat: "nft 'table inet t { chain c { type nat hook output priority -100; ip daddr 192.0.2.1 tcp dport 80 dnat ip to 127.0.0.1:7000; }; }'",
    tproxy: "nft 'table inet u { chain c { type filter hook prerouting priority mangle; tcp dport 7003 meta mark set 1 tproxy ip to :7004 accept; }; }'",
    established: "nft 'table inet t { chain c { type filter hook input priority filter; iif lo ct state established accept; iif lo tcp dport 7000 ct state new accept; iif lo drop; }; }'",
    refuse_ipv6: "nft 'table inet t { chain c { type filter hook output priority filter; ip6 daddr ::1 tcp dport 7000 counter reject; }; }'; nft list ruleset | grep -q 'ip6 daddr ::1'",
};

/// What the pod's own connections tell of the rules, by [`Words::script`].
const EXPECTED: &str = "plain
filter:
owner, root: plain
owner, user:
redirected: plain
translated: plain
tracked
established: plain
not established:
IPv6 refused";

impl Words {
    /// Sets one rule after the other, and sees what becomes of connections; the last ones stay.
    fn script(&self) -> String {
        let Self {
            clear,
            refuse,
            refuse_user,
            redirect,
            dnat,
            tproxy,
            established,
            refuse_ipv6,
            ..
        } = self;
        format!(
            "said() {{ socat -u $1:$2 - 2> /dev/null || echo; }}
user() {{ su app -c \"socat -u TCP4:$1 -\" 2> /dev/null || echo; }}
plain=127.0.0.1:7000
{clear}; said TCP4 $plain
{refuse}; echo filter: $(said TCP4 $plain); {clear}
{refuse_user}; echo owner, root: $(said TCP4 $plain); echo owner, user: $(user $plain); {clear}
{redirect}; echo redirected: $(user 127.0.0.1:7002); {clear}
{dnat}; echo translated: $(user 192.0.2.1:80); {clear}
conntrack -L -d 192.0.2.1 2> /dev/null | grep -q dst=192.0.2.1 && echo tracked
{established}; echo established: $(user $plain); echo not established: $(user 127.0.0.1:7004,connect-timeout=5); {clear}
{refuse_ipv6} && echo IPv6 refused; {clear}
{refuse}; {tproxy}"
        )
    }
}

/// iptables, by nftables (`iptables`) or by its own tables (`iptables-legacy`).
macro_rules! iptables {
    ($name:literal, $iptables:literal, $ip6tables:literal) => {
        Words {
            name: $name,
            clear: concat!(
                "for t in filter nat mangle; do ", $iptables, " -t $t -F; ", $ip6tables, " -t $t -F; done; ",
                $iptables, " -P INPUT ACCEPT"
            ),
            refuse: concat!($iptables, " -A INPUT -p tcp --dport 7000 -j REJECT --reject-with tcp-reset"),
            refuse_user: concat!(
                $iptables,
                " -A OUTPUT -p tcp --dport 7000 -m owner --uid-owner 1000 -j REJECT --reject-with tcp-reset"
            ),
            redirect: concat!($iptables, " -t nat -A OUTPUT -p tcp --dport 7002 -j REDIRECT --to-ports 7000"),
            dnat: concat!(
                $iptables,
                " -t nat -A OUTPUT -d 192.0.2.1 -p tcp --dport 80 -j DNAT --to-destination 127.0.0.1:7000"
            ),
            tproxy: concat!(
                $iptables,
                " -t mangle -A PREROUTING -p tcp --dport 7003 -j TPROXY --on-port 7004 --tproxy-mark 1"
            ),
            established: concat!(
                $iptables, " -A INPUT -i lo -m conntrack --ctstate ESTABLISHED -j ACCEPT; ",
                $iptables, " -A INPUT -i lo -p tcp --dport 7000 -m conntrack --ctstate NEW -j ACCEPT; ",
                $iptables, " -A INPUT -i lo -j DROP"
            ),
            refuse_ipv6: concat!(
                $ip6tables, " -A OUTPUT -d ::1 -p tcp --dport 7000 -j REJECT; ", $ip6tables, " -S | grep -q REJECT"
            ),
        }
    };
}

#[test]
fn every_generation_of_netfilter_works() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let pod = Pod::start(&hull, "ruled", POD);
    let ip = pod.addresses()[0];
    let outside = |port| said_outside(SocketAddr::new(ip, port));
    eventually("the servers are there", Duration::from_secs(3), || {
        (outside(7000) == "plain" && outside(7004) == "caught").then_some(())
    });
    // What TPROXY catches is taken for the pod's own.
    let _ = pod.sh(
        "admin",
        "ip rule add fwmark 1 lookup 100; ip route add local default dev lo table 100",
    );
    let unprivileged = pod.exec(
        "user",
        "nft list ruleset || iptables -S || iptables-legacy -S",
    );
    assert!(!unprivileged.status.success(), "{unprivileged:?}");
    assert_eq!(outside(7003), "", "nobody is there");

    for words in [
        NFT,
        iptables!("iptables-nft", "iptables", "ip6tables"),
        iptables!("iptables-legacy", "iptables-legacy", "ip6tables-legacy"),
    ] {
        let tool = words.name;
        assert_eq!(pod.sh("admin", &words.script()), EXPECTED, "{tool}");
        assert_eq!(outside(7000), "", "{tool}: filter, from outside");
        assert_eq!(outside(7003), "caught", "{tool}: TPROXY");
        let _ = pod.sh("admin", words.clear);
        assert_eq!(outside(7000), "plain", "{tool}: no rules");
        assert_eq!(outside(7003), "", "{tool}: no rules");
    }
}
