//! Starting a machine: by booting it, or as a clone of a template.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_machine::client::{GuestConnection, Machine, NetSpec, SnapshotFiles};
use hull_machine::steps::Started;
use hull_protocol::READY_PORT;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::disks::{self, Disks};
use super::failure::PodFailure;
use super::guest::Guest;
use super::installation::Installation;
use super::limits::Limits;
use super::machine::{self, Begin};
use super::template::{Shelf, Wanted};
use crate::agent::{Agent, GuestInfo, GuestSize};
use crate::oci::MachineSize;
use crate::templates::{FileIdentity, HostIdentity, Kind};
use crate::text::chain;
use crate::volumes::Share;

/// What a machine is made of, before anything of a pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recipe {
    pub installation: Installation,
    pub limits: Limits,
    pub size: MachineSize,
    /// Slots for root file systems on disks, at most [`super::MAX_SLOTS`].
    pub disk_slots: u8,
    /// See [`super::HostNetwork::devices`].
    pub nets: Vec<NetSpec>,
}

/// A machine that is to be started.
#[derive(Debug)]
pub struct Boot<'a> {
    pub recipe: Recipe,
    /// Where the guest's console goes: a pipe that is read.
    pub console: OwnedFd,
    pub share: &'a Share,
    /// None: it boots by itself.
    pub shelf: Option<Shelf>,
}

impl Boot<'_> {
    /// Starts the machine. It dies when what is returned is dropped.
    ///
    /// A template that is no good is removed, and the machine boots without.
    ///
    /// # Errors
    /// When a file of Hull's own, KVM or `hull-vmm` says no.
    pub async fn launch(self) -> Result<Launched, PodFailure> {
        let Some(shelf) = self.shelf else {
            return self.recipe.boot(self.console, self.share.root()).await;
        };
        let kind = self.recipe.kind(shelf.tenant.clone())?;
        let why = match shelf.templates.find(&kind) {
            Ok(Some(files)) => {
                let console = self.console.try_clone().map_err(open("the console"))?;
                let begin = Begin::Clone(files);
                let launched = self.recipe.launch(begin, console, self.share.root()).await;
                match launched {
                    Err(PodFailure::Launch(error)) => Some(chain(&error)),
                    launched => {
                        return Ok(Launched {
                            template: Some(kind.id()),
                            ..launched?
                        });
                    }
                }
            }
            Ok(None) => None,
            Err(error) => Some(chain(&error)),
        };
        if let Some(why) = why {
            let id = kind.id();
            tracing::warn!(
                id,
                why,
                "no machine can begin with a template; it is removed"
            );
            if let Err(error) = shelf.templates.remove(&id) {
                tracing::warn!(error = chain(&error), "removing a template");
            }
        }
        let wanted = shelf.wanted(self.recipe.clone(), kind);
        let launched = self.recipe.boot(self.console, self.share.root()).await?;
        Ok(Launched {
            wanted: Some(wanted),
            ..launched
        })
    }
}

impl Recipe {
    /// What a template must be like for this machine.
    ///
    /// # Errors
    /// When one of its files can't be looked at.
    pub fn kind(&self, tenant: String) -> Result<Kind, PodFailure> {
        let Installation {
            vmm,
            kernel,
            initramfs,
        } = &self.installation;
        let files = [vmm, kernel, initramfs]
            .into_iter()
            .map(|path| {
                FileIdentity::at(path).map_err(|source| PodFailure::Open {
                    path: path.display().to_string(),
                    source,
                })
            })
            .collect::<Result<_, _>>()?;
        let net = self.nets.first();
        Ok(Kind {
            tenant,
            vcpus: self.size.vcpus,
            memory_mib: self.size.memory_mib,
            disk_slots: self.disk_slots,
            interfaces: u8::try_from(self.nets.len()).unwrap_or(u8::MAX),
            queue_pairs: net.map_or(0, |net| net.queue_pairs),
            udp_segmentation: net.is_some_and(|net| net.udp_segmentation),
            files,
            command_line: machine::CMDLINE.into(),
            host: HostIdentity::here(),
        })
    }

    pub(super) async fn boot(
        &self,
        console: OwnedFd,
        share: BorrowedFd<'_>,
    ) -> Result<Launched, PodFailure> {
        let Installation {
            kernel, initramfs, ..
        } = &self.installation;
        let begin = Begin::Boot { kernel, initramfs };
        self.launch(begin, console, share).await
    }

    /// Goes on with a machine that was put aside with its pod.
    pub(super) async fn restore(
        &self,
        files: SnapshotFiles,
        console: OwnedFd,
        share: BorrowedFd<'_>,
    ) -> Result<Launched, PodFailure> {
        self.launch(Begin::Clone(files), console, share).await
    }

    async fn launch(
        &self,
        begin: Begin<'_>,
        console: OwnedFd,
        share: BorrowedFd<'_>,
    ) -> Result<Launched, PodFailure> {
        let spec = machine::spec(begin, self.size, console, share)?;
        let slots = self.disk_slots;
        let spec = (0..slots).fold(spec, |spec, slot| spec.disk_slot(disks::serial(slot)));
        let nets = self.nets.iter().copied();
        let spec = nets.fold(spec, |spec, net| spec.net(net, None));
        let begun = Instant::now();
        let (machine, connections) = Machine::launch(&self.installation.vmm, spec).await?;
        let machine = Arc::new(machine);
        Ok(Launched {
            disks: Disks::new(Arc::clone(&machine), slots),
            machine,
            connections,
            limits: self.limits,
            size: self.size,
            begun,
            template: None,
            wanted: None,
        })
    }
}

/// A machine that boots.
#[derive(Debug)]
pub struct Launched {
    machine: Arc<Machine>,
    disks: Disks,
    connections: mpsc::Receiver<GuestConnection>,
    limits: Limits,
    size: MachineSize,
    begun: Instant,
    template: Option<String>,
    wanted: Option<Wanted>,
}

impl Launched {
    /// Of `hull-vmm`.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        u32::try_from(self.machine.pid()).ok()
    }

    /// How it came to run.
    #[must_use]
    pub fn started(&self) -> &Started {
        self.machine.started()
    }

    /// The template that the machine began with. None: it boots.
    #[must_use]
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Waits until the agent has answered.
    ///
    /// # Errors
    /// When it doesn't in time, or the machine ends.
    pub async fn meet(self) -> Result<(Guest, GuestInfo), PodFailure> {
        let vcpus = self.size.vcpus;
        self.meet_with(vcpus).await
    }

    /// The same, with this many processors that run. 0: as many as the kernel booted with.
    pub(super) async fn meet_with(self, vcpus: u8) -> Result<(Guest, GuestInfo), PodFailure> {
        let Self {
            machine,
            disks,
            connections,
            limits,
            size,
            begun,
            wanted,
            template: _,
        } = self;
        let alive = agent_ready(&machine, connections, limits.agent_ready).await?;
        let agent = Agent::connect(Arc::<Machine>::clone(&machine), limits.call).await?;
        let info = agent
            .hello(GuestSize {
                vcpus,
                added_memory_mib: 0,
            })
            .await?;
        let guest = Guest {
            machine,
            disks,
            agent,
            alive,
            end: limits.end,
            size,
            boot: begun.elapsed(),
            wanted,
        };
        Ok((guest, info))
    }
}

fn open(what: &'static str) -> impl FnOnce(std::io::Error) -> PodFailure {
    move |source| PodFailure::Open {
        path: what.into(),
        source,
    }
}

/// Waits for the agent's word that it is ready.
async fn agent_ready(
    machine: &Machine,
    mut connections: mpsc::Receiver<GuestConnection>,
    limit: Duration,
) -> Result<UnixStream, PodFailure> {
    let ready = async {
        loop {
            match connections.recv().await {
                Some(connection) if connection.port == READY_PORT => return Ok(connection.stream),
                Some(_) => {}
                None => return Err(PodFailure::MachineEnded(machine.wait().await)),
            }
        }
    };
    tokio::select! {
        ready = timeout(limit, ready) => ready.unwrap_or(Err(PodFailure::AgentNotReady(limit))),
        reason = machine.wait() => Err(PodFailure::MachineEnded(reason)),
    }
}
