//! The supervisor's side of the agent: calls over the machine's vsock.
//!
//! The agent may be owned by its guest. Every call has an end in time, ttrpc bounds every message,
//! and nothing in an answer is used but as a number or a text to show.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use hull_machine::client::{ConnectError, Machine};
use hull_protocol::AGENT_PORT;
use hull_protocol::agent::{Empty, GetReadyRequest, HelloRequest, MemoryVolume, StartInfraRequest};
use hull_protocol::agent_ttrpc::AgentClient;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::net::UnixStream;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

use crate::metrics::Calls;
use crate::oci::InfraSpec;
use crate::timeline::GuestClock;

/// The agent is told a limit that is longer by this, so that ours is what ends a call, and says so.
const LATE: Duration = Duration::from_secs(1);
/// Random bytes for the guest's kernel: as many as it takes at once.
const ENTROPY: usize = 64;

mod amounts;
mod failure;
#[cfg(test)]
mod hostile;
pub mod network;
mod processes;
mod streams;

pub use amounts::{CpuStats, IoStats, MemoryStats, PidsStats, Stats};
pub use failure::AgentError;
use failure::{failure, shown, within};
pub use processes::{Disk, ExitStatus, Process, Root};
pub use streams::Stdio;

/// What the guest is to make of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestSize {
    /// Processors that it uses, at most 64: those that don't run yet are started. 0: those that run.
    pub vcpus: u8,
    /// Memory beyond what it has booted with, which the machine is given: containers' programs wait for it.
    pub added_memory_mib: u64,
}

/// What the guest says of itself. For people only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestInfo {
    pub agent_version: String,
    pub kernel_release: String,
    pub clock: GuestClock,
}

/// Makes connections to the guest's vsock ports.
#[async_trait]
pub trait Connect: Send + Sync {
    /// # Errors
    /// When the guest refuses, or has ended.
    async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError>;
}

#[async_trait]
impl Connect for Machine {
    async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        Machine::connect(self, port).await
    }
}

/// A running agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    machine: Arc<dyn Connect>,
    next_stream: Arc<AtomicU64>,
    limit: Duration,
    /// Read by each call for as long as it takes; see [`Self::hold`].
    calls: Arc<RwLock<()>>,
    taken: Arc<Calls>,
}

/// Keeps calls back until it is dropped.
#[derive(Debug)]
pub struct Hold {
    _calls: OwnedRwLockWriteGuard<()>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

impl Agent {
    /// Connects to the agent, which has said that it is ready. No call takes longer than `limit`,
    /// but for [`Self::wait`].
    ///
    /// # Errors
    /// When it doesn't take the connection in time.
    pub async fn connect(machine: Arc<dyn Connect>, limit: Duration) -> Result<Self, AgentError> {
        let stream = within("Connect", limit, async {
            machine
                .connect(AGENT_PORT)
                .await
                .map_err(AgentError::Connect)
        })
        .await?;
        // In a guest that was put aside others may still wait, of who had it then.
        let mut first = [0; 4];
        getrandom(&mut first, GetRandomFlags::empty())
            .map_err(|error| AgentError::Entropy(error.into()))?;
        let first = u64::from(u32::from_ne_bytes(first)).saturating_add(1);
        Ok(Self {
            client: AgentClient::new(Client::new(Socket::new(stream))),
            machine,
            next_stream: Arc::new(AtomicU64::new(first)),
            limit,
            calls: Arc::default(),
            taken: Arc::default(),
        })
    }

    /// Waits for the end of the calls that are under way, but for [`Self::wait`], and keeps others back: a
    /// guest that stands still answers none, and isn't to be taken for a broken one.
    pub async fn hold(&self) -> Hold {
        Hold {
            _calls: Arc::clone(&self.calls).write_owned().await,
        }
    }

    /// Gives the guest the time, random numbers of its own and its size, and hears what it is. The first call, in a
    /// machine that was cloned or restored, too.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn hello(&self, size: GuestSize) -> Result<GuestInfo, AgentError> {
        let mut entropy = vec![0; ENTROPY];
        // So few bytes come whole.
        getrandom(&mut entropy, GetRandomFlags::empty())
            .map_err(|error| AgentError::Entropy(error.into()))?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let request = HelloRequest {
            realtime_seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            realtime_nanoseconds: now.subsec_nanos(),
            entropy,
            vcpus: size.vcpus.into(),
            added_memory_mib: u32::try_from(size.added_memory_mib).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer = self
            .call("Hello", self.client.hello(self.context(), &request))
            .await?;
        Ok(GuestInfo {
            clock: GuestClock::of(&answer),
            agent_version: shown(&answer.agent_version),
            kernel_release: shown(&answer.kernel_release),
        })
    }

    /// Has the guest do ahead what pods like this one begin with: of [`crate::oci::usual`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn get_ready(&self, usual: &oci_spec::runtime::Spec) -> Result<(), AgentError> {
        let spec = serde_json::to_vec(usual).map_err(|error| AgentError::Protocol {
            call: "GetReady",
            message: error.to_string(),
        })?;
        let request = GetReadyRequest {
            spec,
            ..Default::default()
        };
        self.call("GetReady", self.client.get_ready(self.context(), &request))
            .await
            .map(drop)
    }

    /// Makes the pod's namespaces.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn start_infra(
        &self,
        infra: &InfraSpec,
        share_tag: &str,
        memory_volumes: &[crate::volumes::MemoryVolume],
    ) -> Result<(), AgentError> {
        let request = StartInfraRequest {
            hostname: infra.hostname.clone(),
            share_process_namespace: infra.share_process_namespace,
            sysctls: infra.sysctls.clone().into_iter().collect::<HashMap<_, _>>(),
            share_tag: share_tag.into(),
            memory_volumes: memory_volumes
                .iter()
                .map(|volume| MemoryVolume {
                    name: volume.name.clone(),
                    size_bytes: volume.size_bytes,
                    ..Default::default()
                })
                .collect(),
            shm_bytes: infra.shm_bytes,
            ..Default::default()
        };
        self.call(
            "StartInfra",
            self.client.start_infra(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Ends everything in the guest, and the machine.
    ///
    /// # Errors
    /// See [`AgentError`]. [`AgentError::Lost`] is what success may look like.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        self.call(
            "Shutdown",
            self.client.shutdown(self.context(), &Empty::default()),
        )
        .await
        .map(drop)
    }

    fn context(&self) -> Context {
        ttrpc::context::with_duration(self.limit + LATE)
    }

    async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, AgentError> {
        let _call = self.calls.read().await;
        let begun = Instant::now();
        let answer = within(call, self.limit, async {
            answer.await.map_err(|error| failure(call, error))
        })
        .await;
        self.taken.record(call, begun.elapsed(), answer.is_ok());
        answer
    }

    /// How long calls have taken so far.
    #[must_use]
    pub fn taken(&self) -> &Arc<Calls> {
        &self.taken
    }
}
