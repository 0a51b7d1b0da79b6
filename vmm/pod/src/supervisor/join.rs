//! Containers that join a pod while it runs: into infra's namespaces, as docker's
//! `--network container:NAME` has it.
//!
//! [`Joins::join`] takes a container as a manifest has it, with its image. What the pod's first
//! containers have, it has: root file system, log, events, status, an end with the pod.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_machine::channel::{AsyncChannel, ChannelError};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::PodContext;
use super::api::{Join, Refusal, Reply, Request, Streams};
use super::container::{Container, Prepared, Role};
use super::failure::PodFailure;
use super::output::Attachment;
use super::stop::Stop;
use crate::agent::Process;
use crate::images::{Image, ImageError, Store};
use crate::logs::StreamName;
use crate::manifest::{self, ManifestError};
use crate::state::{ContainerStatus, PodStatus, remove_tree};
use crate::text::chain;
use crate::volumes::{self, VolumeError};

/// Containers of a pod, ended ones and all: as many as the agent takes.
const MAX_CONTAINERS: usize = 256;

/// Why a container has not joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("the pod is ending; run it again first")]
    Ending,
    #[error(
        "container {0}: the pod has one of this name already, running or ended; choose another with --name"
    )]
    NameTaken(String),
    #[error(
        "the pod has had {MAX_CONTAINERS} containers; let those that join go at their end: --rm"
    )]
    TooMany,
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(
        "container {0}: the pod's runAsNonRoot needs a user by number, to tell that it isn't root"
    )]
    UserByName(String),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("connecting streams")]
    Streams(#[source] std::io::Error),
    #[error(transparent)]
    Pod(#[from] PodFailure),
    #[error("container {name} was not started: {message}")]
    NotStarted {
        name: String,
        message: String,
        /// As a shell says it.
        code: i32,
    },
}

impl JoinError {
    fn refusal(&self) -> Reply {
        let kind = match self {
            Self::Ending => Refusal::NotRunning,
            Self::NotStarted { code: 127, .. } => Refusal::ProgramNotFound,
            Self::NotStarted { code: 126, .. } => Refusal::ProgramNotExecutable,
            _ => Refusal::Failed,
        };
        Reply::Refused {
            kind,
            message: chain(self),
        }
    }
}

/// Lets containers join a pod whose infra lives.
#[derive(Debug)]
pub struct Joins {
    pod: Arc<PodContext>,
    /// Where the images are.
    data: PathBuf,
    /// How many are here, or on their way.
    members: watch::Sender<usize>,
    /// How many there have been.
    roots: AtomicU64,
}

/// A container that has joined, and was started.
#[derive(Debug)]
pub struct Member {
    pub name: String,
    /// To end it before the pod.
    pub stop: Stop,
    /// Its last exit code.
    pub end: JoinHandle<Result<i32, PodFailure>>,
}

/// Counted as long as it is held.
struct Place(watch::Sender<usize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.send_modify(|members| *members -= 1);
    }
}

impl Joins {
    pub fn new(pod: &Arc<PodContext>, data: &Path) -> Self {
        Self {
            pod: Arc::clone(pod),
            data: data.to_owned(),
            members: watch::Sender::new(0),
            roots: AtomicU64::new(0),
        }
    }

    /// Waits until all have ended. Nobody joins a pod that is to end, so that is for good then.
    pub async fn finished(&self) {
        // The sender is in `self`, so this can't fail.
        let _ = self.members.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Finds the image by its name, as it is in the store.
    async fn image(&self, reference: &str) -> Result<Image, JoinError> {
        let (data, reference) = (self.data.clone(), reference.to_owned());
        let resolve = move || Store::open(&data)?.resolve(&reference);
        Ok(tokio::task::spawn_blocking(resolve)
            .await
            .map_err(PodFailure::from)??)
    }

    /// Starts a container, and returns when it has been started. One that can't be leaves nothing
    /// but its events.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub async fn join(
        &self,
        mut join: Join,
        image: Image,
        attachment: Option<Attachment>,
    ) -> Result<Member, JoinError> {
        self.members.send_modify(|members| *members += 1);
        let place = Place(self.members.clone());
        self.claim_name(&mut join)?;
        let name = join.container.name.clone();
        let root = self.root(&name);
        let joined = self.start(join, image, attachment, place, &root).await;
        if joined.is_err() {
            forget(&self.pod, &name, &root).await;
        }
        joined
    }

    /// A name for root file systems that is new in the pod: the container's may come again, while the guest
    /// still remembers what was there.
    fn root(&self, container: &str) -> String {
        let number = self.roots.fetch_add(1, Ordering::Relaxed);
        format!("{container}.joined{number}")
    }

    fn claim_name(&self, join: &mut Join) -> Result<(), JoinError> {
        let mut claimed = Ok(());
        self.pod.record.update(|status| {
            claimed = free_name(status, &join.container.name).map(|name| {
                let image = join.container.image.clone().unwrap_or_default();
                status.joined.push(ContainerStatus::new(&name, image));
                join.container.name = name;
            });
        });
        claimed
    }

    async fn start(
        &self,
        join: Join,
        image: Image,
        attachment: Option<Attachment>,
        place: Place,
        root: &str,
    ) -> Result<Member, JoinError> {
        let remove = join.remove;
        let name = join.container.name.clone();
        let prepared = self.prepare(join, image, root.to_owned()).await?;
        if self.pod.stop.is_requested() {
            return Err(JoinError::Ending);
        }
        let container = Container {
            stop: self.pod.stop.part(),
            attachment,
            ..Container::new(&self.pod, prepared)
        };
        let stop = container.stop.clone();
        let (tell, started) = oneshot::channel();
        let (pod, member) = (Arc::clone(&self.pod), name.clone());
        let root = root.to_owned();
        let end = tokio::spawn(async move {
            let code = container.run(tell).await;
            if remove {
                forget(&pod, &member, &root).await;
            }
            drop(place);
            code
        });
        // When nobody tells, it has ended without a start: the agent is lost.
        let _ = started.await;
        if let Some((code, message)) = self.start_error(&name) {
            stop.request(Some(Duration::ZERO));
            end.await.map_err(PodFailure::from)??;
            return Err(JoinError::NotStarted {
                name,
                message,
                code,
            });
        }
        Ok(Member { name, stop, end })
    }

    async fn prepare(&self, join: Join, image: Image, root: String) -> Result<Prepared, JoinError> {
        let pod = Arc::clone(&self.pod);
        let prepare = move || {
            let Join {
                container,
                user,
                restart,
                ..
            } = join;
            manifest::check_joining(&pod.manifest, &container)?;
            volumes::check_joining(&pod.manifest, &container)?;
            let role = Role::Joined(restart);
            let (manifest, record) = (&pod.manifest, &pod.record);
            let mut prepared =
                Prepared::new(manifest, &container, image, role, &pod.share, &root, record)?;
            if let Some(user) = user {
                let context = manifest.spec().security_context.as_ref();
                if context.and_then(|context| context.run_as_non_root) == Some(true) {
                    return Err(JoinError::UserByName(container.name));
                }
                prepared.spec.user = user;
            }
            Ok(prepared)
        };
        tokio::task::spawn_blocking(prepare)
            .await
            .map_err(PodFailure::from)?
    }

    /// Why a container's first start failed, if it did.
    fn start_error(&self, name: &str) -> Option<(i32, String)> {
        self.pod.record.read(|status| {
            let container = status.container(name)?;
            let last = container.last_state.as_ref();
            let end = container
                .terminated()
                .or_else(|| last?.terminated())
                .filter(|end| end.started_at.is_none())?;
            Some((end.exit_code, end.message.clone().unwrap_or_default()))
        })
    }
}

/// A name that no container of the pod has: the one given, or one made up for an empty one.
fn free_name(status: &PodStatus, wanted: &str) -> Result<String, JoinError> {
    if status.all_containers().count() >= MAX_CONTAINERS {
        return Err(JoinError::TooMany);
    }
    if wanted.is_empty() {
        return (1..=MAX_CONTAINERS)
            .map(|number| format!("attached-{number}"))
            .find(|name| status.container(name).is_none())
            .ok_or(JoinError::TooMany);
    }
    match status.container(wanted) {
        None => Ok(wanted.to_owned()),
        Some(_) => Err(JoinError::NameTaken(wanted.to_owned())),
    }
}

/// Removes a container that has ended, with its log.
async fn forget(pod: &Arc<PodContext>, name: &str, root: &str) {
    let (context, container, root) = (Arc::clone(pod), name.to_owned(), root.to_owned());
    let removed = tokio::task::spawn_blocking(move || {
        // What a start that failed may have left; else it is gone already.
        let root = context.share.unmount_root(&root);
        let logs = remove_tree(&context.record.dir().container_logs(&container));
        (root, logs)
    })
    .await;
    match removed {
        Ok((Err(error), _)) => tracing::warn!(name, error = chain(&error), "removing"),
        Ok((_, Err(error))) => tracing::warn!(name, error = chain(&error), "removing"),
        Ok(_) | Err(_) => {}
    }
    pod.record
        .update(|status| status.joined.retain(|joined| joined.name != name));
}

/// The client's ends of a container's streams.
struct ClientEnds {
    stdin: oneshot::Receiver<OwnedFd>,
    outputs: Vec<OwnedFd>,
}

fn attach(join: &Join) -> Result<(Attachment, ClientEnds), JoinError> {
    let (tell, stdin) = oneshot::channel();
    let names = match join.container.tty {
        Some(true) => &[StreamName::Stdout][..],
        _ => &[StreamName::Stdout, StreamName::Stderr],
    };
    let (mut copies, mut outputs) = (Vec::new(), Vec::new());
    for name in names {
        let (ours, theirs) = UnixStream::pair().map_err(JoinError::Streams)?;
        copies.push((*name, ours.into()));
        outputs.push(theirs.into());
    }
    let attachment = Attachment {
        copies,
        stdin: tell,
        size: join.size,
    };
    Ok((attachment, ClientEnds { stdin, outputs }))
}

/// Lets a client's container join. The connection is then the container's, if it is attached.
pub async fn serve(joins: &Joins, join: Join, channel: &AsyncChannel) -> Result<(), ChannelError> {
    let attached = join.attach;
    let started = async {
        let (attachment, ends) = attach(&join)?;
        let image = join.container.image.as_deref().unwrap_or_default();
        let image = joins.image(image).await?;
        let attachment = attached.then_some(attachment);
        Ok((joins.join(join, image, attachment).await?, ends))
    };
    let (member, mut ends) = match started.await {
        Ok(started) => started,
        Err(error) => {
            let error: JoinError = error;
            return channel.send(&error.refusal(), &[]).await;
        }
    };
    let name = member.name.clone();
    if !attached {
        return channel
            .send(
                &Reply::Joined {
                    name,
                    streams: None,
                },
                &[],
            )
            .await;
    }
    let stdin = ends.stdin.try_recv().ok();
    let reply = Reply::Joined {
        name,
        streams: Some(Streams {
            stdin: stdin.is_some(),
            stderr: ends.outputs.len() > 1,
        }),
    };
    let streams: Vec<BorrowedFd<'_>> = stdin.iter().chain(&ends.outputs).map(AsFd::as_fd).collect();
    if let Err(error) = channel.send(&reply, &streams).await {
        member.stop.request(None);
        return Err(error);
    }
    // The client has its own.
    drop((stdin, ends));
    attend(joins, member, channel).await
}

/// Waits for the container's end, and passes the client's wishes on. A client that goes takes the
/// container along.
async fn attend(
    joins: &Joins,
    mut member: Member,
    channel: &AsyncChannel,
) -> Result<(), ChannelError> {
    let ended = loop {
        tokio::select! {
            ended = &mut member.end => break ended,
            received = channel.receive::<Request>() => match received {
                Ok(Some((Request::Resize(size), _))) => {
                    let process = Process::Container(&member.name);
                    // One that has just ended has no terminal any more.
                    let _ = joins.pod.agent.resize(process, size).await;
                }
                _ => {
                    member.stop.request(None);
                    return Ok(());
                }
            },
        }
    };
    let reply = match ended.map_err(PodFailure::from).and_then(|code| code) {
        Ok(exit_code) => Reply::Ended { exit_code },
        Err(failure) => JoinError::from(failure).refusal(),
    };
    channel.send(&reply, &[]).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::PodId;

    fn pod() -> PodStatus {
        let id = PodId::random().unwrap();
        serde_json::from_value(serde_json::json!({
            "id": id, "name": "web", "phase": "Running", "createdAt": "2026-01-01T00:00:00Z",
            "restartPolicy": "Always", "completed": false,
            "containerStatuses": [ContainerStatus::new("main", "busybox")],
        }))
        .unwrap()
    }

    #[test]
    fn a_name_is_taken_once() {
        let mut pod = pod();
        pod.joined.push(ContainerStatus::new("shell", "busybox"));
        pod.joined[0].finished = true;

        assert_eq!(free_name(&pod, "other").unwrap(), "other");
        for taken in ["main", "shell"] {
            let error = free_name(&pod, taken).unwrap_err().to_string();
            assert!(error.contains(taken) && error.contains("--name"), "{error}");
        }
    }

    #[test]
    fn who_has_no_name_gets_one() {
        let mut pod = pod();
        assert_eq!(free_name(&pod, "").unwrap(), "attached-1");

        pod.joined
            .push(ContainerStatus::new("attached-1", "busybox"));
        assert_eq!(free_name(&pod, "").unwrap(), "attached-2");
    }

    #[test]
    fn a_pod_has_room_for_so_many() {
        let mut pod = pod();
        while pod.all_containers().count() < MAX_CONTAINERS {
            let name = free_name(&pod, "").unwrap();
            pod.joined.push(ContainerStatus::new(name, "busybox"));
        }

        assert!(matches!(free_name(&pod, ""), Err(JoinError::TooMany)));
        assert!(matches!(free_name(&pod, "x"), Err(JoinError::TooMany)));
    }

    #[test]
    fn refusals_tell_programs_why() {
        let not_started = |code| JoinError::NotStarted {
            name: "x".into(),
            message: "no".into(),
            code,
        };
        let kind = |error: JoinError| match error.refusal() {
            Reply::Refused { kind, .. } => kind,
            other => panic!("{other:?}"),
        };

        assert_eq!(kind(not_started(127)), Refusal::ProgramNotFound);
        assert_eq!(kind(not_started(126)), Refusal::ProgramNotExecutable);
        assert_eq!(kind(not_started(128)), Refusal::Failed);
        assert_eq!(kind(JoinError::Ending), Refusal::NotRunning);
    }

    #[test]
    fn a_terminal_has_one_output() {
        let mut join = Join {
            attach: true,
            ..Join::default()
        };
        assert_eq!(attach(&join).unwrap().1.outputs.len(), 2);

        join.container.tty = Some(true);
        assert_eq!(attach(&join).unwrap().1.outputs.len(), 1);
    }
}
