//! Answers the pod's clients. They are the pod's own user, and bounded all the same.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hull_machine::channel::{AsyncChannel, ChannelError, Listener};
use tokio::sync::Semaphore;

use super::api::{Refusal, Reply, Request, Target};
use super::aside::{Aside, AsideError};
use super::exec;
use super::join::{self, Joins};
use super::limits::Limits;
use super::pause::{Pause, PauseError};
use super::record::Record;
use super::stop::Stop;
use crate::agent::{Agent, AgentError, Process};
use crate::metrics::{Identity, Manager, Meter, PodMetrics};
use crate::snapshots::Files;
use crate::state::PodStatus;
use crate::text::chain;

/// Clients at a time. More wait to be accepted.
const CLIENTS: usize = 300;
/// After a failure to accept (no descriptors, no memory), so that it isn't tried without a pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a client can reach.
#[derive(Debug)]
pub struct Service {
    pub record: Arc<Record>,
    pub stop: Stop,
    pub limits: Limits,
    /// There once the guest is up.
    pub agent: OnceLock<Agent>,
    /// As the agent.
    pub meter: OnceLock<Arc<Meter>>,
    pub pause: Arc<Pause>,
    pub aside: Aside,
    /// There once infra lives.
    pub joins: OnceLock<Joins>,
}

impl Service {
    /// Takes clients for as long as the pod lives.
    pub async fn listen(self: Arc<Self>, listener: Listener) {
        let places = Arc::new(Semaphore::new(CLIENTS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok(channel) => {
                    let service = Arc::clone(&self);
                    tokio::spawn(async move {
                        service.client(channel).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "accepting a client");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Serves one client to its end.
    pub async fn client(&self, channel: AsyncChannel) {
        if let Err(error) = self.converse(&channel).await {
            tracing::debug!(error = chain(&error), "a client");
        }
    }

    async fn converse(&self, channel: &AsyncChannel) -> Result<(), ChannelError> {
        let mut changes = self.record.changes();
        let mut follows = false;
        loop {
            let (request, descriptors) = tokio::select! {
                received = channel.receive::<Request>() => match received? {
                    Some(received) => received,
                    None => return Ok(()),
                },
                changed = changes.changed(), if follows => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    channel.send(&Reply::Changed, &[]).await?;
                    continue;
                }
            };
            let reply = match request {
                Request::Follow => {
                    follows = true;
                    changes.mark_unchanged();
                    Reply::Changed
                }
                Request::Stop { grace_seconds } => {
                    self.stop.request(grace_seconds.map(Duration::from_secs));
                    Reply::Done
                }
                Request::Pause => done(self.pause.pause().await),
                Request::Resume => done(self.pause.resume().await),
                Request::Snapshot => self.put_aside(descriptors, channel).await,
                Request::Metrics => self.measure().await,
                // None of these would come to an end.
                Request::Kill { .. }
                | Request::Exec(_)
                | Request::Join(_)
                | Request::Forward { .. }
                    if self.pause.is_on() =>
                {
                    paused(&self.record)
                }
                Request::Kill { target, signal } => match self.kill(&target, signal).await {
                    Ok(()) => Reply::Done,
                    Err(refused) => refused,
                },
                Request::Exec(request) => match self.running(&request.container) {
                    Ok(agent) => return exec::serve(agent, &request, channel, self.limits).await,
                    Err(refused) => refused,
                },
                Request::Join(request) => match self.joins.get() {
                    Some(joins) => return join::serve(joins, *request, channel).await,
                    None => not_up(),
                },
                Request::Forward { port } => match self.forward(port).await {
                    // The client's copy is the only one that stays.
                    Ok(stream) => {
                        channel.send(&Reply::Forwarded, &[stream.as_fd()]).await?;
                        continue;
                    }
                    Err(refused) => refused,
                },
                Request::Start { .. } | Request::Resize(_) => Reply::Refused {
                    kind: Refusal::Failed,
                    message: "this connection is not one for that".into(),
                },
            };
            channel.send(&reply, &[]).await?;
        }
    }

    async fn put_aside(&self, descriptors: Vec<OwnedFd>, channel: &AsyncChannel) -> Reply {
        let Some(files) = Files::of(descriptors) else {
            return Reply::Refused {
                kind: Refusal::Failed,
                message: "a snapshot takes other files".into(),
            };
        };
        // Who waits for an answer asks for nothing else.
        let given_up = async { while let Ok(Some(_)) = channel.receive::<Request>().await {} };
        match self.aside.put(files, self.limits.call, given_up).await {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Refused {
                kind: match error {
                    AsideError::Starting
                    | AsideError::Pause(PauseError::NotUp | PauseError::Ending) => {
                        Refusal::NotRunning
                    }
                    _ => Refusal::Failed,
                },
                message: chain(&error),
            },
        }
    }

    async fn measure(&self) -> Reply {
        // The number of a machine's process that has ended is soon another's.
        let lives = self.record.read(|status| status.vmm_pid.is_some());
        let meter = self.meter.get().filter(|_| lives).cloned();
        let record = Arc::clone(&self.record);
        let measured = tokio::task::spawn_blocking(move || {
            let identity = record.read(|status| Identity {
                manager: Manager::Hull,
                namespace: String::new(),
                name: status.name.clone(),
                id: status.id.to_string(),
            });
            let mut metrics = PodMetrics::measure(identity, meter.as_deref());
            let restarts = |status: &PodStatus| {
                let counts = status.all_containers().map(|c| u64::from(c.restart_count));
                counts.sum()
            };
            metrics.restarts = record.read(restarts);
            metrics
        });
        match measured.await {
            Ok(metrics) => Reply::Metrics(Box::new(metrics)),
            Err(error) => Reply::Refused {
                kind: Refusal::Failed,
                message: chain(&error),
            },
        }
    }

    async fn forward(&self, port: u16) -> Result<OwnedFd, Reply> {
        let agent = self.agent.get().ok_or_else(not_up)?;
        agent
            .forward(None, port)
            .await
            .map_err(|error| refusal(&error))
    }

    async fn kill(&self, target: &Target, signal: u32) -> Result<(), Reply> {
        let sent = match target {
            Target::Infra => {
                let agent = self.agent.get().ok_or_else(not_up)?;
                agent.signal(Process::Infra, signal, false).await
            }
            Target::Container(name) => {
                let agent = self.running(name)?;
                agent.signal(Process::Container(name), signal, false).await
            }
        };
        sent.map_err(|error| refusal(&error))
    }

    /// The agent, if a container runs.
    fn running(&self, container: &str) -> Result<&Agent, Reply> {
        let runs = self
            .record
            .read(|status| status.container(container).map(|c| c.is_running()));
        match runs {
            Some(true) => self.agent.get().ok_or_else(not_up),
            Some(false) => Err(Reply::Refused {
                kind: Refusal::NotRunning,
                message: format!("container {container} is not running"),
            }),
            None => Err(Reply::Refused {
                kind: Refusal::NotRunning,
                message: format!("the pod has no container {container:?}"),
            }),
        }
    }
}

fn done(result: Result<(), PauseError>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Refused {
            kind: match error {
                PauseError::NotUp | PauseError::Ending => Refusal::NotRunning,
                PauseError::Machine(_) => Refusal::Failed,
            },
            message: chain(&error),
        },
    }
}

fn paused(record: &Record) -> Reply {
    let name = record.read(|status| status.name.clone());
    Reply::Refused {
        kind: Refusal::NotRunning,
        message: format!("the pod is paused; `hull resume {name}` lets it go on"),
    }
}

fn not_up() -> Reply {
    Reply::Refused {
        kind: Refusal::NotRunning,
        message: "the pod's machine is not up; `hull events` tells how far it is".into(),
    }
}

/// What a client is told when the agent said no.
pub(super) fn refusal(error: &AgentError) -> Reply {
    let kind = match error.exit_code() {
        127 => Refusal::ProgramNotFound,
        126 => Refusal::ProgramNotExecutable,
        _ => Refusal::Failed,
    };
    Reply::Refused {
        kind,
        message: chain(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{Client, ClientError};
    use crate::configuration::Configuration;
    use crate::state::{Claim, ContainerStatus, Directories, Phase, Registry};
    use crate::supervisor::api::{Exec, Join};
    use crate::timeline::Recorder;

    /// A pod whose machine is not up, and a client of it.
    fn pod() -> (tempfile::TempDir, Arc<Service>, Client, std::fs::File) {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories::new(root.path().join("run"), root.path().join("data"));
        let registry = Registry::open(dirs, |_, _| Ok(())).unwrap();
        let containers = vec![ContainerStatus::new("one", "busybox")];
        let Claim { dir, status, lock } = registry
            .claim("web", "Always", vec![], containers, None)
            .unwrap();
        let listener = Listener::bind(&dir.socket()).unwrap();
        let record = Arc::new(Record::new(dir.clone(), status, Recorder::begin(None)).unwrap());
        let stop = Stop::new(Duration::from_secs(30));
        let pause = Arc::new(Pause::new(Arc::clone(&record), stop.clone()));
        let manifest = "{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {containers: [{name: one, image: busybox}]}}";
        let manifest = crate::manifest::parse("p.yaml", manifest)
            .unwrap()
            .remove(0);
        let service = Arc::new(Service {
            aside: Aside {
                changes: crate::supervisor::pod::Changes::default(),
                pause: Arc::clone(&pause),
                record: Arc::clone(&record),
                manifest: Arc::new(manifest),
                size: crate::oci::MachineSize {
                    vcpus: 1,
                    memory_mib: 256,
                },
                directories: registry.directories().clone(),
            },
            pause,
            record,
            stop,
            limits: Limits::of(&Configuration::default()),
            agent: OnceLock::new(),
            meter: OnceLock::new(),
            joins: OnceLock::new(),
        });
        tokio::spawn(Arc::clone(&service).listen(listener));
        let client = Client::connect(&dir).unwrap();
        (root, service, client, lock)
    }

    fn exec(container: &str) -> Exec {
        Exec {
            container: container.into(),
            args: vec!["true".into()],
            env: vec![],
            cwd: None,
            user: None,
            stdin: false,
            tty: None,
        }
    }

    fn assert_not_running<T>(result: Result<T, ClientError>) {
        assert!(matches!(
            result,
            Err(ClientError::Refused {
                kind: Refusal::NotRunning,
                ..
            })
        ));
    }

    #[tokio::test]
    async fn changes_are_told_to_who_follows() {
        let (_root, service, client, _lock) = pod();
        client.follow().await.unwrap();
        let first = client.changed().await.unwrap().unwrap();

        service
            .record
            .update(|status| status.phase = Phase::Running);
        let second = client.changed().await.unwrap().unwrap();

        assert_eq!(
            (first.phase, second.phase),
            (Phase::Pending, Phase::Running)
        );
    }

    #[tokio::test]
    async fn a_pod_that_boots_can_be_stopped() {
        let (_root, service, client, _lock) = pod();

        client.stop(Some(0)).await.unwrap();

        let limit = Duration::from_secs(5);
        tokio::time::timeout(limit, service.stop.deadline())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn what_does_not_run_takes_no_signals() {
        let (_root, _service, client, _lock) = pod();

        assert_not_running(client.kill(Target::Infra, 9).await);
        assert_not_running(client.kill(Target::Container("one".into()), 9).await);
        assert_not_running(client.kill(Target::Container("other".into()), 9).await);
    }

    #[tokio::test]
    async fn what_is_not_up_has_no_ports() {
        let (_root, _service, client, _lock) = pod();

        assert_not_running(client.forward(80).await);
    }

    #[tokio::test]
    async fn what_is_not_up_does_not_stand_still() {
        let (_root, _service, client, _lock) = pod();

        assert_not_running(client.pause().await);
        assert_not_running(client.resume().await);
    }

    #[tokio::test]
    async fn what_is_not_up_is_not_put_aside() {
        let (root, service, client, _lock) = pod();
        let directory = root.path().join("snapshot");
        let unfinished = crate::snapshots::Unfinished::begin(&directory).unwrap();

        assert_not_running(client.snapshot(&unfinished.files().unwrap()).await);
        service
            .record
            .update(|status| status.phase = Phase::Running);
        drop(unfinished);
        let unfinished = crate::snapshots::Unfinished::begin(&directory).unwrap();
        assert_not_running(client.snapshot(&unfinished.files().unwrap()).await);
    }

    #[tokio::test]
    async fn a_paused_pod_refuses_what_would_not_end() {
        let (_root, service, client, _lock) = pod();
        service.record.update(|status| status.paused = true);

        let refused = client.forward(80).await.unwrap_err().to_string();

        assert!(refused.contains("hull resume web"), "{refused}");
    }

    #[tokio::test]
    async fn nobody_joins_what_is_not_up() {
        let (_root, _service, client, _lock) = pod();

        assert_not_running(client.join(Join::default()).await);
    }

    #[tokio::test]
    async fn nothing_is_run_in_what_does_not_run() {
        let (_root, service, client, _lock) = pod();

        assert_not_running(client.exec(exec("one")).await);
        let other = Client::connect(service.record.dir()).unwrap();
        assert_not_running(other.exec(exec("other")).await);
    }
}
