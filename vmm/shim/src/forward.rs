//! What containerd connects to in the pod's network namespace: the CRI plugin forwards a port by connecting to
//! localhost there, where nothing of the pod listens, for that is in the guest.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hull_pod::agent::Agent;
use hull_pod::text::chain;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::steer::steer;

/// So many at once; who comes later waits.
const MAX_CONNECTIONS: usize = 128;
/// After an error that may pass, as when there are no more descriptors.
const AGAIN: Duration = Duration::from_millis(100);

/// Connections to localhost in this process's network namespace are the guest's, until it is dropped.
#[derive(Debug)]
pub struct Forwarding {
    accepting: JoinHandle<()>,
    _steering: OwnedFd,
}

impl Forwarding {
    /// # Errors
    /// When the kernel can't do it.
    pub async fn start(agent: Agent) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let steering = steer(&listener, &File::open("/proc/self/ns/net")?)?;
        Ok(Self {
            accepting: tokio::spawn(accept(listener, agent)),
            _steering: steering,
        })
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, agent: Agent) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::debug!(%error, "a connection to forward");
                sleep(AGAIN).await;
                continue;
            }
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            forward(connection, &agent).await;
            drop(place);
        });
    }
}

async fn forward(mut connection: TcpStream, agent: &Agent) {
    // The port that was asked for, although the socket is another's.
    let Ok(address) = connection.local_addr() else {
        return;
    };
    let port = address.port();
    let opened = agent.forward(None, port).await;
    let stream = opened.map_err(|error| chain(&error)).and_then(|stream| {
        let stream = std::os::unix::net::UnixStream::from(stream);
        stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream))
            .map_err(|error| chain(&error))
    });
    match stream {
        Ok(mut stream) => {
            // Either end may go at any time.
            let _ = copy_bidirectional(&mut connection, &mut stream).await;
        }
        Err(error) => {
            tracing::info!(port, error, "nothing to forward to");
            // The other end sees that nobody is there.
            let _ = connection.set_zero_linger();
        }
    }
}
