//! `hull port-forward`: ports of this host that lead into a pod, as long as the command runs.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use hull_pod::client::Client;
use hull_pod::state::{Liveness, PodDir};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

use crate::Host;
use crate::failure::Failure;
use crate::pods;

/// Connections at a time, below what a supervisor serves. More wait to be accepted.
const CONNECTIONS: usize = 200;
/// After a failure to accept (no descriptors, no memory), so that it isn't tried without a pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Forward ports of this host to a pod until Ctrl-C, or the pod's end
///
/// The pod sees connections from its own loopback, whatever its network.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to listen: addresses of this host
    #[arg(
        long,
        value_name = "ADDRESS",
        value_delimiter = ',',
        default_value = "127.0.0.1",
        value_parser = parse_address
    )]
    address: Vec<IpAddr>,
    /// Name or id
    pod: String,
    /// PORT, LOCAL:PORT, or :PORT for any free one here
    #[arg(required = true, value_name = "[LOCAL:]PORT")]
    ports: Vec<Ports>,
}

/// A port here and the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    /// 0: any.
    local: u16,
    remote: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| match text.parse() {
            Ok(port @ 1..) => Ok(port),
            _ => Err(format!("port {text:?} must be 1 to 65535")),
        };
        match text.split_once(':') {
            None => port(text).map(|port| Self {
                local: port,
                remote: port,
            }),
            Some((local, remote)) => Ok(Self {
                local: if local.is_empty() { 0 } else { port(local)? },
                remote: port(remote)?,
            }),
        }
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(IpAddr::from([127, 0, 0, 1])),
        text => text
            .parse()
            .map_err(|_| "must be localhost or an IP address".to_owned()),
    }
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let record = host.registry()?.find(&args.pod)?;
    if record.liveness == Liveness::Dead {
        return Err(Failure::Failed(format!(
            "pod {} is not running",
            record.status.name
        )));
    }
    pods::runtime()?.block_on(async {
        let watch = Client::connect(&record.dir)?;
        let listeners = listen(args).await?;
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        for (listener, ports) in listeners {
            let local = listener
                .local_addr()
                .map_err(|e| Failure::io("asking for an address", e))?;
            println!("Forwarding from {local} -> {}", ports.remote);
            let (dir, places) = (record.dir.clone(), Arc::clone(&places));
            tokio::spawn(accept(listener, local.port(), ports.remote, dir, places));
        }
        let mut interrupt =
            signal(SignalKind::interrupt()).map_err(|e| Failure::io("watching signals", e))?;
        tokio::select! {
            // It is the way to end this, and no failure.
            _ = interrupt.recv() => Ok(()),
            () = watch.ended() => Err(Failure::Failed(format!(
                "pod {} has ended",
                record.status.name
            ))),
        }
    })
}

/// All listeners, or none.
async fn listen(args: &Args) -> Result<Vec<(TcpListener, Ports)>, Failure> {
    let mut listeners = Vec::new();
    for ports in &args.ports {
        for ip in &args.address {
            let address = SocketAddr::from((*ip, ports.local));
            let listener = TcpListener::bind(address)
                .await
                .map_err(|e| Failure::io(format!("listening on {address}"), e))?;
            listeners.push((listener, *ports));
        }
    }
    Ok(listeners)
}

async fn accept(
    listener: TcpListener,
    local: u16,
    remote: u16,
    dir: PodDir,
    places: Arc<Semaphore>,
) {
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                println!("Handling connection for {local}");
                let dir = dir.clone();
                tokio::spawn(async move {
                    if let Err(failure) = forward(stream, remote, &dir).await {
                        failure.report();
                    }
                    drop(place);
                });
            }
            Err(error) => {
                Failure::io(format!("accepting a connection for {local}"), error).report();
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Carries one connection to its end, in both directions and with an end of its own in each.
async fn forward(mut stream: TcpStream, remote: u16, dir: &PodDir) -> Result<(), Failure> {
    // A client of its own: one that waits for the guest holds up no other.
    let socket = Client::connect(dir)?.forward(remote).await?;
    let mut pod = into_stream(StdUnixStream::from(socket))
        .map_err(|e| Failure::io("taking the connection to the pod", e))?;
    // Small writes are somebody's keystrokes.
    let _ = stream.set_nodelay(true);
    // Either side may break the connection off, which is between the two of them.
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut pod).await;
    Ok(())
}

fn into_stream(socket: StdUnixStream) -> io::Result<UnixStream> {
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_kubectl_reads_them() {
        let ports = |text: &str| text.parse::<Ports>();

        assert_eq!(
            ports("80"),
            Ok(Ports {
                local: 80,
                remote: 80
            })
        );
        assert_eq!(
            ports("8080:80"),
            Ok(Ports {
                local: 8080,
                remote: 80
            })
        );
        assert_eq!(
            ports(":80"),
            Ok(Ports {
                local: 0,
                remote: 80
            })
        );
        for text in ["", ":", "80:", "0", "0:80", "80:65536", "1:2:3", "x"] {
            assert!(ports(text).is_err(), "{text}");
        }
    }
}
