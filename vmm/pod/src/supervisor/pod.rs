//! The recipe of a pod.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hull_machine::client::{NetSpec, SnapshotFiles};
use hull_machine::config::TapDescriptors;
use jiff::Timestamp;
use tokio::sync::{Mutex, RwLock, oneshot};
use tokio::task::JoinSet;

use super::boot::{Boot, Launched, Met, PassedOver, Recipe, Rejected};
use super::console::Console;
use super::container::{Container, Prepared, Role};
use super::failure::PodFailure;
use super::guest::Guest;
use super::installation::Installation;
use super::join::Joins;
use super::limits::Limits;
use super::network::{HostNetwork, PodNetwork, Queues};
use super::record::Record;
use super::server::Service;
use super::stop::Stop;
use super::template::{Maker, Shelf};
use super::work::{Outcome, Work};
use crate::agent::Agent;
use crate::configuration::Configuration;
use crate::events::EventType;
use crate::footprint;
use crate::images::Store;
use crate::manifest::PodManifest;
use crate::network::VhostNet;
use crate::oci::{self, InfraSpec, MachineSize};
use crate::state::{ContainerState, Directories, Phase, PodStatus, Terminated, remove_tree};
use crate::text::chain;
use crate::timeline::{Mark, RunningStep};
use crate::volumes::{MemoryVolume, NetworkFacts, Share};

/// So many lines of the console are kept with a failure. A panic with its call trace takes up to 80.
const CONSOLE_TAIL: usize = 100;

/// Whose all pods are that `hull run` starts, for [`crate::templates`].
pub const TENANT: &str = "cli";

/// What the containers of a running pod work with.
#[derive(Debug)]
pub(crate) struct PodContext {
    pub manifest: Arc<PodManifest>,
    pub record: Arc<Record>,
    pub share: Arc<Share>,
    pub agent: Agent,
    pub network: PodNetwork,
    pub limits: Limits,
    pub stop: Stop,
    pub changes: Changes,
}

/// Read while a container is started, or taken away after its end; written while none may be.
pub(crate) type Changes = Arc<RwLock<()>>;

/// A pod that is to live.
#[derive(Debug)]
pub(super) struct Pod {
    pub directories: Directories,
    pub configuration: Configuration,
    /// The mount namespace that the supervisor came from.
    pub host_mounts: OwnedFd,
    pub maker: Arc<Maker>,
    /// Of its machine.
    pub size: MachineSize,
    /// It was put aside, and its machine goes on with these. None: it is new.
    pub restored: Option<SnapshotFiles>,
    pub manifest: Arc<PodManifest>,
    pub record: Arc<Record>,
    pub stop: Stop,
    pub service: Arc<Service>,
}

/// What is on the host for the pod's containers.
struct Ground {
    memory_volumes: Vec<MemoryVolume>,
    init: Vec<Prepared>,
    containers: Vec<Prepared>,
}

impl Pod {
    /// Lives, and writes down how it ended. Nothing but that and the logs is left.
    pub async fn run(self) {
        let mut console = None;
        let result = self.live(&mut console).await;
        let tail = match (&result, &mut console) {
            (Err(failure), Some(console)) if failure.concerns_the_guest() => {
                console.drain(Duration::from_secs(1)).await;
                console.tail(CONSOLE_TAIL)
            }
            _ => Vec::new(),
        };
        // First what is left, then the last word: who reads it finds nothing any more.
        let dir = self.record.dir().clone();
        let directories = self.directories.clone();
        let call = self.service.limits.call;
        let cleaned = tokio::task::spawn_blocking(move || {
            // Addresses and ports are free at once; else only when the pod is removed.
            let released = crate::networks::release(&directories, &dir, call);
            if let Err(error) = released {
                tracing::error!(error = chain(&error), "giving back the pod's network");
            }
            clean(&dir)
        })
        .await;
        if let Ok(Err(error)) = cleaned {
            tracing::error!(error = chain(&error), "removing what is left of the pod");
        }
        self.conclude(&result, tail);
        self.record.timeline().write(&self.record.dir().timeline());
    }

    /// The recipe.
    async fn live(&self, console: &mut Option<Console>) -> Result<(), PodFailure> {
        self.progress(
            "Preparing",
            "setting up network, volumes and root file systems",
        );
        let opening = self.record.timeline().step("share and network namespace");
        let installation = Installation::find(&self.configuration)?;
        let (share, network) = self.open().await?;
        drop(opening);
        let nets = network.devices(self.manifest.bandwidth());
        let network = Arc::new(Mutex::new(network));
        // On the host, while the machine boots.
        let mut work = Work::default();
        let result = self
            .live_with(&installation, &share, &network, nets, &mut work, console)
            .await;
        // What is still under way of it would be left when all else is gone.
        work.finished().await;
        let mut network = network.lock_owned().await;
        let taken_down = tokio::task::spawn_blocking(move || network.take_down()).await;
        // How the pod ended matters more.
        result.and(taken_down.map_err(PodFailure::from))
    }

    /// What is made here is gone when it returns, but for `work`.
    async fn live_with(
        &self,
        installation: &Installation,
        share: &Arc<Share>,
        network: &Arc<Mutex<HostNetwork>>,
        nets: Vec<NetSpec>,
        work: &mut Work,
        console: &mut Option<Console>,
    ) -> Result<(), PodFailure> {
        let facts = network.lock().await.facts().clone();
        let taps = work.begin({
            let network = Arc::clone(network);
            let timeline = self.record.timeline().clone();
            move || {
                let _step = timeline.step("network");
                network.blocking_lock().connect()
            }
        });
        let started = async {
            let preparation = self.preparation(share, facts);
            if self.restored.is_some() {
                // The guest's files have to be there when it goes on.
                let ground = work.begin(preparation).wait().await?;
                let launched = self.launch(installation, share, nets, console).await?;
                return self
                    .meet(launched, network, async { Ok(ground) }, taps)
                    .await;
            }
            let launched = self.launch(installation, share, nets, console).await?;
            // Mounts in the share reach the machine's jail from here on, as they do later.
            let ground = work.begin(preparation);
            self.meet(launched, network, ground.wait(), taps).await
        };
        let (guest, ground) = tokio::select! {
            started = started => started?,
            // A machine dies when it is dropped.
            () = self.stop.requested() => return Err(PodFailure::Stopped),
        };
        let result = self.run_containers(&guest, share, network, ground).await;
        guest.machine().kill();
        guest.machine().wait().await;
        result
    }

    /// What the machine is started with: a share without anything in it, and the namespace of its network.
    async fn open(&self) -> Result<(Arc<Share>, HostNetwork), PodFailure> {
        let directories = self.directories.clone();
        let dir = self.record.dir().clone();
        let limit = self.service.limits.call;
        let queues = Queues {
            vcpus: self.size.vcpus,
            vhost: VhostNet::of(&self.configuration)?,
        };
        let mounts = self
            .host_mounts
            .try_clone()
            .map_err(|source| PodFailure::Open {
                path: "the host's mount namespace".into(),
                source,
            })?;
        let (share, network) = tokio::task::spawn_blocking(move || {
            crate::state::private_dir(&dir.share())?;
            let share = Share::create(&dir.share(), dir.data())?;
            let network = HostNetwork::open(&directories, &dir, mounts, limit, queues)?;
            Ok::<_, PodFailure>((Arc::new(share), network))
        })
        .await??;
        self.record
            .update(|status| status.set_addresses(&network.facts().addresses));
        Ok((share, network))
    }

    async fn launch(
        &self,
        installation: &Installation,
        share: &Share,
        nets: Vec<NetSpec>,
        console: &mut Option<Console>,
    ) -> Result<Launched, PodFailure> {
        let (reason, message) = match self.restored {
            Some(_) => ("Restoring", "going on with the machine of a snapshot"),
            None => ("Booting", "starting the machine"),
        };
        self.progress(reason, message);
        let step = self.record.timeline().step("launch");
        let (reader, pipe) = Console::open(&self.record.dir().console())?;
        *console = Some(reader);
        let recipe = Recipe {
            installation: installation.clone(),
            limits: self.service.limits,
            size: self.size,
            disk_slots: 0,
            nets,
        };
        let launched = if let Some(restored) = &self.restored {
            let files = restored.try_clone();
            let files = files.map_err(|source| PodFailure::Open {
                path: "the snapshot's files".into(),
                source,
            })?;
            recipe.restore(files, pipe, share.root()).await?
        } else {
            let shelf = Shelf::open(
                &self.configuration,
                self.directories.data().to_owned(),
                TENANT,
                &self.maker,
            )?;
            let boot = Boot {
                recipe,
                console: pipe,
                share,
                shelf,
            };
            boot.launch().await?
        };
        self.note_machine(&step, &launched);
        Ok(launched)
    }

    /// Writes down which machine is the pod's now.
    fn note_machine(&self, launch: &RunningStep, launched: &Launched) {
        let timeline = self.record.timeline();
        timeline.machine(launch, launched.started(), launched.pid());
        self.record.update(|status| {
            status.vmm_pid = launched.pid();
            status.template = launched.template().map(str::to_owned);
        });
        if let Some(PassedOver { why, removed }) = launched.passed_over() {
            let (reason, what) = if *removed {
                ("TemplateRemoved", "a template was no good, and is removed")
            } else {
                (
                    "TemplatePassedOver",
                    "no clone came of a template, which stays",
                )
            };
            self.record
                .event(EventType::Warning, reason, None, &format!("{what}: {why}"));
        }
    }

    /// From a machine that boots to a guest with its namespaces and its network.
    async fn meet(
        &self,
        launched: Launched,
        network: &Mutex<HostNetwork>,
        ground: impl Future<Output = Result<Ground, PodFailure>>,
        taps: Outcome<Vec<(u8, TapDescriptors)>>,
    ) -> Result<(Guest, Ground), PodFailure> {
        let infra = oci::infra(&self.manifest);
        // The first of them that fails is the one to tell: nobody waits for the guest when an image is missing, and infra
        // doesn't wait for the host's side of its network.
        let up = self.up_to_infra(launched, ground, &infra);
        let ((guest, ground), taps) = tokio::try_join!(up, taps.wait())?;
        let step = self.record.timeline().step("guest's network");
        let network = network.lock().await;
        guest.connect_network(&infra, &network, taps).await?;
        drop(step);
        // As the next.
        let _ = self.service.meter.set(Arc::new(guest.meter(&network)?));
        // It can be set but once, and this runs but once.
        let _ = self.service.agent.set(guest.agent().clone());
        self.service
            .pause
            .begin(guest.machine(), guest.agent().clone());
        Ok((guest, ground))
    }

    /// From a machine that boots, and what the containers need on the host, to a guest with its namespaces.
    async fn up_to_infra(
        &self,
        launched: Launched,
        ground: impl Future<Output = Result<Ground, PodFailure>>,
        infra: &InfraSpec,
    ) -> Result<(Guest, Ground), PodFailure> {
        let (met, ground) = tokio::try_join!(self.answer(launched), ground)?;
        let guest = match met {
            Ok(guest) => guest,
            // Not before all is in the share, which the second machine gets as it is then.
            Err(clone) => {
                let step = self.record.timeline().step("launch");
                let launched = clone.boot().await?;
                self.note_machine(&step, &launched);
                drop(step);
                self.answer(launched)
                    .await?
                    .map_err(|_| PodFailure::AgentLost)?
            }
        };
        if self.restored.is_none() {
            let timeline = self.record.timeline();
            let step = timeline.step("infra");
            guest.start_infra(infra, &ground.memory_volumes).await?;
            drop(step);
            timeline.mark(Mark::Infra);
            self.record
                .event(EventType::Normal, "InfraStarted", None, "started infra");
        }
        Ok((guest, ground))
    }

    /// Waits for the agent's answer. The inner error is a clone that was no good.
    async fn answer(&self, launched: Launched) -> Result<Result<Guest, Box<Rejected>>, PodFailure> {
        let (guest, info) = match launched.meet().await? {
            Met::Answered(met) => *met,
            Met::Rejected(clone) => return Ok(Err(clone)),
        };
        let booted = guest.template().is_none() && self.restored.is_none();
        self.record.timeline().guest(&info.clock, booted);
        self.record.update(|status| {
            status.guest_kernel = Some(info.kernel_release);
            status.agent_version = Some(info.agent_version);
        });
        self.record
            .event(EventType::Normal, "Booted", None, "the agent is ready");
        Ok(Ok(guest))
    }

    /// Puts all into the share that the containers will see. Blocking work.
    fn preparation(
        &self,
        share: &Arc<Share>,
        network: NetworkFacts,
    ) -> impl FnOnce() -> Result<Ground, PodFailure> + Send + 'static {
        let manifest = Arc::clone(&self.manifest);
        let record = Arc::clone(&self.record);
        let data = self.directories.data().to_owned();
        let share = Arc::clone(share);
        move || {
            let _step = record.timeline().step("mounts");
            let store = Store::open(&data)?;
            let memory_volumes = share.bind_volumes(&manifest)?;
            share.write_etc(&manifest, &network)?;
            let prepare = |container: &k8s_openapi::api::core::v1::Container, role| {
                // That of a pod that was put aside stays the same, whatever its name stands for by now.
                let id = record.read(|status| status.container(&container.name)?.image_id.clone());
                let reference = id.as_deref().or(container.image.as_deref());
                let image = store.resolve(reference.unwrap_or_default())?;
                Prepared::new(
                    &manifest,
                    container,
                    image,
                    role,
                    &share,
                    &container.name,
                    &record,
                )
            };
            let lives = |container: &&k8s_openapi::api::core::v1::Container| {
                record.read(|status| {
                    let status = status.container(&container.name);
                    status.is_none_or(|status| !status.finished)
                })
            };
            let init = manifest
                .init_containers()
                .iter()
                .filter(lives)
                .map(|c| prepare(c, Role::Init))
                .collect::<Result<_, _>>()?;
            let containers = manifest
                .containers()
                .iter()
                .filter(lives)
                .map(|c| prepare(c, Role::Main))
                .collect::<Result<_, _>>()?;
            Ok(Ground {
                memory_volumes,
                init,
                containers,
            })
        }
    }

    /// From infra to the pod's end.
    async fn run_containers(
        &self,
        guest: &Guest,
        share: &Arc<Share>,
        network: &Arc<Mutex<HostNetwork>>,
        ground: Ground,
    ) -> Result<(), PodFailure> {
        let context = Arc::new(PodContext {
            manifest: Arc::clone(&self.manifest),
            record: Arc::clone(&self.record),
            share: Arc::clone(share),
            agent: guest.agent().clone(),
            network: guest.network(network),
            limits: self.service.limits,
            stop: self.stop.clone(),
            changes: Arc::clone(&self.service.aside.changes),
        });
        let joins = Joins::new(&context, self.directories.data());
        // It can be set but once, and this runs but once.
        let joins = self.service.joins.get_or_init(|| joins);
        let all = async {
            self.containers(guest, &context, ground.init, ground.containers)
                .await?;
            joins.finished().await;
            Ok(())
        };
        let died = tokio::select! {
            // An end that was asked for must not look like a failure.
            biased;
            ended = all => ended.err(),
            failure = guest.death() => Some(failure),
        };
        match died {
            // Then its machine has a reason, and that is the one to tell.
            Some(PodFailure::AgentLost) => Err(guest.machine_end().await),
            Some(failure) => Err(failure),
            None => {
                self.progress_event("Stopping", "stopping the machine");
                guest.shut_down().await;
                Ok(())
            }
        }
    }

    /// Init containers one after another, each to its end; then the others, each when the one before
    /// it has been started. Until the pod is asked to end, and they have.
    async fn containers(
        &self,
        guest: &Guest,
        context: &Arc<PodContext>,
        init: Vec<Prepared>,
        containers: Vec<Prepared>,
    ) -> Result<(), PodFailure> {
        for prepared in init {
            if self.stop.is_requested() {
                return Ok(());
            }
            let name = prepared.name.clone();
            let container = Container::new(context, prepared);
            let (started, _) = oneshot::channel();
            let code = container.run(started).await?;
            if code != 0 && !self.stop.is_requested() {
                return Err(PodFailure::InitFailed {
                    container: name,
                    code,
                });
            }
        }

        let mut running = JoinSet::new();
        for prepared in containers {
            if self.stop.is_requested() {
                break;
            }
            let container = Container::new(context, prepared);
            let (started, start) = oneshot::channel();
            running.spawn(container.run(started));
            if start.await.is_err() {
                // It has ended without a start; why shows below.
                break;
            }
        }
        self.record.update(|status| {
            status.phase = Phase::Running;
            status.reason = None;
            status.message = None;
            status.started_at = Some(Timestamp::now());
        });
        guest.serve_later_pods();
        footprint::shrink();
        while let Some(ended) = running.join_next().await {
            ended??;
        }
        self.record.update(|status| status.completed = true);
        // Infra holds the pod, not its containers.
        self.stop.requested().await;
        Ok(())
    }

    fn progress(&self, reason: &str, message: &str) {
        self.record.update(|status| {
            status.reason = Some(reason.into());
            status.message = Some(message.into());
        });
        self.progress_event(reason, message);
    }

    fn progress_event(&self, reason: &str, message: &str) {
        self.record.event(EventType::Normal, reason, None, message);
    }

    /// The last word.
    fn conclude(&self, result: &Result<(), PodFailure>, console_tail: Vec<String>) {
        let failure = result.as_ref().err();
        match failure {
            None | Some(PodFailure::Stopped) => {
                self.progress_event("Stopped", "the pod has ended");
            }
            Some(failure) => {
                let message = chain(failure);
                self.record
                    .event(EventType::Warning, failure.reason(), None, &message);
            }
        }
        self.record.update(|status| {
            end_containers(status);
            let failed = failure.is_some_and(|f| !matches!(f, PodFailure::Stopped));
            let succeeded = !failed
                && status
                    .manifests_containers()
                    .all(|c| c.terminated().is_some_and(|end| end.exit_code == 0));
            status.phase = if succeeded {
                Phase::Succeeded
            } else {
                Phase::Failed
            };
            let completed = status.completed;
            (status.reason, status.message) = match failure {
                Some(failure) => (Some(failure.reason().into()), Some(chain(failure))),
                None if completed => (None, None),
                None => (Some("Stopped".into()), Some("the pod was stopped".into())),
            };
            status.console_tail = console_tail;
            status.finished_at = Some(Timestamp::now());
            status.paused = false;
            status.vmm_pid = None;
            status.supervisor_pid = None;
        });
    }
}

/// What ran, ended with the pod.
fn end_containers(status: &mut PodStatus) {
    for container in status.all_containers_mut() {
        container.finished = true;
        if let ContainerState::Running(running) = &container.state {
            container.state = ContainerState::Terminated(Terminated {
                exit_code: 137,
                signal: None,
                reason: "PodEnded".into(),
                message: Some("the container ended with its pod".into()),
                started_at: Some(running.started_at),
                finished_at: Timestamp::now(),
            });
        }
    }
}

/// Removes everything of a pod but its state and its logs.
fn clean(dir: &crate::state::PodDir) -> Result<(), crate::state::StateError> {
    // The mounts first, and with them what was in them.
    remove_tree(&dir.share())?;
    let logs = dir.logs();
    let entries = std::fs::read_dir(dir.data())
        .map_err(|e| crate::state::StateError::io("read", dir.data(), e))?;
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        if path != logs {
            remove_tree(&path)?;
        }
    }
    let _ = std::fs::remove_file(dir.socket());
    Ok(())
}
