//! A stream of the supervisor's, connected to a TCP port in infra's network.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use hull_protocol::agent::ForwardRequest;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpSocket, TcpStream};

use super::on_own_thread;
use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result, shorten};
use crate::process::Process;

/// How long a connection may take. Who listens in the pod answers at once; only what a filter
/// drops does not.
const CONNECT: Duration = Duration::from_secs(5);
/// Each direction's.
const BUFFER: usize = 32 * 1024;

/// Where a connection is to go: the first of these that takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    port: u16,
    hosts: Vec<IpAddr>,
}

impl Target {
    pub fn new(request: &ForwardRequest) -> Result<Self> {
        let port = u16::try_from(request.port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| Error::Invalid(format!("{} is no TCP port", request.port)))?;
        let hosts = match request.host.as_str() {
            "" => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            host => vec![host.parse().map_err(|_| {
                Error::Invalid(format!("{:?} is no IP address", shorten(host, 100)))
            })?],
        };
        Ok(Self { port, hosts })
    }

    /// Connects from within infra's network.
    pub async fn connect(&self, infra: &Process) -> Result<TcpStream> {
        let infra = infra.clone();
        let wanted = self.hosts.clone();
        // A socket belongs to the namespace that it was made in.
        let sockets = on_own_thread(move || {
            infra
                .enter_network()
                .doing(|| "entering infra's network".into())?;
            Ok(wanted.iter().map(|host| socket(*host)).collect::<Vec<_>>())
        })
        .await?;
        self.connect_one_of(sockets).await
    }

    async fn connect_one_of(&self, sockets: Vec<io::Result<OwnedFd>>) -> Result<TcpStream> {
        let mut failure = None;
        for (host, socket) in self.hosts.iter().zip(sockets) {
            match connect(socket, SocketAddr::new(*host, self.port)).await {
                Ok(connection) => return Ok(connection),
                // The first tells most: ::1 fails wherever IPv6 is off.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let port = self.port;
        match failure {
            Some(error) if error.kind() != io::ErrorKind::ConnectionRefused => {
                Err(error).doing(|| format!("connecting to port {port} of the pod"))
            }
            _ => Err(Error::NothingListens { port }),
        }
    }
}

fn socket(host: IpAddr) -> io::Result<OwnedFd> {
    let family = match host {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

async fn connect(socket: io::Result<OwnedFd>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(StdTcpStream::from(socket?));
    tokio::time::timeout(CONNECT, socket.connect(to))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Copies both ways. The end of one direction is passed on, and the other goes on.
pub async fn copy(mut stream: Endpoint, mut connection: TcpStream) {
    // Interactive protocols come through here, in pieces that are complete.
    let _ = connection.set_nodelay(true);
    let copied = copy_bidirectional_with_sizes(&mut stream, &mut connection, BUFFER, BUFFER).await;
    if let Err(error) = copied {
        tracing::debug!("a forwarded connection broke: {error}");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn target(port: u32, host: &str) -> Result<Target> {
        Target::new(&ForwardRequest {
            port,
            host: host.into(),
            ..Default::default()
        })
    }

    async fn connect_here(target: &Target) -> Result<TcpStream> {
        let sockets = target.hosts.iter().map(|host| socket(*host)).collect();
        target.connect_one_of(sockets).await
    }

    #[test]
    fn a_target_is_a_port_and_an_address() {
        assert_eq!(target(80, "").unwrap().hosts.len(), 2);
        assert_eq!(
            target(80, "10.0.0.1").unwrap().hosts,
            [IpAddr::from([10, 0, 0, 1])]
        );
        for (port, host) in [
            (0, ""),
            (65_536, ""),
            (80, "localhost"),
            (80, "10.0.0.1:80"),
        ] {
            assert!(matches!(target(port, host), Err(Error::Invalid(_))));
        }
    }

    #[tokio::test]
    async fn a_listener_on_either_loopback_is_found() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(host).await.unwrap();
            let port = listener.local_addr().unwrap().port();

            let connected = connect_here(&target(port.into(), "").unwrap()).await;

            assert!(connected.is_ok(), "{host}: {connected:?}");
        }
    }

    #[tokio::test]
    async fn without_a_listener_it_says_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);

        let refused = connect_here(&target(port.into(), "").unwrap()).await;

        let text = refused.unwrap_err().to_string();
        assert_eq!(text, format!("nothing listens on port {port} of the pod"));
    }

    #[tokio::test]
    async fn one_direction_outlives_the_others_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connection = connect_here(&target(port.into(), "").unwrap())
            .await
            .unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let (ours, theirs) = (Endpoint::new(ours).unwrap(), Endpoint::new(theirs).unwrap());
        let copying = tokio::spawn(copy(theirs, connection));

        ours.write_all(b"question").await.unwrap();
        ours.shutdown_write().unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        server.write_all(&[7; 100_000]).await.unwrap();
        drop(server);
        let mut answer = Vec::new();
        let mut ours = ours;
        ours.read_to_end(&mut answer).await.unwrap();

        assert_eq!(question, "question");
        assert_eq!(answer.len(), 100_000);
        copying.await.unwrap();
    }
}
