//! The pod as the guest holds it: infra, and the containers in its namespaces.
//!
//! Locks guard maps only and are never held while something is waited for, so a call
//! that hangs (a file system that does not answer, say) holds up no other. Only calls that
//! change the network wait for each other.

mod amounts;
mod attach;
mod create;
mod exec;
mod infra;
mod network;
mod rehearsal;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use tokio::sync::{Semaphore, watch};

use crate::container::devices::Programs;
use crate::container::seccomp::Filters;
use crate::container::{Container, Exit, Root, Slot, exited, ready};
use crate::error::{Doing, Error, Result};
use crate::helper::Helpers;
use crate::process::{Process, Reaper};
use crate::stdio::Size;
use crate::streams::Streams;

/// How long killed containers may take to end before the machine goes anyway.
const ENDING: Duration = Duration::from_secs(5);

/// The pod's state.
#[derive(Debug)]
pub struct Pod {
    run: PathBuf,
    helpers: Helpers,
    filters: Filters,
    devices: Programs,
    streams: Arc<Streams>,
    infra_claimed: AtomicBool,
    infra: OnceLock<Infra>,
    containers: Mutex<HashMap<String, Slot<Container>>>,
    next_exec: AtomicU64,
    /// Held by the call that changes the network.
    network: tokio::sync::Mutex<()>,
    forwards: Arc<Semaphore>,
}

#[derive(Debug)]
struct Infra {
    process: Process,
    share_pids: bool,
    /// Sysctls that can be set when their interface is there.
    interface_sysctls: BTreeMap<String, String>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Pod {
    /// `run` is the agent's own directory, where no container comes.
    pub fn new(run: PathBuf, reaper: Arc<Reaper>, streams: Arc<Streams>) -> Result<Self> {
        for name in ["share", "memory", "shm", "containers", "state", "execs"] {
            let path = run.join(name);
            fs::create_dir_all(&path).doing(|| format!("making {}", path.display()))?;
        }
        Ok(Self {
            run,
            helpers: Helpers::new(reaper),
            filters: Filters::default(),
            devices: Programs::default(),
            streams,
            infra_claimed: AtomicBool::new(false),
            infra: OnceLock::new(),
            containers: Mutex::default(),
            next_exec: AtomicU64::new(0),
            network: tokio::sync::Mutex::default(),
            forwards: Arc::new(Semaphore::new(network::MAX_FORWARDS)),
        })
    }

    /// Does ahead what the pod's beginning will need.
    pub async fn get_ready(&self) -> Result<()> {
        self.helpers.get_ready().await
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        ready(&self.containers(), "container", id)
    }

    fn infra(&self) -> Result<&Infra> {
        self.infra
            .get()
            .ok_or_else(|| Error::State("infra was not started".into()))
    }

    pub fn start(&self, id: &str) -> Result<()> {
        self.container(id)?.start()
    }

    /// Signals infra (no container), a container's first process, an exec's, or all
    /// of a container.
    pub fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let signal = match i32::try_from(signal) {
            Ok(signal @ 1..=64) => signal,
            _ => return Err(Error::Invalid(format!("{signal} is no signal"))),
        };
        if all {
            return self.container(container)?.cgroup.signal(signal);
        }
        match self.process(container, exec)?.signal(signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(Error::State("the process has ended".into()))
            }
            sent => sent.doing(|| format!("sending signal {signal}")),
        }
    }

    fn process(&self, container: &str, exec: &str) -> Result<Process> {
        if container.is_empty() {
            return Ok(self.infra()?.process.clone());
        }
        let container = self.container(container)?;
        if exec.is_empty() {
            return Ok(container.first.process.clone());
        }
        Ok(container.exec(exec)?.process.clone())
    }

    /// Waits until infra, a container's first process or an exec's has ended.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        let exit = if container.is_empty() {
            self.infra()?.exit.clone()
        } else {
            let container = self.container(container)?;
            if exec.is_empty() {
                container.first.exit()
            } else {
                container.exec(exec)?.exit()
            }
        };
        exited(exit)
            .await
            .ok_or_else(|| Error::State("the agent is ending".into()))
    }

    pub fn resize(&self, container: &str, exec: &str, size: Size) -> Result<()> {
        let container = self.container(container)?;
        if exec.is_empty() {
            return container.first.resize(size);
        }
        container.exec(exec)?.resize(size)
    }

    /// Forgets a container that has ended.
    pub async fn remove(self: &Arc<Self>, id: &str) -> Result<()> {
        let container = self.container(id)?;
        if !container.first.has_ended() {
            return Err(Error::State(format!("container {id:?} has not ended")));
        }
        self.clear_away(&container).await?;
        self.containers().remove(id);
        Ok(())
    }

    /// Removes what there is of a container that has ended.
    async fn clear_away(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        container.cgroup.remove().await?;
        let pod = Arc::clone(self);
        let removed = Arc::clone(container);
        blocking(move || {
            removed.places.remove()?;
            match &removed.root {
                Root::Share(path) => pod.release_rootfs(path),
                Root::Disk(mounted) => mounted.unmount()?,
            }
            Ok(())
        })
        .await
    }

    /// Lets go of the mount of the host that the kernel made for the root file system.
    fn release_rootfs(&self, rootfs: &str) {
        let path = self.run.join("share").join(rootfs);
        // Not a mount of its own, or gone with the host's: nothing to let go of.
        let _ = unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }

    pub fn remove_exec(&self, container: &str, exec: &str) -> Result<()> {
        let container = self.container(container)?;
        if !container.exec(exec)?.has_ended() {
            return Err(Error::State(format!("exec {exec:?} has not ended")));
        }
        container.execs().remove(exec);
        Ok(())
    }

    pub fn processes(&self, container: &str) -> Result<Vec<u32>> {
        self.container(container)?.cgroup.pids()
    }

    /// Kills every container; the end of infra is the pod's.
    fn kill_containers(&self) {
        let containers: Vec<Arc<Container>> = self
            .containers()
            .values()
            .filter_map(|slot| match slot {
                Slot::Ready(container) => Some(Arc::clone(container)),
                Slot::Making => None,
            })
            .collect();
        for container in containers {
            if let Err(error) = container.cgroup.kill() {
                tracing::warn!("{error}");
            }
        }
    }

    /// Ends all processes, and brings what was written to the host.
    pub async fn end(self: &Arc<Self>) {
        self.kill_containers();
        let exits: Vec<_> = self
            .containers()
            .values()
            .filter_map(|slot| match slot {
                Slot::Ready(container) => Some(container.first.exit()),
                Slot::Making => None,
            })
            .collect();
        let all = async {
            for exit in exits {
                exited(exit).await;
            }
        };
        if tokio::time::timeout(ENDING, all).await.is_err() {
            tracing::warn!("containers do not end");
        }
        if let Some(infra) = self.infra.get() {
            let _ = infra.process.signal(libc::SIGKILL);
        }
        let share = self.run.join("share");
        let synced = tokio::task::spawn_blocking(move || {
            rustix::fs::sync();
            // No share was mounted, or it holds mounts of the host's: the sync was what counts.
            let _ = unmount(&share, UnmountFlags::DETACH);
        });
        if tokio::time::timeout(ENDING, synced).await.is_err() {
            tracing::warn!("the share does not answer");
        }
    }
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .and_then(|bytes| fs::write(path, bytes))
        .doing(|| format!("writing {}", path.display()))
}

/// Runs what may wait for a file system where it holds up nothing else.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::State(format!("the agent failed: {error}"))),
    }
}
