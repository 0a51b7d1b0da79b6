//! The pod as the guest holds it: infra, and the containers in its namespaces.
//!
//! Locks guard maps only and are never held while something is waited for, so a call
//! that hangs (a file system that does not answer, say) holds up no other.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use hull_protocol::agent::{
    CreateContainerRequest, ExecRequest, StartInfraRequest, Streams as StreamNumbers,
};
use oci_spec::runtime::{LinuxCapabilities, Process as OciProcess, Spec};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::container::cgroup::{self, Cgroup};
use crate::container::mounts::{self, Placed};
use crate::container::spec::{self, Source};
use crate::container::user::{self, User};
use crate::container::{
    Container, Exit, Places, Running, Slot, check_name, devices, exited, ready, reserve,
};
use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result};
use crate::helper::{self, Confinement, Request, infra};
use crate::process::{Process, Reaper};
use crate::stdio::{self, Claimed, Size, Terminal, Until};
use crate::streams::Streams;

const MAX_CONTAINERS: usize = 256;
const MAX_MEMORY_VOLUMES: usize = 256;
const MAX_SYSCTLS: usize = 256;
const MAX_ARGUMENTS: usize = 4096;
const DEFAULT_SHM: u64 = 64 * 1024 * 1024;
/// How long a terminal may take to arrive after its process has been made.
const CONSOLE: Duration = Duration::from_secs(5);
/// How long killed containers may take to end before the machine goes anyway.
const ENDING: Duration = Duration::from_secs(5);

/// The pod's state.
#[derive(Debug)]
pub struct Pod {
    run: PathBuf,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    infra_claimed: AtomicBool,
    infra: OnceLock<Infra>,
    containers: Mutex<HashMap<String, Slot<Container>>>,
    next_exec: AtomicU64,
}

#[derive(Debug)]
struct Infra {
    process: Process,
    share_pids: bool,
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
            reaper,
            streams,
            infra_claimed: AtomicBool::new(false),
            infra: OnceLock::new(),
            containers: Mutex::default(),
            next_exec: AtomicU64::new(0),
        })
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

    /// Starts infra and mounts what the pod's containers share.
    pub async fn start_infra(self: &Arc<Self>, request: StartInfraRequest) -> Result<u32> {
        let sysctls = check_infra(&request)?;
        if self.infra_claimed.swap(true, Ordering::AcqRel) {
            return Err(Error::State("infra was started before".into()));
        }
        let pod = Arc::clone(self);
        let hostname = request.hostname.clone();
        let share_pids = request.share_process_namespace;
        blocking(move || pod.mount_volumes(&request)).await?;
        let request = Request::Infra(infra::Infra {
            hostname,
            share_pids,
            sysctls,
            cgroup_procs: cgroup::infra_procs(),
        });
        let process = helper::call(&self.reaper, &request, Vec::new()).await?;
        let pid = process.pid.as_raw_nonzero().get().unsigned_abs();
        let (sender, exit) = watch::channel(None);
        let ending = process.clone();
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let ended = ending.ended().await;
            tracing::info!("infra ended with {}", ended.code);
            pod.kill_containers();
            sender.send_replace(Some(Exit {
                ended,
                oom_killed: false,
            }));
        });
        let infra = Infra {
            process,
            share_pids,
            exit,
        };
        // The claim above makes this the only call.
        let _ = self.infra.set(infra);
        Ok(pid)
    }

    fn mount_volumes(&self, request: &StartInfraRequest) -> Result<()> {
        if !request.share_tag.is_empty() {
            let share = self.run.join("share");
            mount(
                request.share_tag.as_str(),
                &share,
                "virtiofs",
                // Not nosuid: the containers' root file systems are in there.
                MountFlags::NODEV,
                None,
            )
            .doing(|| format!("mounting the share {:?}", request.share_tag))?;
        }
        for volume in &request.memory_volumes {
            let path = self.run.join("memory").join(&volume.name);
            fs::create_dir(&path).doing(|| format!("making {}", path.display()))?;
            mount_tmpfs(&path, volume.size_bytes, 0o777, MountFlags::empty())?;
        }
        let shm = match request.shm_bytes {
            0 => DEFAULT_SHM,
            bytes => bytes,
        };
        mount_tmpfs(&self.run.join("shm"), shm, 0o1777, MountFlags::NOEXEC)
    }

    /// Makes a container up to where its program would start.
    pub async fn create(self: &Arc<Self>, request: CreateContainerRequest) -> Result<u32> {
        let id = request.container_id.clone();
        check_name("container", &id)?;
        let infra = self.infra()?;
        if infra.process.has_ended() {
            return Err(Error::State("infra has ended".into()));
        }
        reserve(
            &mut self.containers(),
            "container",
            &id,
            MAX_CONTAINERS,
            "containers",
        )?;
        let made = self.make_container(request).await;
        let mut containers = self.containers();
        let container = match made {
            Ok(container) => container,
            Err(error) => {
                containers.remove(&id);
                return Err(error);
            }
        };
        let pid = container.first.process.pid.as_raw_nonzero();
        containers.insert(id, Slot::Ready(Arc::new(container)));
        drop(containers);
        if infra.process.has_ended() {
            self.kill_containers();
        }
        Ok(pid.get().unsigned_abs())
    }

    async fn make_container(
        self: &Arc<Self>,
        request: CreateContainerRequest,
    ) -> Result<Container> {
        let numbers = request.streams.clone().unwrap_or_default();
        let size = Size::new(numbers.columns, numbers.rows)?;
        let claimed = self.claim(&numbers).await?;
        let id = &request.container_id;
        let places = Places {
            bundle: self.run.join("containers").join(id),
            state: self.run.join("state").join(id),
        };
        let cgroup = Arc::new(Cgroup::create(id)?);
        let made = async {
            let prepared = {
                let (pod, places, cgroup) = (Arc::clone(self), places.clone(), Arc::clone(&cgroup));
                let request = request.clone();
                blocking(move || pod.prepare(&request, &places, &cgroup)).await?
            };
            let create = |console| {
                Request::Create(helper::Create {
                    id: id.clone(),
                    states: self.run.join("state"),
                    bundle: places.bundle.clone(),
                    console,
                })
            };
            let attached = Attached {
                claimed,
                terminal: numbers.tty,
                console: places.bundle.join("console"),
                user: &prepared.user,
                until: Until::Closed,
            };
            let (process, terminal, copies) = self.run_helper(attached, create).await?;
            if let Some(terminal) = &terminal {
                terminal.resize(size)?;
            }
            let first = Running::new(process, terminal, copies, Arc::clone(&cgroup), true);
            Ok((prepared, first))
        };
        match made.await {
            Ok((prepared, first)) => Ok(Container::new(
                places,
                cgroup,
                prepared.spec,
                first,
                request.rootfs.clone(),
            )),
            Err(error) => {
                for cleaned in [cgroup.remove().await, places.remove()] {
                    if let Err(also) = cleaned {
                        tracing::warn!("after a failed start: {also}");
                    }
                }
                Err(error)
            }
        }
    }

    /// Everything on disk and in the cgroup that the container needs.
    fn prepare(
        &self,
        request: &CreateContainerRequest,
        places: &Places,
        cgroup: &Cgroup,
    ) -> Result<Prepared> {
        let given = spec::parse(&request.spec)?;
        places.make()?;
        let share = self.run.join("share");
        let root = mounts::open_shared(&share, &request.rootfs)?;
        mounts::check_root(&root)?;
        let user = user::look_up(&root, &request.user, &request.additional_gids)?;
        if let Some(process) = given.process() {
            mounts::make_directory(&root, process.cwd()).or_else(|error| {
                let read_only = given
                    .root()
                    .as_ref()
                    .and_then(|root| root.readonly())
                    .unwrap_or(false);
                if read_only { Ok(()) } else { Err(error) }
            })?;
        }
        let mut placed = vec![mounts::place(&root, places.bundle.join("rootfs"))?];
        let mut wanted = spec::mounts(&given)?;
        for (index, mount) in wanted.iter_mut().enumerate() {
            let fd = match spec::source(mount)? {
                Source::New => continue,
                Source::Share(path) => mounts::open_shared(&share, path)?,
                Source::Memory(path) => mounts::open_memory(&self.run.join("memory"), path)?,
                Source::Shm => mounts::open_directory(&self.run.join("shm"))?,
            };
            let place = mounts::place(fd, places.bundle.join(format!("mounts/{index}")))?;
            spec::bind(mount, &place.path);
            placed.push(place);
        }
        let infra = self.infra()?;
        let spec = spec::complete(
            &given,
            spec::Guest {
                root: places.bundle.join("rootfs"),
                cgroup: &cgroup.name,
                infra_pid: infra.process.pid.as_raw_nonzero().get(),
                share_pids: infra.share_pids,
                user: &user,
                terminal: request.streams.tty,
                mounts: wanted,
            },
        )?;
        write_json(&places.bundle.join("config.json"), &spec)?;
        let rules = spec
            .linux()
            .iter()
            .filter_map(|linux| linux.resources().as_ref())
            .filter_map(|resources| resources.devices().as_deref())
            .flatten()
            .cloned()
            .collect::<Vec<_>>();
        devices::attach(cgroup.open()?, &rules)?;
        Ok(Prepared {
            spec,
            user,
            _placed: placed,
        })
    }

    async fn claim(&self, numbers: &StreamNumbers) -> Result<Claimed> {
        Ok(Claimed {
            stdin: self.streams.claim(numbers.stdin).await?,
            stdout: self.streams.claim(numbers.stdout).await?,
            stderr: if numbers.tty {
                None
            } else {
                self.streams.claim(numbers.stderr).await?
            },
        })
    }

    /// Runs a helper for a process, with its stdio attached.
    async fn run_helper(
        &self,
        attached: Attached<'_>,
        request: impl FnOnce(Option<PathBuf>) -> Request,
    ) -> Result<(Process, Option<Arc<Terminal>>, tokio::task::JoinSet<()>)> {
        let Attached {
            claimed,
            terminal,
            console,
            user,
            until,
        } = attached;
        if !terminal {
            let (theirs, ours) = stdio::pipes(&claimed, user.uid, user.gid)?;
            let process = helper::call(&self.reaper, &request(None), theirs.into()).await?;
            let copies = stdio::copy_pipes(ours, claimed, &process, until);
            return Ok((process, None, copies));
        }
        let listener =
            UnixListener::bind(&console).doing(|| "making the terminal's socket".into())?;
        let process = helper::call(&self.reaper, &request(Some(console)), Vec::new()).await?;
        let master = tokio::time::timeout(CONSOLE, receive_master(&listener))
            .await
            .map_err(|_| Error::State("the terminal did not arrive".into()))
            .and_then(|received| received.doing(|| "receiving the terminal".into()));
        let terminal = master.and_then(|master| Terminal::new(master, user.uid));
        let terminal = match terminal {
            Ok(terminal) => Arc::new(terminal),
            Err(error) => {
                // Nobody else knows of it.
                let _ = process.signal(libc::SIGKILL);
                return Err(error);
            }
        };
        let copies = stdio::copy_terminal(&terminal, claimed, &process, until);
        Ok((process, Some(terminal), copies))
    }

    pub fn start(&self, id: &str) -> Result<()> {
        self.container(id)?.start()
    }

    /// Runs a further process in a container.
    pub async fn exec(self: &Arc<Self>, request: ExecRequest) -> Result<u32> {
        check_name("exec", &request.exec_id)?;
        if request.args.is_empty()
            || request.args.len() > MAX_ARGUMENTS
            || request.env.len() > MAX_ARGUMENTS
        {
            return Err(Error::Invalid(format!(
                "an exec has 1 to {MAX_ARGUMENTS} arguments, and no more variables"
            )));
        }
        let container = self.container(&request.container_id)?;
        if !container.is_started() || container.first.has_ended() {
            return Err(Error::State("the container is not running".into()));
        }
        container.reserve_exec(&request.exec_id)?;
        let made = self.make_exec(&container, &request).await;
        let mut execs = container.execs();
        match made {
            Ok(running) => {
                let pid = running.process.pid.as_raw_nonzero().get().unsigned_abs();
                execs.insert(request.exec_id, Slot::Ready(Arc::new(running)));
                Ok(pid)
            }
            Err(error) => {
                execs.remove(&request.exec_id);
                Err(error)
            }
        }
    }

    async fn make_exec(&self, container: &Container, request: &ExecRequest) -> Result<Running> {
        let numbers = request.streams.clone().unwrap_or_default();
        let size = Size::new(numbers.columns, numbers.rows)?;
        let claimed = self.claim(&numbers).await?;
        let directory = Scratch::make(
            self.run
                .join("execs")
                .join(self.next_exec.fetch_add(1, Ordering::Relaxed).to_string()),
        )?;
        container.write_running_state(&directory.0.join(&request.container_id))?;
        let (process, confinement, user) = exec_process(container, request, numbers.tty)?;
        let process_path = directory.0.join("process.json");
        write_json(&process_path, &process)?;
        let exec = |console| {
            Request::Exec(helper::Exec {
                id: request.container_id.clone(),
                states: directory.0.clone(),
                process: process_path.clone(),
                console,
                confinement,
                terminal_size: numbers.tty.then_some(size),
            })
        };
        let attached = Attached {
            claimed,
            terminal: numbers.tty,
            console: directory.0.join("console"),
            user: &user,
            until: Until::Ended,
        };
        let (process, terminal, copies) = self.run_helper(attached, exec).await?;
        let cgroup = Arc::clone(&container.cgroup);
        Ok(Running::new(process, terminal, copies, cgroup, false))
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
        self.process(container, exec)?
            .signal(signal)
            .doing(|| format!("sending signal {signal}"))
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
        container.cgroup.remove().await?;
        let pod = Arc::clone(self);
        let removed = Arc::clone(&container);
        blocking(move || {
            removed.places.remove()?;
            pod.release_rootfs(&removed.rootfs);
            Ok(())
        })
        .await?;
        self.containers().remove(id);
        Ok(())
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

/// What comes out of [`Pod::prepare`].
struct Prepared {
    spec: Spec,
    user: User,
    /// Held until the container has its own copies.
    _placed: Vec<Placed>,
}

/// Stdio of a process about to be made.
struct Attached<'a> {
    claimed: Claimed,
    terminal: bool,
    /// Where a socket for the terminal may be made.
    console: PathBuf,
    user: &'a User,
    until: Until,
}

/// A directory that is removed with its contents.
struct Scratch(PathBuf);

impl Scratch {
    fn make(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).doing(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("removing {}: {error}", self.0.display());
        }
    }
}

fn check_infra(request: &StartInfraRequest) -> Result<BTreeMap<String, String>> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if request.hostname.is_empty()
        || request.hostname.len() > 64
        || !request.hostname.bytes().all(plain)
    {
        return Err(Error::Invalid(
            "the hostname is not of [A-Za-z0-9.-]".into(),
        ));
    }
    if request.memory_volumes.len() > MAX_MEMORY_VOLUMES {
        return Err(Error::TooMany {
            what: "memory volumes",
            limit: MAX_MEMORY_VOLUMES,
        });
    }
    for volume in &request.memory_volumes {
        check_name("memory volume", &volume.name)?;
    }
    if request.sysctls.len() > MAX_SYSCTLS {
        return Err(Error::TooMany {
            what: "sysctls",
            limit: MAX_SYSCTLS,
        });
    }
    let mut sysctls = BTreeMap::new();
    for (name, value) in &request.sysctls {
        if infra::sysctl_path(name).is_none() || value.len() > 1024 {
            return Err(Error::Invalid(format!(
                "sysctl {:?} is not one of the pod's own namespaces",
                crate::error::shorten(name, 100)
            )));
        }
        sysctls.insert(name.clone(), value.clone());
    }
    Ok(sysctls)
}

fn mount_tmpfs(path: &Path, size: u64, mode: u32, flags: MountFlags) -> Result<()> {
    let options = match size {
        0 => format!("mode={mode:o}"),
        size => format!("mode={mode:o},size={size}"),
    };
    let options = std::ffi::CString::new(options)
        .map_err(|_| Error::Invalid("a memory volume's options can't hold a zero byte".into()))?;
    mount(
        "tmpfs",
        path,
        "tmpfs",
        flags | MountFlags::NODEV | MountFlags::NOSUID,
        options.as_c_str(),
    )
    .doing(|| format!("mounting {}", path.display()))
}

/// The process of an exec: the container's own, with what the request says instead.
fn exec_process(
    container: &Container,
    request: &ExecRequest,
    terminal: bool,
) -> Result<(OciProcess, Confinement, User)> {
    let base = container
        .spec
        .process()
        .clone()
        .ok_or_else(|| Error::State("the container has no process".into()))?;
    let user = if request.user.is_empty() {
        User {
            uid: base.user().uid(),
            gid: base.user().gid(),
            groups: base.user().additional_gids().clone().unwrap_or_default(),
            home: "/".into(),
        }
    } else {
        user::look_up(container.open_root()?, &request.user, &[])?
    };
    let mut process = base.clone();
    process.set_args(Some(request.args.clone()));
    if !request.cwd.is_empty() {
        if !request.cwd.starts_with('/') {
            return Err(Error::Invalid(
                "an exec's directory must be absolute".into(),
            ));
        }
        process.set_cwd(request.cwd.clone().into());
    }
    let mut env = base.env().clone().unwrap_or_default();
    if !request.user.is_empty() {
        env.retain(|entry| !entry.starts_with("HOME="));
    }
    for entry in &request.env {
        let Some((name, _)) = entry.split_once('=') else {
            return Err(Error::Invalid(format!(
                "variable {:?} is not NAME=value",
                crate::error::shorten(entry, 100)
            )));
        };
        let prefix = format!("{name}=");
        env.retain(|old| !old.starts_with(&prefix));
        env.push(entry.clone());
    }
    process.set_env(Some(env));
    let mut process = spec::with_user(process, &user, terminal)?;
    let seccomp = container
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().clone());
    // Loading a filter needs CAP_SYS_ADMIN, or no_new_privileges.
    let mut capabilities = None;
    if seccomp.is_some() && process.no_new_privileges().is_none() {
        capabilities = process.capabilities().clone();
        process.set_capabilities(capabilities.clone().map(with_filter_loading));
    }
    let confinement = Confinement {
        seccomp,
        capabilities,
    };
    Ok((process, confinement, user))
}

/// Adds what loading a filter, and dropping this again, needs.
fn with_filter_loading(mut given: LinuxCapabilities) -> LinuxCapabilities {
    use oci_spec::runtime::Capability::{Setpcap, SysAdmin};
    let with = |set: &Option<oci_spec::runtime::Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend([SysAdmin, Setpcap]);
        Some(set)
    };
    given.set_bounding(with(given.bounding()));
    given.set_effective(with(given.effective()));
    given.set_permitted(with(given.permitted()));
    given
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    serde_json::to_vec(value)
        .map_err(std::io::Error::from)
        .and_then(|bytes| fs::write(path, bytes))
        .doing(|| format!("writing {}", path.display()))
}

async fn receive_master(listener: &UnixListener) -> std::io::Result<std::os::fd::OwnedFd> {
    let (socket, _) = listener.accept().await?;
    let socket = Endpoint::new(socket.into_std()?.into())?;
    let (_, mut fds) = socket.receive(&mut [0; 64], 1).await?;
    fds.pop().ok_or(std::io::ErrorKind::InvalidData.into())
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
