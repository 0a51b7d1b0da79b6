//! The agent's connections to the host.
//!
//! vsock knows no namespaces: any process of the guest may connect to these ports
//! where the kernel has a loopback for it. Only the host is let in.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hull_protocol::{AGENT_PORT, READY_PORT, STREAM_PORT};
use nix::sys::socket::sockopt::SocketError;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, socket};
use nix::sys::time::TimeVal;
use nix::{setsockopt_impl, sockopt_impl};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::endpoint::Endpoint;
use crate::error::{Doing, Result};
use crate::server::Agent;

/// For the host to take a connection. The kernel's own limit is 2 s, and a host that starts many machines at once may be busier
/// than that; how long this one may take is the host's to say.
const CONNECT_SECONDS: i64 = 3600;
/// `SO_VM_SOCKETS_CONNECT_TIMEOUT` of linux/vm_sockets.h, where a long has 64 bits.
const CONNECT_TIMEOUT: libc::c_int = 6;

sockopt_impl!(
    /// See [`CONNECT_SECONDS`].
    ConnectTimeout,
    SetOnly,
    libc::AF_VSOCK,
    CONNECT_TIMEOUT,
    TimeVal
);

/// Serves the agent over vsock. Returns when the host has gone.
pub async fn serve(agent: Arc<Agent>) -> Result<()> {
    let calls = listen(AGENT_PORT)?;
    let streams = listen(STREAM_PORT)?;
    tokio::spawn({
        let agent = Arc::clone(&agent);
        async move {
            loop {
                let connection = accept(&calls).await;
                agent.serve_calls(connection).await;
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let connection = accept(&streams).await;
            agent.take_stream(connection);
        }
    });
    // A reset is that of all connections, in a machine that goes on elsewhere: as a clone, or restored. Whoever has
    // it now is told, too.
    while host_until_it_goes().await? == Gone::Reset {}
    Ok(())
}

/// How the host went.
#[derive(Debug, PartialEq, Eq)]
enum Gone {
    Reset,
    Closed,
}

/// Tells the host that the agent is ready, and returns when it has gone.
async fn host_until_it_goes() -> Result<Gone> {
    let ready = connect(READY_PORT)
        .await
        .doing(|| "telling the host that the agent is ready".into())?;
    let doing = || "watching the connection to the host".into();
    // A reset is an error to poll, but nothing to read: a reader by itself would never wake.
    let interest = Interest::READABLE | Interest::ERROR;
    let watched = watch(&ready, interest).doing(doing)?;
    // Nothing comes on it but its end.
    let mut buffer = [0; 64];
    loop {
        let mut readiness = watched.ready(interest).await.doing(doing)?;
        match rustix::io::read(&watched, &mut buffer) {
            Ok(0) => return Ok(Gone::Closed),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => readiness.clear_ready(),
            // Whether the host is there the next connection tells.
            Err(_) => return Ok(Gone::Reset),
        }
    }
}

/// Connects to a port of the host.
async fn connect(port: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connection = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    setsockopt(
        &connection,
        ConnectTimeout,
        &TimeVal::new(CONNECT_SECONDS, 0),
    )?;
    let address = VsockAddr::new(VMADDR_CID_HOST, port);
    match nix::sys::socket::connect(connection.as_raw_fd(), &address) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let watched = watch(&connection, Interest::WRITABLE)?;
    // Only whether it is connected: what it is ready for is looked at by who has it next.
    let _ = watched.writable().await?;
    match getsockopt(&connection, SocketError)? {
        0 => Ok(connection),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn watch(connection: &OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let connection = connection.try_clone()?;
    // SAFETY: a descriptor that is owned stays what it is until it is dropped.
    unsafe { AsyncFd::register_with_interest(connection, interest) }.map_err(io::Error::from)
}

fn listen(port: u32) -> Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .doing(|| format!("listening on vsock port {port}"))
}

async fn accept(listener: &VsockListener) -> Endpoint {
    loop {
        match accept_one(listener).await {
            Ok(Some(connection)) => return connection,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!("accepting a connection: {error}");
                // Out of descriptors, most likely: others must get to close theirs.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept_one(listener: &VsockListener) -> io::Result<Option<Endpoint>> {
    let (stream, peer) = poll_fn(|context| listener.poll_accept_std(context)).await?;
    // SAFETY: into_raw_fd gives the descriptor away.
    let fd = unsafe { OwnedFd::from_raw_fd(stream.into_raw_fd()) };
    if peer.cid() != VMADDR_CID_HOST {
        tracing::warn!("a connection from vsock address {} was refused", peer.cid());
        return Ok(None);
    }
    Endpoint::new(fd).map(Some)
}
