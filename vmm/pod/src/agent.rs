//! The supervisor's side of the agent: calls over the machine's vsock, and stdio streams.
//!
//! The agent may be owned by its guest. Every call has an end in time, ttrpc bounds every message,
//! and nothing in an answer is used but as a number or a text to show.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use hull_machine::client::{ConnectError, Machine};
pub use hull_protocol::agent::Disk;
use hull_protocol::agent::{
    AttachRequest, CreateContainerRequest, Empty, ExecRequest, GetReadyRequest, HelloRequest,
    MemoryVolume, PidNamespace, ProcessesRequest, RemoveContainerRequest, RemoveExecRequest,
    ResizeRequest, SignalRequest, StartContainerRequest, StartInfraRequest, Streams, WaitRequest,
};
use hull_protocol::agent_ttrpc::AgentClient;
use hull_protocol::{AGENT_PORT, STREAM_MAGIC, STREAM_PORT};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};
use ttrpc::Code;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

use crate::metrics::Calls;
use crate::oci::{InfraSpec, Pids};
use crate::supervisor::api::Size;
use crate::text::{cut, printable};
use crate::timeline::GuestClock;

/// A text of the agent is cut to this many bytes.
const TEXT_MAX: usize = 1024;
/// The agent is told a limit that is longer by this, so that ours is what ends a call, and says so.
const LATE: Duration = Duration::from_secs(1);
/// Random bytes for the guest's kernel: as many as it takes at once.
const ENTROPY: usize = 64;
/// More processes than a container is told to have at most.
const PROCESSES_MAX: usize = 4096;

mod amounts;
#[cfg(test)]
mod hostile;
pub mod network;

pub use amounts::{CpuStats, IoStats, MemoryStats, PidsStats, Stats};

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("connecting to the agent")]
    Connect(#[source] ConnectError),
    #[error("getting random bytes for the guest")]
    Entropy(#[source] io::Error),
    #[error("sending a stream's number to the agent")]
    Stream(#[source] io::Error),
    #[error("the agent did not answer {call} within {} s", limit.as_secs())]
    TimedOut { call: &'static str, limit: Duration },
    #[error("the connection to the agent is lost")]
    Lost,
    /// The agent said no.
    #[error("{message}")]
    Refused { code: Code, message: String },
    /// Not a message of the protocol.
    #[error("{call}: {message}")]
    Protocol { call: &'static str, message: String },
}

impl AgentError {
    /// The code with which a shell says this, or 128 as runtimes say for what has never run.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Refused {
                code: Code::NOT_FOUND,
                ..
            } => 127,
            Self::Refused {
                code: Code::PERMISSION_DENIED,
                ..
            } => 126,
            _ => 128,
        }
    }
}

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

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    pub oom_killed: bool,
}

/// A process of the guest.
#[derive(Debug, Clone, Copy)]
pub enum Process<'a> {
    Infra,
    Container(&'a str),
    Exec { container: &'a str, exec: &'a str },
}

impl Process<'_> {
    fn ids(self) -> (String, String) {
        match self {
            Self::Infra => (String::new(), String::new()),
            Self::Container(id) => (id.into(), String::new()),
            Self::Exec { container, exec } => (container.into(), exec.into()),
        }
    }
}

/// Where a container's root file system is.
#[derive(Debug, Clone)]
pub enum Root {
    /// A path beneath the pod's share.
    Share(String),
    /// A disk of the machine, which the agent mounts.
    Disk(Disk),
}

/// The open streams of a process that is about to be made. What isn't there is not connected.
#[derive(Debug, Default)]
pub struct Stdio {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    request: Streams,
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

    /// Opens the streams of a process: standard input if wanted, standard output, and standard
    /// error unless it gets a terminal.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn open_stdio(&self, stdin: bool, tty: Option<Size>) -> Result<Stdio, AgentError> {
        let mut stdio = Stdio {
            request: Streams {
                tty: tty.is_some(),
                columns: tty.map_or(0, |size| size.columns.into()),
                rows: tty.map_or(0, |size| size.rows.into()),
                ..Default::default()
            },
            ..Default::default()
        };
        if stdin {
            let (number, stream) = self.open_stream().await?;
            (stdio.request.stdin, stdio.stdin) = (number, Some(stream));
        }
        let (number, stream) = self.open_stream().await?;
        (stdio.request.stdout, stdio.stdout) = (number, Some(stream));
        if tty.is_none() {
            let (number, stream) = self.open_stream().await?;
            (stdio.request.stderr, stdio.stderr) = (number, Some(stream));
        }
        Ok(stdio)
    }

    /// A stream of its own to the agent, in blocking mode, and its number.
    async fn open_stream(&self) -> Result<(u64, OwnedFd), AgentError> {
        let number = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let _call = self.calls.read().await;
        within("a stream", self.limit, async {
            let mut stream = self
                .machine
                .connect(STREAM_PORT)
                .await
                .map_err(AgentError::Connect)?;
            let mut header = [0; STREAM_MAGIC.len() + 8];
            header[..STREAM_MAGIC.len()].copy_from_slice(&STREAM_MAGIC);
            header[STREAM_MAGIC.len()..].copy_from_slice(&number.to_le_bytes());
            stream
                .write_all(&header)
                .await
                .map_err(AgentError::Stream)?;
            let stream = stream.into_std().map_err(AgentError::Stream)?;
            stream.set_nonblocking(false).map_err(AgentError::Stream)?;
            Ok((number, stream.into()))
        })
        .await
    }

    /// Prepares a container, with streams of [`Self::open_stdio`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn create_container(
        &self,
        id: &str,
        spec: &crate::oci::ContainerSpec,
        root: &Root,
        stdio: &Stdio,
    ) -> Result<(), AgentError> {
        let json = serde_json::to_vec(&spec.spec).map_err(|error| AgentError::Protocol {
            call: "CreateContainer",
            message: error.to_string(),
        })?;
        let (rootfs, disk) = match root {
            Root::Share(path) => (path.clone(), None),
            Root::Disk(disk) => (String::new(), Some(disk.clone())),
        };
        let (pid_namespace, pid_target) = match &spec.pids {
            Pids::AsPod => (PidNamespace::DEFAULT, ""),
            Pids::Own => (PidNamespace::OWN, ""),
            Pids::Pod => (PidNamespace::INFRA, ""),
            Pids::Of(container) => (PidNamespace::CONTAINER, container.as_str()),
        };
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: json,
            rootfs,
            disk: disk.into(),
            pid_namespace: pid_namespace.into(),
            pid_target: pid_target.into(),
            user: spec.user.clone(),
            additional_gids: spec.additional_gids.clone(),
            exact_groups: spec.exact_groups,
            streams: Some(stdio.request.clone()).into(),
            ..Default::default()
        };
        self.call(
            "CreateContainer",
            self.client.create_container(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Gives a container that runs other streams, of [`Self::open_stdio`], in place of those that it has lost.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn attach(&self, id: &str, stdio: &Stdio) -> Result<(), AgentError> {
        let request = AttachRequest {
            container_id: id.into(),
            streams: Some(stdio.request.clone()).into(),
            ..Default::default()
        };
        self.call("Attach", self.client.attach(self.context(), &request))
            .await
            .map(drop)
    }

    /// # Errors
    /// See [`AgentError`].
    pub async fn start_container(&self, id: &str) -> Result<(), AgentError> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.call(
            "StartContainer",
            self.client.start_container(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Forgets a container that has ended.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn remove_container(&self, id: &str) -> Result<(), AgentError> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.call(
            "RemoveContainer",
            self.client.remove_container(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Runs a further process in a container, with streams of [`Self::open_stdio`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn exec(
        &self,
        id: &str,
        exec: &crate::supervisor::api::Exec,
        stdio: &Stdio,
    ) -> Result<(), AgentError> {
        let request = ExecRequest {
            container_id: exec.container.clone(),
            exec_id: id.into(),
            args: exec.args.clone(),
            env: exec.env.clone(),
            cwd: exec.cwd.clone().unwrap_or_default(),
            user: exec.user.clone().unwrap_or_default(),
            streams: Some(stdio.request.clone()).into(),
            ..Default::default()
        };
        self.call("Exec", self.client.exec(self.context(), &request))
            .await
            .map(drop)
    }

    /// Forgets an exec that has ended.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn remove_exec(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = RemoveExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.call(
            "RemoveExec",
            self.client.remove_exec(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Sends a signal to a process, or to `all` of its container.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn signal(
        &self,
        process: Process<'_>,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let (container_id, exec_id) = process.ids();
        let request = SignalRequest {
            container_id,
            exec_id,
            signal,
            all,
            ..Default::default()
        };
        self.call("Signal", self.client.signal(self.context(), &request))
            .await
            .map(drop)
    }

    /// Waits for the end of a process, as long as it takes.
    ///
    /// # Errors
    /// [`AgentError::Lost`] when the agent or its machine has ended.
    pub async fn wait(&self, process: Process<'_>) -> Result<ExitStatus, AgentError> {
        let (container_id, exec_id) = process.ids();
        let request = WaitRequest {
            container_id,
            exec_id,
            ..Default::default()
        };
        let answer = self
            .client
            .wait(Context::default(), &request)
            .await
            .map_err(|error| failure("Wait", error))?;
        Ok(ExitStatus {
            // What is no exit code of Linux is not one here.
            code: i32::try_from(answer.exit_code)
                .ok()
                .filter(|code| (0..=255).contains(code))
                .unwrap_or(255),
            signal: i32::try_from(answer.signal)
                .ok()
                .filter(|signal| (1..=64).contains(signal)),
            oom_killed: answer.oom_killed,
        })
    }

    /// # Errors
    /// See [`AgentError`].
    pub async fn resize(&self, process: Process<'_>, size: Size) -> Result<(), AgentError> {
        let (container_id, exec_id) = process.ids();
        let request = ResizeRequest {
            container_id,
            exec_id,
            columns: size.columns.into(),
            rows: size.rows.into(),
            ..Default::default()
        };
        self.call("Resize", self.client.resize(self.context(), &request))
            .await
            .map(drop)
    }

    /// The processes of a container, as the guest numbers them. At most 4096.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn processes(&self, container: &str) -> Result<Vec<u32>, AgentError> {
        let request = ProcessesRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let answer = self
            .call("Processes", self.client.processes(self.context(), &request))
            .await?;
        let mut pids = answer.pids;
        pids.truncate(PROCESSES_MAX);
        Ok(pids)
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

async fn within<T>(
    call: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, AgentError>>,
) -> Result<T, AgentError> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(AgentError::TimedOut { call, limit }))
}

fn failure(call: &'static str, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => AgentError::Refused {
            code: status.code(),
            message: shown(status.message()),
        },
        ttrpc::Error::Socket(_)
        | ttrpc::Error::RemoteClosed
        | ttrpc::Error::LocalClosed
        | ttrpc::Error::Eof => AgentError::Lost,
        other => AgentError::Protocol {
            call,
            message: shown(&other.to_string()),
        },
    }
}

fn shown(text: &str) -> String {
    printable(cut(text, TEXT_MAX).as_bytes())
}
