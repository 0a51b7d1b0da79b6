//! Ports of a pod that are the host's, too: `ports[].hostPort` and `hull run --publish`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::manifest::PodManifest;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// As netavark, and podman's `--publish`, spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port of the host that leads to one of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    /// None, also for 0.0.0.0 and `::`: every address of the host, of both families. netavark has no
    /// word for all of one family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
}

/// A publication and where it was asked for: field and value, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub origin: String,
    pub publication: Publication,
}

impl Asked {
    /// All of a manifest that has been checked.
    #[must_use]
    pub fn of_manifest(manifest: &PodManifest) -> Vec<Self> {
        let lists = [
            ("initContainers", manifest.init_containers()),
            ("containers", manifest.containers()),
        ];
        let mut all = Vec::new();
        for (list, containers) in lists {
            for (c, container) in containers.iter().enumerate() {
                for (p, port) in container.ports.iter().flatten().enumerate() {
                    let host_port = port.host_port.unwrap_or(0);
                    let (Ok(host_port @ 1..), Ok(container_port)) =
                        (u16::try_from(host_port), u16::try_from(port.container_port))
                    else {
                        continue;
                    };
                    let protocol = match port.protocol.as_deref() {
                        Some("UDP") => Protocol::Udp,
                        _ => Protocol::Tcp,
                    };
                    all.push(Self {
                        origin: format!(
                            "{}: spec.{list}[{c}].ports[{p}].hostPort: {host_port}",
                            manifest.source
                        ),
                        publication: Publication {
                            host_ip: port
                                .host_ip
                                .as_deref()
                                .and_then(|ip| ip.parse().ok())
                                .and_then(one_address),
                            host_port,
                            container_port,
                            protocol,
                        },
                    });
                }
            }
        }
        all
    }

    /// One of the command line.
    #[must_use]
    pub fn by_flag(publication: Publication) -> Self {
        Self {
            origin: format!("--publish {publication}"),
            publication,
        }
    }

    /// One that a pod had when it was put aside.
    #[must_use]
    pub fn by_snapshot(publication: Publication) -> Self {
        Self {
            origin: format!("the snapshot's port {publication} (--publish gives others)"),
            publication,
        }
    }
}

impl Publication {
    /// Whether both would take the same port of the host.
    #[must_use]
    pub fn clashes(&self, other: &Self) -> bool {
        let meet = match (self.host_ip, other.host_ip) {
            (Some(one), Some(two)) => one == two,
            _ => true,
        };
        meet && self.host_port == other.host_port && self.protocol == other.protocol
    }

    /// Tries whether the port can be had: a program of the host that listens on it would hear nothing
    /// any more.
    ///
    /// # Errors
    /// Why it can't, in words.
    pub fn try_on_host(&self) -> Result<(), String> {
        let addresses = match self.host_ip {
            Some(ip) => vec![ip],
            None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        for ip in addresses {
            let address = SocketAddr::from((ip, self.host_port));
            let bound = match self.protocol {
                Protocol::Tcp => TcpListener::bind(address).map(drop),
                Protocol::Udp => UdpSocket::bind(address).map(drop),
            };
            match bound.map_err(|e| e.kind()) {
                Err(io::ErrorKind::AddrInUse) => {
                    return Err("a program of this host listens on that port".to_owned());
                }
                Err(io::ErrorKind::AddrNotAvailable) if self.host_ip.is_some() => {
                    return Err(format!("{ip} is no address of this host"));
                }
                // No IPv6, or no right to bind: says nothing of the port.
                _ => {}
            }
        }
        Ok(())
    }

    /// As podman lists it: `0.0.0.0:8080->80/tcp`.
    #[must_use]
    pub fn arrow(&self) -> String {
        let ip = self.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        format!(
            "{}->{}/{}",
            SocketAddr::from((ip, self.host_port)),
            self.container_port,
            self.protocol.as_str()
        )
    }
}

/// `[IP:]HOST:CONTAINER[/tcp|udp]`, an IPv6 address in brackets.
impl fmt::Display for Publication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(ip) => write!(f, "{}", SocketAddr::from((ip, self.host_port)))?,
            None => write!(f, "{}", self.host_port)?,
        }
        write!(f, ":{}/{}", self.container_port, self.protocol.as_str())
    }
}

impl FromStr for Publication {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "must be [IP:]HOST:CONTAINER[/tcp|udp], an IPv6 address in brackets";
        let (address, protocol) = match text.split_once('/') {
            None | Some((_, "tcp" | "TCP")) => (text, Protocol::Tcp),
            Some((_, "udp" | "UDP")) => (text, Protocol::Udp),
            Some((_, other)) => return Err(format!("protocol {other:?} must be tcp or udp")),
        };
        let address = address.split('/').next().unwrap_or_default();
        let (host, container_port) = address.rsplit_once(':').ok_or(FORM)?;
        let (host_ip, host_port) = match host.rsplit_once(':') {
            None => (None, host),
            Some((ip, port)) => {
                let bare = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
                let ip: IpAddr = match bare {
                    Some(six) => six.parse::<Ipv6Addr>().map(IpAddr::from),
                    None => ip.parse::<Ipv4Addr>().map(IpAddr::from),
                }
                .map_err(|_| FORM)?;
                (one_address(ip), port)
            }
        };
        Ok(Self {
            host_ip,
            host_port: parse_port(host_port)?,
            container_port: parse_port(container_port)?,
            protocol,
        })
    }
}

/// None: it stands for all addresses.
fn one_address(ip: IpAddr) -> Option<IpAddr> {
    (!ip.is_unspecified()).then_some(ip)
}

fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("port {text:?} must be 1 to 65535")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn publication(text: &str) -> Publication {
        text.parse().unwrap()
    }

    #[test]
    fn flags_are_read_and_written() {
        for text in [
            "8080:80/tcp",
            "127.0.0.1:53:5353/udp",
            "[::1]:8080:80/tcp",
            "1:65535/tcp",
        ] {
            assert_eq!(publication(text).to_string(), text);
        }
        for text in ["8080:80", "0.0.0.0:8080:80", "[::]:8080:80"] {
            assert_eq!(publication(text), publication("8080:80/tcp"));
        }
        assert_eq!(publication("8080:80").arrow(), "0.0.0.0:8080->80/tcp");
    }

    #[test]
    fn what_is_no_publication_is_refused() {
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:65536",
            "80:80/sctp",
            "x:80:80",
            "::1:80:80",
            "[127.0.0.1]:80:80",
            "80:80/tcp/udp",
            "1.2.3.4:80",
            "+1:80x",
        ] {
            assert!(text.parse::<Publication>().is_err(), "{text}");
        }
    }

    #[test]
    fn clashes_are_by_address_port_and_protocol() {
        let clash = |a: &str, b: &str| publication(a).clashes(&publication(b));

        assert!(clash("80:1", "80:2"));
        assert!(clash("80:1", "127.0.0.1:80:2"));
        assert!(clash("[::1]:80:1", "80:2"));
        assert!(clash("0.0.0.0:80:1", "127.0.0.1:80:2"));
        assert!(!clash("127.0.0.1:80:1", "127.0.0.2:80:2"));
        assert!(!clash("80:1/tcp", "80:1/udp"));
        assert!(!clash("80:1", "81:1"));
    }

    #[test]
    fn a_port_that_a_program_listens_on_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();

        let taken = publication(&format!("127.0.0.1:{port}:80")).try_on_host();
        let foreign = publication("192.0.2.1:8080:80").try_on_host();

        assert!(taken.unwrap_err().contains("listens"));
        assert!(foreign.unwrap_err().contains("192.0.2.1 is no address"));
    }

    #[test]
    fn a_manifests_ports_say_where_they_are() {
        let text = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: a, image: b, \
                    ports: [{containerPort: 1}, {containerPort: 53, hostPort: 5353, protocol: UDP, hostIP: 127.0.0.1}]}]}}";
        let manifest = manifest::parse("p.yaml", text).unwrap().remove(0);

        let asked = Asked::of_manifest(&manifest);

        assert_eq!(asked.len(), 1);
        assert_eq!(
            asked[0].origin,
            "p.yaml: spec.containers[0].ports[1].hostPort: 5353"
        );
        assert_eq!(asked[0].publication, publication("127.0.0.1:5353:53/udp"));
    }
}
