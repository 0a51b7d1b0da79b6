//! Puts a running pod aside: in the files that a client has made.

use std::sync::Arc;
use std::time::Duration;

use hull_machine::client::SnapshotError as MachineError;
use tokio::time::timeout;

use super::pause::{Pause, PauseError};
use super::pod::Changes;
use super::record::Record;
use crate::events::EventType;
use crate::manifest::PodManifest;
use crate::networks::{Attachment, NetworkError};
use crate::oci::MachineSize;
use crate::snapshots::{self, Contents, Files, SnapshotError};
use crate::state::{Directories, Phase};

/// Why a pod is not put aside. It goes on.
#[derive(Debug, thiserror::Error)]
pub enum AsideError {
    #[error("the pod is starting; `hull events` tells how far it is")]
    Starting,
    #[error("container {0} has joined the pod, and would not go on; stop it first")]
    Joined(String),
    #[error(
        "the pod is in a network namespace that somebody else has set up (--network ns:), who would have to do so again"
    )]
    Namespace,
    #[error("a container is being started or ended, for more than {} s", .0.as_secs())]
    Changing(Duration),
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Files(#[from] SnapshotError),
    #[error("the pod's network")]
    Network(#[from] NetworkError),
    #[error("who asked for it has gone")]
    GivenUp,
}

/// What a pod is put aside with.
#[derive(Debug)]
pub struct Aside {
    pub changes: Changes,
    pub pause: Arc<Pause>,
    pub record: Arc<Record>,
    pub manifest: Arc<PodManifest>,
    pub size: MachineSize,
    pub directories: Directories,
}

impl Aside {
    /// Lets the pod stand still, and writes all that it is. No longer than `limit` is waited for a container that is
    /// being started or ended; nor at all once it is `given_up`, save that the machine's memory is written to its end.
    ///
    /// # Errors
    /// When it is not in a state in which it could go on elsewhere, or the files can't be written. It goes on, as it
    /// does after a success.
    pub async fn put(
        &self,
        files: Files,
        limit: Duration,
        given_up: impl Future<Output = ()>,
    ) -> Result<(), AsideError> {
        let mut given_up = std::pin::pin!(given_up);
        let _unchanging = tokio::select! {
            unchanging = timeout(limit, self.changes.write()) => {
                unchanging.map_err(|_| AsideError::Changing(limit))?
            }
            () = &mut given_up => return Err(AsideError::GivenUp),
        };
        let contents = self.contents()?;
        let data = self.record.dir().data().to_owned();
        let Files {
            pod,
            machine: machine_files,
            files,
        } = files;
        self.pause
            .standing(async |machine| {
                machine.snapshot(machine_files).await?;
                tokio::select! {
                    packed = snapshots::pack(&data, files) => {
                        packed.map_err(snapshots::io_error("packing what the pod has on disk"))?;
                    }
                    () = &mut given_up => return Err(AsideError::GivenUp),
                }
                snapshots::write_contents(&pod, &contents)
                    .map_err(snapshots::io_error("writing what the pod is"))?;
                Ok::<_, AsideError>(())
            })
            .await??;
        self.record
            .event(EventType::Normal, "Snapshot", None, "the pod was put aside");
        Ok(())
    }

    fn contents(&self) -> Result<Contents, AsideError> {
        let mut status = self.record.read(Clone::clone);
        if status.phase != Phase::Running {
            return Err(AsideError::Starting);
        }
        if let Some(joined) = status.joined.iter().find(|container| !container.finished) {
            return Err(AsideError::Joined(joined.name.clone()));
        }
        let attachment = Attachment::open(&self.directories, self.record.dir())?;
        if attachment.as_ref().is_some_and(|a| a.namespace().is_some()) {
            return Err(AsideError::Namespace);
        }
        status.paused = false;
        Ok(Contents {
            manifest: PodManifest::clone(&self.manifest),
            status,
            size: self.size,
            networks: attachment.as_ref().map_or_else(Vec::new, |attachment| {
                let networks = attachment.memberships().iter();
                networks.map(|member| member.network.name.clone()).collect()
            }),
            ports: attachment.map_or_else(Vec::new, |attachment| attachment.ports().to_vec()),
        })
    }
}
