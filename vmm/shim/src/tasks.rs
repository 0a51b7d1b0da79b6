//! The tasks of a pod: containers and their further processes, from their creation to their deletion.

mod amounts;
mod ending;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskExecAdded, TaskExecStarted, TaskIO, TaskStart,
};
use hull_pod::agent::{Process, Stdio};
use hull_pod::supervisor::Limits;
use hull_pod::supervisor::api::{Exec, Size};
use oci_spec::runtime::User;
use tokio::sync::watch;

use crate::bundle::{Bundle, Place};
use crate::events::Events;
use crate::failure::TaskError;
use crate::hooks::Hooks;
use crate::host::Host;
use crate::logger::{Logger, is_logger};
use crate::managed::{Exit, Managed, SIGKILL, State, must_be};
use crate::pod::{Pod, RootMount};
use crate::streams::{Places, Streams};

/// Further processes of a container, ended ones and all: as many as anybody should have.
const MAX_EXECS: usize = 1024;

/// A container.
#[derive(Debug)]
pub struct Task {
    pub id: String,
    pub bundle: PathBuf,
    /// As the agent knows it. None: it stands for infra.
    name: Option<String>,
    /// Of its first process.
    user: User,
    first: Arc<Managed>,
    hooks: Hooks,
    execs: Mutex<HashMap<String, (String, Arc<Managed>)>>,
}

/// All that are here.
pub struct Tasks {
    pod: Arc<dyn Pod>,
    host: Host,
    events: Events,
    limits: Limits,
    tasks: Mutex<HashMap<String, Arc<Task>>>,
    /// The pod's first container, with which the machine ends.
    owner: Mutex<Option<String>>,
    /// One after another: the first one starts the machine.
    creating: tokio::sync::Mutex<()>,
    names: AtomicU64,
    /// Set when the shim is to end.
    done: watch::Sender<bool>,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks").finish_non_exhaustive()
    }
}

/// A container that is to be made.
#[derive(Debug, Clone)]
pub struct New {
    pub id: String,
    pub bundle: PathBuf,
    pub root: Vec<Mount>,
    pub places: Places,
}

impl New {
    fn mounts(&self) -> Vec<RootMount> {
        let mounts = self.root.iter().map(|mount| RootMount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        });
        mounts.collect()
    }
}

impl Tasks {
    #[must_use]
    pub fn new(pod: Arc<dyn Pod>, host: Host, events: Events, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            pod,
            host,
            events,
            limits,
            tasks: Mutex::default(),
            owner: Mutex::default(),
            creating: tokio::sync::Mutex::default(),
            names: AtomicU64::new(1),
            done: watch::Sender::new(false),
        })
    }

    /// Makes a container, and with the first one the pod. Asked again, it answers the same.
    ///
    /// # Errors
    /// See [`TaskError`]; what was made of it is gone then.
    pub async fn create(&self, new: New) -> Result<(), TaskError> {
        let _creating = self.creating.lock().await;
        if let Some(known) = lock(&self.tasks).get(&new.id) {
            return if known.bundle == new.bundle && known.first.places == new.places {
                Ok(())
            } else {
                Err(TaskError::Exists(new.id))
            };
        }
        let path = new.bundle.clone();
        let bundle = tokio::task::spawn_blocking(move || Bundle::read(&path)).await??;
        let first = matches!(bundle.place, Place::Sandbox | Place::Alone);
        let owner = lock(&self.owner).clone();
        match owner {
            None if first => {
                self.pod.begin(&new.id, &bundle, &new.mounts()).await?;
                *lock(&self.owner) = Some(new.id.clone());
            }
            Some(owner) if !first && bundle.owner(&new.id) == owner => {}
            _ => {
                return Err(TaskError::State {
                    id: new.id,
                    is: "another pod's",
                    must: "of the pod that this shim is for",
                });
            }
        }
        let made = async {
            let task = self.make(&new, &bundle).await?;
            if let Err(error) = task.hooks.created(&self.host).await {
                if let Some(name) = &task.name {
                    self.take_away(name).await;
                }
                task.hooks.stopped(&self.host).await;
                return Err(TaskError::from(error));
            }
            Ok(task)
        };
        let task = match made.await {
            Ok(task) => task,
            Err(error) => {
                if first {
                    self.end_pod().await;
                }
                return Err(error);
            }
        };
        lock(&self.tasks).insert(new.id.clone(), Arc::new(task));
        let io = TaskIO {
            stdin: new.places.stdin,
            stdout: new.places.stdout,
            stderr: new.places.stderr,
            terminal: new.places.terminal,
            ..Default::default()
        };
        self.events
            .publish(TaskCreate {
                container_id: new.id,
                bundle: new.bundle.display().to_string(),
                rootfs: new.root,
                io: Some(io).into(),
                pid: std::process::id(),
                ..Default::default()
            })
            .await;
        Ok(())
    }

    /// Waits until what is being made is.
    pub async fn creations(&self) {
        drop(self.creating.lock().await);
    }

    async fn make(&self, new: &New, bundle: &Bundle) -> Result<Task, TaskError> {
        let (name, streams) = if bundle.place == Place::Sandbox {
            (None, None)
        } else {
            let name = self.name("container");
            let stdin = !new.places.stdin.is_empty();
            let stdio = self.pod.create(&name, bundle, &new.mounts(), stdin).await?;
            let pod = Arc::clone(&self.pod);
            let printed = move || pod.printed();
            let streams = match self.connect(stdio, &new.places, &new.id, printed).await {
                Ok(streams) => streams,
                Err(error) => {
                    self.take_away(&name).await;
                    return Err(error);
                }
            };
            (Some(name), Some(streams))
        };
        let process = bundle.spec.process().as_ref();
        Ok(Task {
            id: new.id.clone(),
            bundle: new.bundle.clone(),
            name,
            user: process
                .map(|process| process.user().clone())
                .unwrap_or_default(),
            first: Arc::new(Managed::new(new.places.clone(), None, streams)),
            hooks: Hooks::of(&bundle.spec, &new.id, new.bundle.clone()),
            execs: Mutex::default(),
        })
    }

    /// Connects a process's streams with what containerd names for them.
    async fn connect(
        &self,
        stdio: Stdio,
        places: &Places,
        id: &str,
        printed: impl Fn() + Clone + Send + 'static,
    ) -> Result<Streams, TaskError> {
        let logger = if is_logger(&places.stdout) {
            let namespace = self.events.namespace();
            Some(Logger::start(&self.host, &places.stdout, namespace, id).await?)
        } else {
            None
        };
        Ok(Streams::connect(stdio, places, logger, printed)?)
    }

    /// Starts a container, or a further process of it.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let (handle, process) = task.process(exec)?;
        let _starting = process.starting.lock().await;
        must_be(id, &process, "created", |state| state == State::Created)?;
        if handle.is_some() {
            must_be(id, &task.first, "running", |state| state == State::Running)?;
        }
        match (&task.name, &handle) {
            (None, _) => {}
            (Some(name), None) => {
                if let Some(streams) = process.streams() {
                    streams.open_stdin()?;
                }
                self.pod.start(name).await?;
            }
            (Some(_), Some(handle)) => self.start_exec(id, &process, handle).await?,
        }
        process.set(State::Running);
        if handle.is_none() {
            let started = TaskStart {
                container_id: id.into(),
                pid: std::process::id(),
                ..Default::default()
            };
            self.events.publish(started).await;
            task.hooks.started(&self.host).await;
        } else {
            let started = TaskExecStarted {
                container_id: id.into(),
                exec_id: exec.into(),
                pid: std::process::id(),
                ..Default::default()
            };
            self.events.publish(started).await;
        }
        self.see_end(task, exec, handle, &process);
        Ok(())
    }

    async fn start_exec(&self, id: &str, process: &Managed, handle: &str) -> Result<(), TaskError> {
        let Some(what) = &process.what else {
            return Ok(());
        };
        let stdio = self.pod.exec(handle, what).await?;
        match self.connect(stdio, &process.places, id, || ()).await {
            Ok(streams) => {
                streams.open_stdin()?;
                process.set_streams(streams);
                Ok(())
            }
            Err(error) => {
                let started = Process::Exec {
                    container: &what.container,
                    exec: handle,
                };
                // It must not go on unseen.
                let _ = self.pod.signal(started, SIGKILL, false).await;
                Err(error)
            }
        }
    }

    /// Makes ready a further process of a container.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub async fn exec(
        &self,
        id: &str,
        exec: &str,
        places: Places,
        process: &oci_spec::runtime::Process,
    ) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let Some(name) = &task.name else {
            return Err(TaskError::Unsupported(format!(
                "{id:?} stands for the pod's namespaces, where there is no program to run"
            )));
        };
        let user = process.user();
        let what = Exec {
            container: name.clone(),
            args: process.args().clone().unwrap_or_default(),
            env: process.env().clone().unwrap_or_default(),
            cwd: Some(process.cwd().display().to_string()).filter(|cwd| !cwd.is_empty()),
            // The container's own has further groups, too.
            user: (*user != task.user).then(|| format!("{}:{}", user.uid(), user.gid())),
            stdin: !places.stdin.is_empty(),
            tty: places.terminal.then(|| size(process)),
        };
        {
            let mut execs = lock(&task.execs);
            if exec.is_empty() || execs.contains_key(exec) || execs.len() >= MAX_EXECS {
                return Err(TaskError::Exists(exec.to_owned()));
            }
            let managed = Managed::new(places, Some(what), None);
            execs.insert(exec.to_owned(), (self.name("exec"), Arc::new(managed)));
        }
        let added = TaskExecAdded {
            container_id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.events.publish(added).await;
        Ok(())
    }

    /// Until a process has ended.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit, TaskError> {
        let (_, process) = self.task(id)?.process(exec)?;
        Ok(process.exit().await)
    }

    /// # Errors
    /// When there is no such process, or it has no terminal.
    pub async fn resize(&self, id: &str, exec: &str, size: Size) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let (handle, _) = task.process(exec)?;
        match task.known(handle.as_deref()) {
            Some(known) => self.pod.resize(known, size).await,
            None => Ok(()),
        }
    }

    /// # Errors
    /// When there is no such process.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<(), TaskError> {
        let (_, process) = self.task(id)?.process(exec)?;
        if let Some(streams) = process.streams() {
            streams.close_stdin();
        }
        Ok(())
    }

    /// The processes of a container, as the guest numbers them. Infra's is the shim.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub async fn processes(&self, id: &str) -> Result<Vec<u32>, TaskError> {
        match &self.task(id)?.name {
            Some(name) => self.pod.processes(name).await,
            None => Ok(vec![std::process::id()]),
        }
    }

    /// A container, and what is known of one of its processes.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn look(&self, id: &str, exec: &str) -> Result<(Arc<Task>, Arc<Managed>), TaskError> {
        let task = self.task(id)?;
        let (_, process) = task.process(exec)?;
        Ok((task, process))
    }

    /// Ends the shim, if nothing is here any more or it is to be `now`.
    pub async fn shut_down(&self, now: bool) {
        if !now && !lock(&self.tasks).is_empty() {
            return;
        }
        self.pod.shut_down().await;
        self.done.send_replace(true);
    }

    /// Until the shim is to end.
    pub async fn done(&self) {
        // The sender is in `self`.
        let _ = self.done.subscribe().wait_for(|done| *done).await;
    }

    fn task(&self, id: &str) -> Result<Arc<Task>, TaskError> {
        lock(&self.tasks)
            .get(id)
            .cloned()
            .ok_or_else(|| TaskError::NoTask(id.to_owned()))
    }

    /// A name that the agent takes, and that nothing else has had.
    fn name(&self, kind: &str) -> String {
        format!("{kind}-{}", self.names.fetch_add(1, Ordering::Relaxed))
    }
}

impl Task {
    /// The agent's name of an exec, and the process.
    fn process(&self, exec: &str) -> Result<(Option<String>, Arc<Managed>), TaskError> {
        if exec.is_empty() {
            return Ok((None, Arc::clone(&self.first)));
        }
        let execs = lock(&self.execs);
        let (handle, process) = execs.get(exec).ok_or_else(|| TaskError::NoExec {
            container: self.id.clone(),
            exec: exec.to_owned(),
        })?;
        Ok((Some(handle.clone()), Arc::clone(process)))
    }

    /// The process as the agent knows it. None: it is infra.
    fn known<'a>(&'a self, handle: Option<&'a str>) -> Option<Process<'a>> {
        let container = self.name.as_deref()?;
        Some(match handle {
            None => Process::Container(container),
            Some(exec) => Process::Exec { container, exec },
        })
    }
}

/// Of a process's terminal, until somebody says how large theirs is.
fn size(process: &oci_spec::runtime::Process) -> Size {
    let given = process.console_size();
    let number = |number: Option<u64>| number.and_then(|number| u16::try_from(number).ok());
    let columns = number(given.as_ref().map(|size| size.width()));
    let rows = number(given.as_ref().map(|size| size.height()));
    Size {
        columns: columns.unwrap_or(80),
        rows: rows.unwrap_or(24),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
