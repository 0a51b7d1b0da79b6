//! Serves the agent's calls and takes its streams, whatever carries them.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hull_protocol::agent_ttrpc::create_agent;
use tokio::sync::{Notify, mpsc};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::container::stats::total_memory;
use crate::endpoint::Endpoint;
use crate::error::{Doing, Result};
use crate::growth::Growth;
use crate::pod::Pod;
use crate::process::Reaper;
use crate::service::{Service, boot_time};
use crate::streams::Streams;

/// Connections as they are accepted; the supervisor makes one for calls.
const WAITING_CONNECTIONS: usize = 16;

/// A running agent.
pub struct Agent {
    pub pod: Arc<Pod>,
    streams: Arc<Streams>,
    calls: mpsc::Sender<io::Result<Endpoint>>,
    /// Told when the supervisor asks for the end.
    pub shutdown: Arc<Notify>,
    /// Kept alive; in a lock only to be shared between threads.
    _server: Mutex<Server>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Agent")
            .field("pod", &self.pod)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Starts the agent, which keeps its files in `run`. `started` is when its
    /// process was.
    pub async fn start(run: PathBuf, started: Duration) -> Result<Self> {
        let reaper = Arc::new(Reaper::default());
        let streams = Arc::new(Streams::default());
        let pod = Arc::new(Pod::new(run, Arc::clone(&reaper), Arc::clone(&streams))?);
        tokio::spawn(reaper.run());
        // While the host is told that this is here, and says what it wants.
        tokio::spawn({
            let pod = Arc::clone(&pod);
            async move {
                if let Err(error) = pod.get_ready().await {
                    tracing::warn!("before the pod's beginning: {error}");
                }
            }
        });

        let shutdown = Arc::new(Notify::new());
        let service = Arc::new(Service {
            pod: Arc::clone(&pod),
            growth: Growth::new(total_memory()?),
            started,
            ready: boot_time(),
            shutdown: Arc::clone(&shutdown),
        });
        let (calls, mut accepted) = mpsc::channel(WAITING_CONNECTIONS);
        let listener = Listener::new(futures::stream::poll_fn(move |context| {
            accepted.poll_recv(context)
        }));
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(create_agent(service));
        server
            .start()
            .await
            .map_err(io::Error::other)
            .doing(|| "starting the service".into())?;
        Ok(Self {
            pod,
            streams,
            calls,
            shutdown,
            _server: Mutex::new(server),
        })
    }

    /// Serves calls on a connection.
    pub async fn serve_calls(&self, connection: Endpoint) {
        // The receiver lives as long as the server, which is as long as this.
        let _ = self.calls.send(Ok(connection)).await;
    }

    /// Takes a stdio stream.
    pub fn take_stream(&self, connection: Endpoint) {
        self.streams.accept(connection);
    }
}
