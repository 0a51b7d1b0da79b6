//! The pod of a shim: one machine, with infra and containers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use hull_pod::agent::{Agent, AgentError, Disk, ExitStatus, Process, Root, Stats, Stdio};
use hull_pod::configuration::Configuration;
use hull_pod::footprint;
use hull_pod::manifest::Bandwidth;
use hull_pod::metrics::Meter;
use hull_pod::network::{Namespace, VhostNet};
use hull_pod::supervisor::api::{Exec, Size};
use hull_pod::supervisor::{
    Boot, Console, Guest, HostNetwork, Inserted, Installation, Limits, MAX_SLOTS, Maker, Met,
    PodFailure, PodNetwork, Queues, Recipe, Shelf,
};
use hull_pod::text::chain;
use hull_pod::timeline::{self, Mark, Recorder};
use hull_pod::volumes::{NetworkFacts, Share};
use oci_spec::runtime::LinuxResources;
use rustix::fs::{CWD, Mode, OFlags};
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use crate::bundle::{Bundle, Place};
use crate::failure::TaskError;
use crate::forward::Forwarding;
use crate::pids::{self, Sharing};
use crate::pod::{Pod, RootMount};
use crate::{mounts, spec, templates};

/// So many lines of the guest's console are told with a boot that failed.
const CONSOLE_TAIL: usize = 10;
const SIGKILL: u32 = 9;
/// Until somebody says how large theirs is.
const TERMINAL: Size = Size {
    columns: 80,
    rows: 24,
};

/// A pod in a machine, once it has begun.
#[derive(Debug)]
pub struct MachinePod {
    configuration: Configuration,
    limits: Limits,
    /// The pod's network namespace, which this process is in. None: the host's, which a machine can't have.
    namespace: Option<Namespace>,
    /// Whose pod it is.
    tenant: String,
    maker: Arc<Maker>,
    /// Held while the machine is taken down.
    ending: Arc<Mutex<()>>,
    /// Whether the machine is to end.
    asked: Arc<AtomicBool>,
    up: watch::Sender<Option<Arc<Up>>>,
}

/// A machine that runs.
#[derive(Debug)]
struct Up {
    guest: Guest,
    /// Where the pod's start is noted.
    timeline: Recorder,
    meter: Arc<Meter>,
    share: Arc<Share>,
    volumes: StdMutex<Volumes>,
    pids: StdMutex<Sharing>,
    /// Those of the containers whose root file systems are on disks, by the container's name.
    disks: StdMutex<HashMap<String, Inserted>>,
    host: Arc<Mutex<HostNetwork>>,
    network: PodNetwork,
    /// None: the kernel can't do it.
    _forwarding: Option<Forwarding>,
    _console: Console,
}

/// What of the host is bound into the share.
///
/// The same file or directory is bound once, so that all containers have the same inodes of it; but what was bound
/// read-only first, and is then to be written, is bound again.
#[derive(Debug, Default)]
struct Volumes {
    /// By device and inode: the volume's name, and whether it is read-only.
    bound: HashMap<(u64, u64), (String, bool)>,
    count: u32,
}

impl MachinePod {
    #[must_use]
    pub fn new(
        configuration: Configuration,
        namespace: Option<Namespace>,
        tenant: String,
        maker: Arc<Maker>,
    ) -> Self {
        Self {
            limits: Limits::of(&configuration),
            configuration,
            namespace,
            tenant,
            maker,
            ending: Arc::default(),
            asked: Arc::default(),
            up: watch::Sender::new(None),
        }
    }

    /// Of the machine that runs, if one does.
    #[must_use]
    pub fn meter(&self) -> Option<Arc<Meter>> {
        self.up.borrow().as_ref().map(|up| Arc::clone(&up.meter))
    }

    fn up(&self) -> Result<Arc<Up>, TaskError> {
        let up = self.up.borrow().clone();
        up.ok_or_else(|| PodFailure::Stopped.into())
    }

    fn agent(&self) -> Result<Agent, TaskError> {
        Ok(self.up()?.guest.agent().clone())
    }

    async fn boot(
        &self,
        id: &str,
        bundle: &Bundle,
        disk_slots: u8,
        console: &mut Option<Console>,
        timeline: &Recorder,
    ) -> Result<Up, TaskError> {
        let namespace = self
            .namespace
            .as_ref()
            .ok_or_else(|| {
                TaskError::Unsupported(
                    "the host's network can't be given to a machine; a pod of Hull needs one of its own \
                     (no hostNetwork, no --net-host)"
                        .into(),
                )
            })?
            .try_clone()
            .map_err(PodFailure::from)?;
        pids::check(bundle)?;
        let opening = timeline.step("share and network namespace");
        let installation = Installation::find(&self.configuration).map_err(PodFailure::from)?;
        let size = spec::size(&bundle.spec, self.configuration.sizing);
        let queues = Queues {
            vcpus: size.vcpus,
            vhost: VhostNet::of(&self.configuration).map_err(PodFailure::from)?,
        };
        let mut infra = spec::infra(&bundle.spec, id);
        // Whether containers share it only they say.
        infra.share_process_namespace = bundle.place == Place::Sandbox;
        let directory = bundle.path.clone();
        let (share, host) = tokio::task::spawn_blocking(move || {
            let place = directory.join("share");
            mounts::make_directory(&place)?;
            let share = Share::create(&place, &directory.join("data"))?;
            let host = HostNetwork::join(namespace, NetworkFacts::default(), queues)?;
            Ok::<_, TaskError>((Arc::new(share), host))
        })
        .await??;
        drop(opening);
        let launch = timeline.step("launch");
        let nets = host.devices(Bandwidth::default());
        let (reader, pipe) =
            Console::open(&bundle.path.join("console.log")).map_err(PodFailure::from)?;
        *console = Some(reader);
        let host = Arc::new(Mutex::new(host));
        let shelf = Shelf::open(
            &self.configuration,
            templates::data_directory(),
            &self.tenant,
            &self.maker,
        );
        let boot = Boot {
            recipe: Recipe {
                installation,
                limits: self.limits,
                size,
                disk_slots,
                nets,
            },
            console: pipe,
            share: &share,
            shelf: shelf.map_err(PodFailure::from)?,
        };
        let launched = boot.launch().await?;
        timeline.machine(&launch, launched.started(), launched.pid());
        drop(launch);
        // While it boots.
        let taps = tokio::task::spawn_blocking({
            let host = Arc::clone(&host);
            let timeline = timeline.clone();
            move || {
                let _step = timeline.step("network");
                host.blocking_lock().connect()
            }
        });
        let met = match launched.meet().await? {
            // Nothing is in the share yet: the second machine gets what the first had.
            Met::Rejected(clone) => {
                let launch = timeline.step("launch");
                let launched = clone.boot().await?;
                timeline.machine(&launch, launched.started(), launched.pid());
                drop(launch);
                launched.meet().await?
            }
            answered => answered,
        };
        let Met::Answered(met) = met else {
            return Err(PodFailure::AgentLost.into());
        };
        let (guest, info) = *met;
        timeline.guest(&info.clock, guest.template().is_none());
        tracing::info!(
            kernel = info.kernel_release,
            agent = info.agent_version,
            template = guest.template(),
            "the guest is up"
        );
        let step = timeline.step("infra");
        guest.start_infra(&infra, &[]).await?;
        drop(step);
        timeline.mark(Mark::Infra);
        let taps = taps.await??;
        let step = timeline.step("guest's network");
        let network = host.lock().await;
        guest.connect_network(&infra, &network, taps).await?;
        drop(step);
        let meter = Arc::new(guest.meter(&network)?);
        drop(network);
        let forwarding = Forwarding::start(guest.agent().clone()).await;
        if let Err(error) = &forwarding {
            tracing::warn!(%error, "ports can't be forwarded by way of the pod's network namespace");
        }
        Ok(Up {
            timeline: timeline.clone(),
            meter,
            network: guest.network(&host),
            guest,
            share,
            volumes: StdMutex::default(),
            pids: StdMutex::default(),
            disks: StdMutex::default(),
            host,
            _forwarding: forwarding.ok(),
            _console: console.take().ok_or(PodFailure::Stopped)?,
        })
    }
}

/// Takes a machine down, and what is on the host for it. Whoever comes later finds that it is done.
async fn take_down(up: &watch::Sender<Option<Arc<Up>>>, ending: &Mutex<()>, machine: &Up) {
    let _ending = ending.lock().await;
    let is_it = |known: &Arc<Up>| std::ptr::eq(Arc::as_ptr(known), machine);
    if !up.borrow().as_ref().is_some_and(is_it) {
        return;
    }
    machine.guest.shut_down().await;
    machine.guest.machine().kill();
    machine.guest.machine().wait().await;
    let mut network = Arc::clone(&machine.host).lock_owned().await;
    if let Err(error) = tokio::task::spawn_blocking(move || network.take_down()).await {
        tracing::error!(error = chain(&error), "giving the pod's interfaces back");
    }
    up.send_replace(None);
}

#[async_trait]
impl Pod for MachinePod {
    async fn begin(&self, id: &str, bundle: &Bundle, root: &[RootMount]) -> Result<(), TaskError> {
        // The first root says which snapshotter the pod's roots are of.
        let disk_slots = match (mounts::on_disk(root), &bundle.place) {
            (None, _) => 0,
            (Some(_), Place::Alone) => 1,
            (Some(_), _) => MAX_SLOTS,
        };
        let mut console = None;
        let timeline = Recorder::begin(None);
        let kept = bundle.path.join(timeline::FILE);
        let booted = self.boot(id, bundle, disk_slots, &mut console, &timeline);
        let machine = match booted.await {
            Ok(machine) => Arc::new(machine),
            Err(error) => {
                timeline.write(&kept);
                tracing::error!(error = chain(&error), "the machine did not start");
                if let Some(mut console) = console {
                    console.drain(self.limits.drain).await;
                    for line in console.tail(CONSOLE_TAIL) {
                        tracing::error!(line, "the guest's console");
                    }
                }
                return Err(error);
            }
        };
        tokio::spawn(timeline.keep(kept));
        self.up.send_replace(Some(Arc::clone(&machine)));
        let (up, ending) = (self.up.clone(), Arc::clone(&self.ending));
        let asked = Arc::clone(&self.asked);
        tokio::spawn(async move {
            let reason = machine.guest.death().await;
            if asked.load(Ordering::Relaxed) {
                tracing::info!(
                    reason = chain(&reason),
                    "the machine has ended, as it was asked"
                );
            } else {
                tracing::warn!(error = chain(&reason), "the machine has ended");
            }
            take_down(&up, &ending, &machine).await;
        });
        Ok(())
    }

    async fn create(
        &self,
        name: &str,
        bundle: &Bundle,
        root: &[RootMount],
        stdin: bool,
    ) -> Result<Stdio, TaskError> {
        let machine = self.up()?;
        let mut container = {
            let (machine, bundle) = (Arc::clone(&machine), bundle.clone());
            tokio::task::spawn_blocking(move || {
                spec::container(&bundle.spec, stdin, |source, read_only| {
                    machine.bind(source, read_only)
                })
            })
            .await??
        };
        let _step = machine.timeline.step("create container");
        let root = machine.place_root(name, bundle, root).await?;
        let made = async {
            container.pids = machine.pids().place(name, bundle)?;
            let tty = container.tty.then_some(TERMINAL);
            let agent = machine.guest.agent();
            let stdio = agent.open_stdio(stdin, tty).await?;
            agent
                .create_container(name, &container, &root, &stdio)
                .await?;
            Ok(stdio)
        }
        .await;
        if made.is_err() {
            machine.pids().forget(name);
            machine.release_root(name).await;
        }
        made
    }

    async fn start(&self, name: &str) -> Result<(), TaskError> {
        let machine = self.up()?;
        machine.network.look_again().await?;
        let step = machine.timeline.step("start container");
        machine.guest.agent().start_container(name).await?;
        drop(step);
        machine.timeline.mark(Mark::Exec);
        machine.guest.serve_later_pods();
        footprint::shrink();
        Ok(())
    }

    fn printed(&self) {
        if let Some(machine) = &*self.up.borrow() {
            machine.timeline.mark(Mark::Output);
        }
    }

    async fn exec(&self, exec: &str, what: &Exec) -> Result<Stdio, TaskError> {
        let agent = self.agent()?;
        let stdio = agent.open_stdio(what.stdin, what.tty).await?;
        agent.exec(exec, what, &stdio).await?;
        Ok(stdio)
    }

    async fn wait(&self, process: Process<'_>) -> Result<ExitStatus, TaskError> {
        Ok(self.agent()?.wait(process).await?)
    }

    async fn signal(&self, process: Process<'_>, signal: u32, all: bool) -> Result<(), TaskError> {
        Ok(self.agent()?.signal(process, signal, all).await?)
    }

    async fn resize(&self, process: Process<'_>, size: Size) -> Result<(), TaskError> {
        Ok(self.agent()?.resize(process, size).await?)
    }

    async fn processes(&self, name: &str) -> Result<Vec<u32>, TaskError> {
        Ok(self.agent()?.processes(name).await?)
    }

    async fn stats(&self, name: Option<&str>) -> Result<Stats, TaskError> {
        Ok(self.agent()?.stats(name).await?)
    }

    async fn freeze(&self, name: &str) -> Result<(), TaskError> {
        Ok(self.agent()?.freeze(name).await?)
    }

    async fn thaw(&self, name: &str) -> Result<(), TaskError> {
        Ok(self.agent()?.thaw(name).await?)
    }

    async fn update(&self, name: &str, resources: &LinuxResources) -> Result<(), TaskError> {
        Ok(self.agent()?.update(name, resources).await?)
    }

    async fn wait_oom(&self, name: &str, kills: u64) -> Result<u64, TaskError> {
        Ok(self.agent()?.wait_oom(name, kills).await?)
    }

    async fn remove(&self, name: &str) -> Result<(), TaskError> {
        let Some(machine) = self.up.borrow().clone() else {
            // It is gone with its machine.
            return Ok(());
        };
        let agent = machine.guest.agent();
        // One that was never started has a process that waits.
        let killed = agent.signal(Process::Container(name), SIGKILL, true).await;
        if let Err(error) = answered(killed) {
            // Nor will it answer to anything else.
            machine.release_root(name).await;
            return Err(error.into());
        }
        // Whether it is gone the agent tells when it removes it.
        let _ = timeout(self.limits.end, agent.wait(Process::Container(name))).await;
        let removed = agent.remove_container(name).await;
        machine.pids().forget(name);
        machine.release_root(name).await;
        Ok(removed?)
    }

    async fn remove_exec(&self, container: &str, exec: &str) -> Result<(), TaskError> {
        Ok(self.agent()?.remove_exec(container, exec).await?)
    }

    async fn ended(&self) {
        // The sender is in `self`.
        let _ = self.up.subscribe().wait_for(Option::is_none).await;
    }

    async fn shut_down(&self) {
        let machine = self.up.borrow().clone();
        if let Some(machine) = machine {
            self.asked.store(true, Ordering::Relaxed);
            take_down(&self.up, &self.ending, &machine).await;
        }
    }
}

/// An answer is one, also if it is no.
fn answered(answer: Result<(), AgentError>) -> Result<(), AgentError> {
    match answer {
        Err(AgentError::Refused { .. }) => Ok(()),
        other => other,
    }
}

impl Up {
    /// Binds a file or directory into the share, if it isn't there yet, and says as which volume.
    fn bind(&self, source: &Path, read_only: bool) -> Result<String, TaskError> {
        let doing = || format!("opening {} for a container", source.display());
        let io_error = |error: rustix::io::Errno| TaskError::Io {
            doing: doing(),
            source: error.into(),
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, source, flags, Mode::empty()).map_err(io_error)?;
        let status = rustix::fs::fstat(&fd).map_err(io_error)?;
        let key = (status.st_dev, status.st_ino);
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, bound_read_only)) = volumes.bound.get(&key)
            && (read_only || !bound_read_only)
        {
            return Ok(name.clone());
        }
        volumes.count += 1;
        let name = format!("v{}", volumes.count);
        self.share.bind_volume(&name, &fd, read_only)?;
        volumes.bound.insert(key, (name.clone(), read_only));
        Ok(name)
    }

    /// Puts a container's root file system where the guest reaches it: into the share, or into a slot for disks.
    async fn place_root(
        self: &Arc<Self>,
        name: &str,
        bundle: &Bundle,
        mounts: &[RootMount],
    ) -> Result<Root, TaskError> {
        let Some(mount) = mounts::on_disk(mounts) else {
            let (machine, bundle) = (Arc::clone(self), bundle.clone());
            let (name, mounts) = (name.to_owned(), mounts.to_vec());
            return tokio::task::spawn_blocking(move || {
                mounts::root(&machine.share, &name, &bundle, &mounts)?;
                Ok(Root::Share(format!("rootfs/{name}")))
            })
            .await?;
        };
        let disk = mounts::Disk::open(mount)?;
        let inserted = self
            .guest
            .disks()
            .insert(&disk.file, disk.read_only)
            .await?;
        let root = Root::Disk(Disk {
            serial: inserted.serial(),
            file_system: disk.file_system,
            read_only: disk.read_only,
            options: disk.options,
            ..Default::default()
        });
        self.disks().insert(name.to_owned(), inserted);
        Ok(root)
    }

    /// The guest has unmounted it, or is gone. What can't be unmounted of the share goes with the process's mount
    /// namespace.
    async fn release_root(self: &Arc<Self>, name: &str) {
        let inserted = self.disks().remove(name);
        if let Some(inserted) = inserted {
            self.guest.disks().eject(inserted).await;
            return;
        }
        let (machine, root) = (Arc::clone(self), name.to_owned());
        let unmounted = tokio::task::spawn_blocking(move || machine.share.unmount_root(&root));
        match unmounted.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(name, error = chain(&error), "removing a root file system");
            }
            Err(error) => tracing::error!(name, %error, "removing a root file system"),
        }
    }

    fn pids(&self) -> MutexGuard<'_, Sharing> {
        self.pids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<String, Inserted>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
