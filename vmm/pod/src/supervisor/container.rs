//! One container, from its first start to its last end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container as Manifest;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::PodContext;
use super::backoff::Backoff;
use super::failure::PodFailure;
use super::network::RewireError;
use super::output::{Attachment, Output};
use super::record::Record;
use super::stop::Stop;
use crate::agent::{AgentError, ExitStatus, Process, Root};
use crate::events::EventType;
use crate::images::Image;
use crate::logs::LogWriter;
use crate::manifest::{PodManifest, RestartPolicy};
use crate::oci::{self, ContainerSpec};
use crate::state::{ContainerState, ContainerStatus, Running, Terminated, Waiting};
use crate::supervisor::api::Size;
use crate::text::chain;
use crate::timeline::Mark;
use crate::volumes::Share;

const SIGKILL: u32 = 9;
/// Until somebody attaches and says how large theirs is.
const TERMINAL: Size = Size {
    columns: 80,
    rows: 24,
};

/// What a container is made of; kept for every time that it is started.
#[derive(Debug)]
pub struct Prepared {
    pub name: String,
    pub image: Image,
    pub spec: ContainerSpec,
    pub role: Role,
    pub begin: Begin,
    /// What the names of its root file systems begin with (see [`rootfs`]). No container of the pod has
    /// had the same, whatever it was called.
    root: String,
}

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs to its end before the others start.
    Init,
    /// Of the manifest: its end counts.
    Main,
    /// Has joined the running pod: restarts by a policy of its own, and its end is nobody else's.
    Joined(RestartPolicy),
}

/// Where a container begins, by its status: also one of a pod that was put aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// It is started, for this many times before.
    Start { restart: u32 },
    /// It runs, in a machine that was put aside.
    Running { restart: u32, started_at: Timestamp },
}

impl Begin {
    /// None: it has ended for good.
    #[must_use]
    pub fn of(status: &ContainerStatus) -> Option<Self> {
        let restart = status.restart_count;
        match &status.state {
            _ if status.finished => None,
            ContainerState::Running(running) => Some(Self::Running {
                restart,
                started_at: running.started_at,
            }),
            // It counts as restarted when it no longer waits for that.
            ContainerState::Waiting(waiting) if waiting.reason == "CrashLoopBackOff" => {
                Some(Self::Start {
                    restart: restart.saturating_add(1),
                })
            }
            ContainerState::Waiting(_) => Some(Self::Start { restart }),
            ContainerState::Terminated(_) => Some(Self::Start {
                restart: restart.saturating_add(1),
            }),
        }
    }

    #[must_use]
    pub fn restart(self) -> u32 {
        match self {
            Self::Start { restart } | Self::Running { restart, .. } => restart,
        }
    }
}

impl Prepared {
    /// Makes ready all that a container needs but its machine: its specification, and its root file
    /// system in the share, by the name `root`: that of a container which runs is as it was. Blocks.
    ///
    /// # Errors
    /// When manifest and image don't fit together, or the root can't be mounted.
    pub fn new(
        manifest: &PodManifest,
        container: &Manifest,
        image: Image,
        role: Role,
        share: &Share,
        root: &str,
        record: &Record,
    ) -> Result<Self, PodFailure> {
        let name = container.name.clone();
        let spec = oci::container(manifest, container, &image, record.dir().id().as_str())
            .map_err(|source| PodFailure::Spec {
                container: name.clone(),
                source,
            })?;
        let begin = record
            .read(|status| status.container(&name).and_then(Begin::of))
            .unwrap_or(Begin::Start { restart: 0 });
        match begin {
            Begin::Start { restart: 0 } => share.mount_root(&rootfs(root, 0), &image)?,
            // With its start.
            Begin::Start { .. } => {}
            Begin::Running { restart, .. } => share.remount_root(&rootfs(root, restart), &image)?,
        }
        record.update_container(&name, |status| {
            // What was resolved by its id keeps the name that it had.
            if status.image_id.is_none() {
                status.image.clone_from(&image.reference);
            }
            status.image_id = Some(image.id.clone());
        });
        Ok(Self {
            name,
            image,
            spec,
            role,
            begin,
            root: root.to_owned(),
        })
    }
}

/// A container's life.
#[derive(Debug)]
pub struct Container {
    pub pod: Arc<PodContext>,
    pub prepared: Prepared,
    /// When it is to end: with the pod, or before.
    pub stop: Stop,
    pub attachment: Option<Attachment>,
}

impl Container {
    /// One of the manifest.
    pub fn new(pod: &Arc<PodContext>, prepared: Prepared) -> Self {
        Self {
            pod: Arc::clone(pod),
            prepared,
            stop: pod.stop.clone(),
            attachment: None,
        }
    }

    /// Runs the container until it has ended for good, and returns its last exit code. `started`
    /// is told when the first start has been tried.
    ///
    /// # Errors
    /// When the agent is lost, and so the pod.
    pub async fn run(mut self, started: oneshot::Sender<()>) -> Result<i32, PodFailure> {
        let mut attachment = self.attachment.take();
        let role = self.prepared.role;
        let name = self.prepared.name.as_str();
        let record = &self.pod.record;
        let mut started = Some(started);
        let mut backoff = Backoff::default();
        let mut begin = self.prepared.begin;
        let mut restart = begin.restart();
        loop {
            let begun = Instant::now();
            // From its end to the next `await` nobody sees a status that isn't true any more.
            let end = self.once(begin, &mut started, attachment.take()).await?;
            let code = end.exit_code;
            let again = !self.stop.is_requested()
                && restarts(self.pod.manifest.restart_policy(), role, code);
            record.update(|status| {
                if !again && role.fails_its_pod(code) && status.first_failure.is_none() {
                    status.first_failure = Some(code);
                }
                if let Some(container) = status.container_mut(name) {
                    container.state = ContainerState::Terminated(end.clone());
                    container.finished = !again;
                }
            });
            if !again {
                return Ok(code);
            }
            let wait = backoff.next(begun.elapsed());
            if !wait.is_zero() && !self.back_off(wait, &end).await {
                record.update(|status| {
                    if role.fails_its_pod(code) && status.first_failure.is_none() {
                        status.first_failure = Some(code);
                    }
                    if let Some(container) = status.container_mut(name) {
                        container.state = ContainerState::Terminated(end);
                        container.finished = true;
                    }
                });
                return Ok(code);
            }
            restart += 1;
            begin = Begin::Start { restart };
            record.update_container(name, |container| {
                container.last_state = Some(ContainerState::Terminated(end));
                container.restart_count = restart;
                container.state = waiting("ContainerCreating", None);
            });
        }
    }

    /// Waits before a restart. False: the pod is to end.
    async fn back_off(&self, wait: Duration, end: &Terminated) -> bool {
        let name = self.prepared.name.as_str();
        let message = format!(
            "back-off {} s before container {name} is started again",
            wait.as_secs()
        );
        let record = &self.pod.record;
        record.event(EventType::Warning, "BackOff", Some(name), &message);
        record.update_container(name, |container| {
            container.last_state = Some(ContainerState::Terminated(end.clone()));
            container.state = waiting("CrashLoopBackOff", Some(message));
        });
        tokio::select! {
            () = tokio::time::sleep(wait) => true,
            () = self.stop.requested() => false,
        }
    }

    /// Starts the container once and waits for its end.
    async fn once(
        &self,
        begin: Begin,
        started: &mut Option<oneshot::Sender<()>>,
        attachment: Option<Attachment>,
    ) -> Result<Terminated, PodFailure> {
        let name = self.prepared.name.as_str();
        let record = &self.pod.record;
        let restart = begin.restart();
        let changing = self.pod.changes.read().await;
        let begun = match begin {
            Begin::Start { restart } => self.start(restart, attachment).await,
            Begin::Running { restart, .. } => self.take_up(restart).await,
        };
        let output = match begun {
            Ok(output) => output,
            Err(StartError::Agent(AgentError::Lost)) => return Err(PodFailure::AgentLost),
            Err(error) => {
                let message = chain(&error);
                record.event(EventType::Warning, "Failed", Some(name), &message);
                self.take_away(restart).await;
                tell(started);
                return Ok(Terminated {
                    exit_code: error.exit_code(),
                    signal: None,
                    reason: "StartError".into(),
                    message: Some(message),
                    started_at: None,
                    finished_at: Timestamp::now(),
                });
            }
        };
        let (started_at, reason, message) = match begin {
            Begin::Start { .. } => (
                Timestamp::now(),
                "Started",
                format!("started container {name}"),
            ),
            Begin::Running { started_at, .. } => {
                (started_at, "Restored", format!("container {name} goes on"))
            }
        };
        record.set_container(name, ContainerState::Running(Running { started_at }));
        record.event(EventType::Normal, reason, Some(name), &message);
        drop(changing);
        tell(started);

        let exit = self.wait().await?;
        let _changing = self.pod.changes.read().await;
        // All that it has printed is in the log before anybody hears of its end.
        output.drain(self.pod.limits.drain).await;
        let end = terminated(exit, started_at);
        let kind = if end.exit_code == 0 {
            EventType::Normal
        } else {
            EventType::Warning
        };
        let message = format!("container {name} ended with code {}", end.exit_code);
        record.event(kind, &end.reason, Some(name), &message);
        self.take_away(restart).await;
        Ok(end)
    }

    async fn start(
        &self,
        restart: u32,
        attachment: Option<Attachment>,
    ) -> Result<Output, StartError> {
        let Self { pod, prepared, .. } = self;
        let name = prepared.name.as_str();
        let rootfs = rootfs(&prepared.root, restart);
        // The first ones are mounted before the machine starts.
        if restart > 0 {
            let (share, image, rootfs) = (
                Arc::clone(&pod.share),
                prepared.image.clone(),
                rootfs.clone(),
            );
            tokio::task::spawn_blocking(move || share.mount_root(&rootfs, &image))
                .await
                .map_err(std::io::Error::from)
                .map_err(StartError::Log)??;
        }
        if let Some(addresses) = pod.network.look_again().await? {
            pod.record.update(|status| status.set_addresses(&addresses));
        }
        let timeline = pod.record.timeline();
        let step = timeline.step("create container");
        let size = attachment.as_ref().and_then(|attachment| attachment.size);
        let tty = prepared.spec.tty.then(|| size.unwrap_or(TERMINAL));
        let stdio = pod.agent.open_stdio(prepared.spec.stdin, tty).await?;
        pod.agent
            .create_container(
                name,
                &prepared.spec,
                &Root::Share(format!("rootfs/{rootfs}")),
                &stdio,
            )
            .await?;
        drop(step);
        let message = format!("created container {name}");
        pod.record
            .event(EventType::Normal, "Created", Some(name), &message);
        // The log reads before the process runs, so that it never waits for us.
        let log = LogWriter::create(&pod.record.dir().container_logs(name), restart)?;
        let output = Output::copy(stdio, log, name, attachment, timeline.clone())
            .map_err(StartError::Log)?;
        let step = timeline.step("start container");
        pod.agent.start_container(name).await?;
        drop(step);
        timeline.mark(Mark::Exec);
        Ok(output)
    }

    /// Gives a container that runs streams again.
    async fn take_up(&self, restart: u32) -> Result<Output, StartError> {
        let Self { pod, prepared, .. } = self;
        let name = prepared.name.as_str();
        let tty = prepared.spec.tty.then_some(TERMINAL);
        let stdio = pod.agent.open_stdio(prepared.spec.stdin, tty).await?;
        pod.agent.attach(name, &stdio).await?;
        let log = LogWriter::create(&pod.record.dir().container_logs(name), restart)?;
        let timeline = pod.record.timeline().clone();
        Output::copy(stdio, log, name, None, timeline).map_err(StartError::Log)
    }

    /// Waits for the process's end, and brings it about when the pod is to end.
    async fn wait(&self) -> Result<ExitStatus, PodFailure> {
        let Self {
            pod,
            prepared,
            stop,
            ..
        } = self;
        let process = Process::Container(&prepared.name);
        let wait = pod.agent.wait(process);
        tokio::pin!(wait);
        tokio::select! {
            exit = &mut wait => return exit.map_err(PodFailure::from),
            () = stop.requested() => {}
        }

        let message = format!("stopping container {}", prepared.name);
        pod.record
            .event(EventType::Normal, "Killing", Some(&prepared.name), &message);
        let stop_signal = prepared.spec.stop_signal;
        // A process that has just ended is what is wanted: then `wait` tells.
        let _ = pod.agent.signal(process, stop_signal, false).await;
        tokio::select! {
            exit = &mut wait => return exit.map_err(PodFailure::from),
            () = stop.deadline() => {}
        }
        let _ = pod.agent.signal(process, SIGKILL, true).await;
        match timeout(pod.limits.end, wait).await {
            Ok(exit) => exit.map_err(PodFailure::from),
            // It goes with the machine.
            Err(_) => Ok(ExitStatus {
                code: 137,
                signal: Some(9),
                oom_killed: false,
            }),
        }
    }

    /// Removes what is left of one start. When the pod ends, that goes with the machine.
    async fn take_away(&self, restart: u32) {
        let Self { pod, prepared, .. } = self;
        if pod.stop.is_requested() {
            return;
        }
        // Not found: it was never created.
        if let Err(error) = pod.agent.remove_container(&prepared.name).await {
            tracing::warn!(container = prepared.name, error = chain(&error), "removing");
        }
        let (share, rootfs) = (Arc::clone(&pod.share), rootfs(&prepared.root, restart));
        let removed = tokio::task::spawn_blocking(move || share.unmount_root(&rootfs)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(container = prepared.name, error = chain(&error), "removing");
        }
    }
}

/// The name of a root file system below `rootfs/`: another one for each start, so that what the
/// guest remembers of the last never shows in this one. A dot is in no container's name.
fn rootfs(root: &str, restart: u32) -> String {
    match restart {
        0 => root.to_owned(),
        restart => format!("{root}.{restart}"),
    }
}

/// Why a container was not started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("its network")]
    Network(#[source] RewireError),
    #[error("its root file system")]
    Root(#[from] crate::volumes::VolumeError),
    #[error("its log")]
    State(#[from] crate::state::StateError),
    #[error("its log")]
    Log(#[source] std::io::Error),
}

impl From<RewireError> for StartError {
    fn from(error: RewireError) -> Self {
        match error {
            RewireError::Agent(error) => Self::Agent(error),
            error => Self::Network(error),
        }
    }
}

impl StartError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Agent(error) => error.exit_code(),
            _ => 128,
        }
    }
}

fn tell(started: &mut Option<oneshot::Sender<()>>) {
    if let Some(started) = started.take() {
        // Nobody waits any more when the pod ends.
        let _ = started.send(());
    }
}

fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    ContainerState::Waiting(Waiting {
        reason: reason.into(),
        message,
    })
}

fn terminated(exit: ExitStatus, started_at: Timestamp) -> Terminated {
    let reason = match exit {
        ExitStatus {
            oom_killed: true, ..
        } => "OOMKilled",
        ExitStatus { code: 0, .. } => "Completed",
        _ => "Error",
    };
    Terminated {
        exit_code: exit.code,
        signal: exit.signal,
        reason: reason.into(),
        message: None,
        started_at: Some(started_at),
        finished_at: Timestamp::now(),
    }
}

impl Role {
    fn fails_its_pod(self, code: i32) -> bool {
        code != 0 && !matches!(self, Self::Joined(_))
    }
}

/// An init container of an Always pod is done when it has succeeded.
fn restarts(pods: RestartPolicy, role: Role, code: i32) -> bool {
    let policy = match role {
        Role::Init | Role::Main => pods,
        Role::Joined(own) => own,
    };
    match policy {
        RestartPolicy::Always => role != Role::Init || code != 0,
        RestartPolicy::OnFailure => code != 0,
        RestartPolicy::Never => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_decide_on_restarts() {
        use RestartPolicy::{Always, Never, OnFailure};
        use Role::{Init, Joined, Main};

        assert!(restarts(Always, Main, 0) && restarts(Always, Main, 1));
        assert!(!restarts(Always, Init, 0) && restarts(Always, Init, 1));
        assert!(!restarts(OnFailure, Main, 0) && restarts(OnFailure, Main, 1));
        assert!(!restarts(Never, Main, 0) && !restarts(Never, Main, 1));
        assert!(!restarts(Always, Joined(Never), 1) && restarts(Never, Joined(Always), 0));
    }

    #[test]
    fn who_has_joined_fails_alone() {
        assert!(Role::Main.fails_its_pod(1) && !Role::Main.fails_its_pod(0));
        assert!(!Role::Joined(RestartPolicy::Never).fails_its_pod(1));
    }

    #[test]
    fn ends_are_named_as_in_kubernetes() {
        let end = |code, oom_killed| {
            let exit = ExitStatus {
                code,
                signal: None,
                oom_killed,
            };
            terminated(exit, Timestamp::UNIX_EPOCH).reason
        };

        assert_eq!(end(0, false), "Completed");
        assert_eq!(end(3, false), "Error");
        assert_eq!(end(137, true), "OOMKilled");
    }

    #[test]
    fn a_container_goes_on_where_its_status_says() {
        let mut status = ContainerStatus::new("web", "busybox");
        assert_eq!(Begin::of(&status), Some(Begin::Start { restart: 0 }));

        status.restart_count = 2;
        let started_at = Timestamp::UNIX_EPOCH;
        status.state = ContainerState::Running(Running { started_at });
        let running = Begin::Running {
            restart: 2,
            started_at,
        };
        assert_eq!(Begin::of(&status), Some(running));
        status.state = waiting("CrashLoopBackOff", None);
        assert_eq!(Begin::of(&status), Some(Begin::Start { restart: 3 }));
        status.finished = true;
        assert_eq!(Begin::of(&status), None);
    }

    #[test]
    fn each_start_has_a_root_of_its_own() {
        assert_eq!(rootfs("web", 0), "web");
        assert_eq!(rootfs("web", 2), "web.2");
    }
}
