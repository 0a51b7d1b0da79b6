//! Starting a machine: by booting it, or as a clone of a template.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hull_machine::client::{GuestConnection, Machine, NetSpec, SnapshotFiles};
use hull_machine::memory::working_set::Accesses;
use hull_machine::steps::Started;
use hull_protocol::READY_PORT;
use jiff::Timestamp;
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
use crate::templates::{FileIdentity, HostIdentity, Kind, Recording, Template};
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
        let plain = Plain {
            recipe: self.recipe,
            console: self.console,
            share: self
                .share
                .root()
                .try_clone_to_owned()
                .map_err(open("the share"))?,
        };
        let Some(shelf) = self.shelf else {
            return plain.boot().await;
        };
        let kind = plain.recipe.kind(shelf.tenant.clone())?;
        match shelf.templates.find(&kind) {
            Ok(Some(template)) => {
                Candidate {
                    plain,
                    created_at: template.created_at,
                    kind,
                    shelf,
                }
                .launch(template)
                .await
            }
            Ok(None) => {
                let wanted = shelf.wanted(plain.recipe.clone(), kind);
                Ok(Launched {
                    wanted: Some(wanted),
                    ..plain.boot().await?
                })
            }
            Err(error) => {
                let why = chain(&error);
                if let Err(error) = shelf.templates.remove(&kind.id()) {
                    tracing::warn!(error = chain(&error), "removing a template");
                }
                plain.boot_instead(shelf, kind, why).await
            }
        }
    }
}

/// What a machine boots with that begins with no template.
#[derive(Debug)]
struct Plain {
    recipe: Recipe,
    console: OwnedFd,
    share: OwnedFd,
}

impl Plain {
    async fn boot(self) -> Result<Launched, PodFailure> {
        self.recipe.boot(self.console, self.share.as_fd()).await
    }

    /// Boots, because a template was no good, which is gone by now.
    async fn boot_instead(
        self,
        shelf: Shelf,
        kind: Kind,
        why: String,
    ) -> Result<Launched, PodFailure> {
        let id = kind.id();
        tracing::warn!(id, why, "a template is no good, and removed");
        let wanted = shelf.wanted(self.recipe.clone(), kind);
        Ok(Launched {
            passed_over: Some(why),
            wanted: Some(wanted),
            ..self.boot().await?
        })
    }
}

/// A clone that has not answered yet: what is needed to do without it.
#[derive(Debug)]
struct Candidate {
    plain: Plain,
    shelf: Shelf,
    kind: Kind,
    created_at: Timestamp,
}

impl Candidate {
    async fn launch(self, template: Template) -> Result<Launched, PodFailure> {
        let Plain {
            recipe,
            console,
            share,
        } = &self.plain;
        let console = console.try_clone().map_err(open("the console"))?;
        let begin = Begin::Clone {
            files: template.files,
            accesses: template.accesses,
        };
        match recipe.launch(begin, console, share.as_fd()).await {
            Err(PodFailure::Launch(error)) => {
                let rejected = self.reject(chain(&error));
                rejected.boot().await
            }
            launched => Ok(Launched {
                template: Some(self.kind.id()),
                candidate: Some(Box::new(self)),
                recording: template.recording,
                ..launched?
            }),
        }
    }

    /// Removes the template, and has none made at once: the next might be as good.
    fn reject(self, why: String) -> Rejected {
        self.shelf.templates.note_failure(&self.kind, &why);
        let discarded = (self.shelf.templates).discard(&self.kind.id(), self.created_at);
        if let Err(error) = discarded {
            tracing::warn!(error = chain(&error), "removing a template");
        }
        Rejected {
            candidate: self,
            why,
        }
    }
}

/// A clone that was no good. It is gone, and its template, too.
#[derive(Debug)]
pub struct Rejected {
    candidate: Candidate,
    why: String,
}

impl Rejected {
    /// Boots a machine in its place, with all that was for the clone.
    ///
    /// # Errors
    /// As [`Boot::launch`].
    pub async fn boot(self) -> Result<Launched, PodFailure> {
        let Candidate {
            plain, shelf, kind, ..
        } = self.candidate;
        plain.boot_instead(shelf, kind, self.why).await
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
        let begin = Begin::Clone {
            files,
            accesses: Accesses::Unknown,
        };
        self.launch(begin, console, share).await
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
            passed_over: None,
            candidate: None,
            recording: None,
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
    /// Why it is no clone, although there was a template.
    passed_over: Option<String>,
    /// None: it boots.
    candidate: Option<Box<Candidate>>,
    recording: Option<Recording>,
    wanted: Option<Wanted>,
}

/// What became of a machine that was to answer.
#[derive(Debug)]
pub enum Met {
    Answered(Box<(Guest, GuestInfo)>),
    /// A clone that did not, or not as an agent does. Never of a machine that has booted.
    Rejected(Box<Rejected>),
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

    /// Why the machine boots although there was a template.
    #[must_use]
    pub fn passed_over(&self) -> Option<&str> {
        self.passed_over.as_deref()
    }

    /// Waits until the agent has answered. A clone has as long as a machine has to boot, since on a host that is busy it
    /// is no worse for being slow; a machine that then boots in its place has as long again.
    ///
    /// # Errors
    /// When a machine that boots doesn't answer in time, or ends.
    pub async fn meet(mut self) -> Result<Met, PodFailure> {
        let vcpus = self.size.vcpus;
        let answered = |met| Met::Answered(Box::new(met));
        let Some(candidate) = self.candidate.take() else {
            return Ok(answered(self.meet_with(vcpus).await?));
        };
        let machine = Arc::clone(&self.machine);
        let (limit, end) = (self.limits.agent_ready, self.limits.end);
        let met = timeout(limit, self.meet_with(vcpus)).await;
        match met.unwrap_or(Err(PodFailure::AgentNotReady(limit))) {
            Ok(met) => Ok(answered(met)),
            Err(failure) => {
                machine.kill();
                // What it has of the pod's memory is to be free again.
                let _ = timeout(end, machine.wait()).await;
                Ok(Met::Rejected(Box::new(candidate.reject(chain(&failure)))))
            }
        }
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
            template,
            recording,
            passed_over: _,
            candidate: _,
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
            template,
            recording: Mutex::new(recording),
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
