//! One container of the pod: made, run, and forgotten.

pub mod cgroup;
pub mod devices;
pub mod disk;
pub mod mounts;
pub mod resources;
pub mod seccomp;
pub mod spec;
pub mod stats;
pub mod user;

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::Spec;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, watch};
use tokio::time::timeout;

use self::cgroup::Cgroup;
use self::seccomp::Filter;
use crate::error::{Doing, Error, Result};
use crate::process::{Ended, Process};
use crate::stdio::{Replaceable, Size, Terminal};

/// Most execs of a container that have not been removed.
const MAX_EXECS: usize = 256;

/// How long execs that are being made may hold up a freeze or thaw.
const STILLNESS: Duration = Duration::from_secs(10);
/// From SIGHUP to SIGKILL of an exec that nobody has any more.
const HANGING_UP: Duration = Duration::from_secs(5);

/// How a container's or exec's process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    pub ended: Ended,
    /// The kernel killed a process of the container for its memory limit.
    pub oom_killed: bool,
}

/// A process with its stdio: a container's first, or an exec's.
#[derive(Debug)]
pub struct Running {
    pub process: Process,
    pub terminal: Option<Arc<Terminal>>,
    pub streams: Replaceable,
    exit: watch::Receiver<Option<Exit>>,
}

impl Running {
    /// Follows a process. `exit` is told when its end has been looked into.
    pub fn new(
        process: Process,
        terminal: Option<Arc<Terminal>>,
        streams: Replaceable,
        cgroup: Arc<Cgroup>,
        is_first: bool,
    ) -> Self {
        let (sender, exit) = watch::channel(None);
        let ooms_before = if is_first { 0 } else { cgroup.oom_kills() };
        let ending = process.clone();
        tokio::spawn(async move {
            let ended = ending.ended().await;
            if is_first {
                // With the pod's PID namespace the others would live on.
                if let Err(error) = cgroup.kill() {
                    tracing::warn!("{error}");
                }
            }
            sender.send_replace(Some(Exit {
                ended,
                oom_killed: cgroup.oom_kills() > ooms_before,
            }));
        });
        Self {
            process,
            terminal,
            streams,
            exit,
        }
    }

    /// A receiver that outlives the container's removal.
    pub fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.clone()
    }

    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    pub fn resize(&self, size: Size) -> Result<()> {
        match &self.terminal {
            Some(terminal) => terminal.resize(size),
            None => Err(Error::State("the process has no terminal".into())),
        }
    }
}

/// Waits for an exit. None: it was never to be told, as the agent is ending.
pub async fn exited(mut exit: watch::Receiver<Option<Exit>>) -> Option<Exit> {
    exit.wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit)
}

/// Where a container's files are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Bundle: config.json, rootfs, mounts.
    pub bundle: PathBuf,
    /// Its state, as libcontainer keeps it.
    pub state: PathBuf,
}

impl Places {
    pub fn make(&self) -> Result<()> {
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        for path in [self.bundle.clone(), self.bundle.join("mounts")] {
            builder
                .create(&path)
                .doing(|| format!("making {}", path.display()))?;
        }
        Ok(())
    }

    /// Removes the files. Never what is mounted: a mount that should be gone and is
    /// not makes this fail.
    pub fn remove(&self) -> Result<()> {
        let mut leaves = vec![
            self.bundle.join("rootfs"),
            self.bundle.join("config.json"),
            self.bundle.join("console"),
        ];
        if let Ok(mounts) = fs::read_dir(self.bundle.join("mounts")) {
            leaves.extend(mounts.filter_map(|entry| Some(entry.ok()?.path())));
        }
        leaves.extend([self.bundle.join("mounts"), self.bundle.clone()]);
        for path in leaves {
            let removed = match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => fs::remove_dir(&path),
                Ok(_) => fs::remove_file(&path),
                Err(error) => Err(error),
            };
            match removed {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => other.doing(|| format!("removing {}", path.display()))?,
            }
        }
        match fs::remove_dir_all(&self.state) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.doing(|| format!("removing {}", self.state.display())),
        }
    }
}

/// Where a container's root file system comes from.
#[derive(Debug)]
pub enum Root {
    /// A path beneath the share.
    Share(String),
    Disk(disk::Mounted),
}

/// A container whose first process exists.
#[derive(Debug)]
pub struct Container {
    pub places: Places,
    pub cgroup: Arc<Cgroup>,
    /// As completed; execs are made after it.
    pub spec: Spec,
    pub filter: Option<Arc<Filter>>,
    pub first: Running,
    pub root: Root,
    started: Mutex<bool>,
    execs: Mutex<HashMap<String, Slot<Running>>>,
    /// Whether its processes are made to stand still. Read while an exec is made: one that is not whole yet would
    /// never be.
    frozen: RwLock<bool>,
}

impl Container {
    pub fn new(
        places: Places,
        cgroup: Arc<Cgroup>,
        spec: Spec,
        filter: Option<Arc<Filter>>,
        first: Running,
        root: Root,
    ) -> Self {
        Self {
            places,
            cgroup,
            spec,
            filter,
            first,
            root,
            started: Mutex::new(false),
            execs: Mutex::default(),
            frozen: RwLock::new(false),
        }
    }

    /// Lets the first process become the container's program.
    pub fn start(&self) -> Result<()> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if *started {
            return Err(Error::State("the container was started before".into()));
        }
        let path = self.places.state.join("notify.sock");
        let mut socket = std::os::unix::net::UnixStream::connect(&path)
            .doing(|| "starting the container".into())?;
        std::io::Write::write_all(&mut socket, b"start container")
            .doing(|| "starting the container".into())?;
        *started = true;
        Ok(())
    }

    pub fn is_started(&self) -> bool {
        *self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the container from being frozen until what is returned is dropped.
    pub fn moving(&self) -> Result<RwLockReadGuard<'_, bool>> {
        // Who freezes it may hold the lock.
        match self.frozen.try_read() {
            Ok(frozen) if !*frozen => Ok(frozen),
            _ => Err(Error::State("the container is paused".into())),
        }
    }

    /// Lets all processes stand still.
    pub async fn freeze(&self) -> Result<()> {
        let mut frozen = self.frozen().await?;
        if self.first.has_ended() {
            return Err(Error::State("the container has ended".into()));
        }
        if !*frozen {
            self.cgroup.freeze().await?;
            *frozen = true;
        }
        Ok(())
    }

    /// Lets them go on.
    pub async fn thaw(&self) -> Result<()> {
        let mut frozen = self.frozen().await?;
        self.cgroup.thaw()?;
        *frozen = false;
        Ok(())
    }

    /// Held while this changes.
    async fn frozen(&self) -> Result<RwLockWriteGuard<'_, bool>> {
        timeout(STILLNESS, self.frozen.write())
            .await
            .map_err(|_| Error::State("a process of the container is being started".into()))
    }

    pub fn execs(&self) -> MutexGuard<'_, HashMap<String, Slot<Running>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all execs: the machine goes on elsewhere, where nobody has them.
    pub fn abandon_execs(self: &Arc<Self>) {
        let execs = self.execs();
        let running = execs.iter().filter_map(|(id, slot)| match slot {
            Slot::Ready(running) => Some((id.clone(), running.process.clone())),
            Slot::Making => None,
        });
        for (id, process) in running {
            let container = Arc::clone(self);
            tokio::spawn(async move {
                for signal in [libc::SIGHUP, libc::SIGKILL] {
                    if let Err(error) = process.signal(signal) {
                        tracing::warn!("ending an exec: {error}");
                    }
                    if timeout(HANGING_UP, process.ended()).await.is_ok() {
                        break;
                    }
                }
                container.execs().remove(&id);
            });
        }
    }

    /// Keeps a place for a new exec.
    pub fn reserve_exec(&self, id: &str) -> Result<()> {
        reserve(
            &mut self.execs(),
            "exec",
            id,
            MAX_EXECS,
            "execs in a container",
        )
    }

    pub fn exec(&self, id: &str) -> Result<Arc<Running>> {
        ready(&self.execs(), "exec", id)
    }

    /// The container's root as its own processes see it.
    pub fn open_root(&self) -> Result<OwnedFd> {
        let path = format!("/proc/{}/root", self.first.process.pid.as_raw_nonzero());
        rustix::fs::open(
            &path,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .doing(|| "opening the container's root".into())
    }

    /// Writes a state for an exec: libcontainer's own says "created" for ever, as the
    /// agent starts containers without it.
    pub fn write_running_state(&self, directory: &Path) -> Result<()> {
        let mut text = String::new();
        fs::File::open(self.places.state.join("state.json"))
            .and_then(|file| file.take(1024 * 1024).read_to_string(&mut text))
            .doing(|| "reading the container's state".into())?;
        let mut state: serde_json::Value = serde_json::from_str(&text)
            .map_err(std::io::Error::from)
            .doing(|| "reading the container's state".into())?;
        state["status"] = "running".into();
        fs::create_dir(directory)
            .and_then(|()| fs::write(directory.join("state.json"), state.to_string()))
            .doing(|| "writing a state for the exec".into())
    }
}

/// A named thing that is being made, or made.
#[derive(Debug)]
pub enum Slot<T> {
    Making,
    Ready(Arc<T>),
}

/// Keeps a name for what is about to be made.
pub fn reserve<T>(
    slots: &mut HashMap<String, Slot<T>>,
    kind: &'static str,
    id: &str,
    limit: usize,
    what: &'static str,
) -> Result<()> {
    if slots.contains_key(id) {
        return Err(Error::Exists {
            kind,
            id: id.to_owned(),
        });
    }
    if slots.len() >= limit {
        return Err(Error::TooMany { what, limit });
    }
    slots.insert(id.to_owned(), Slot::Making);
    Ok(())
}

/// What was made under a name.
pub fn ready<T>(slots: &HashMap<String, Slot<T>>, kind: &'static str, id: &str) -> Result<Arc<T>> {
    match slots.get(id) {
        Some(Slot::Ready(found)) => Ok(Arc::clone(found)),
        Some(Slot::Making) => Err(Error::State(format!("{kind} {id:?} is being made"))),
        None => Err(Error::NotFound {
            kind,
            id: crate::error::shorten(id, 63).to_owned(),
        }),
    }
}

/// Checks a name: [a-z0-9-], 1 to 63 bytes. It becomes part of paths.
pub fn check_name(kind: &str, name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{kind} {:?} is not of [a-z0-9-] with 1 to 63 bytes",
        crate::error::shorten(name, 100)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(check_name("container", "web-1").is_ok());
        assert!(check_name("container", &"a".repeat(63)).is_ok());
        for name in ["", "..", "a/b", "Web", "a.b", "é", &"a".repeat(64)] {
            assert!(check_name("container", name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn slots_are_unique_and_bounded() {
        let mut slots: HashMap<String, Slot<()>> = HashMap::new();
        let mut reserve = |id: &str| reserve(&mut slots, "exec", id, 2, "execs");
        assert!(reserve("a").is_ok());
        assert!(matches!(reserve("a"), Err(Error::Exists { .. })));
        assert!(reserve("b").is_ok());
        assert!(matches!(reserve("c"), Err(Error::TooMany { .. })));
    }

    #[test]
    fn what_is_being_made_is_not_there_yet() {
        let mut slots: HashMap<String, Slot<()>> = HashMap::new();
        slots.insert("a".into(), Slot::Making);
        assert!(matches!(ready(&slots, "exec", "a"), Err(Error::State(_))));
        assert!(matches!(
            ready(&slots, "exec", "b"),
            Err(Error::NotFound { .. })
        ));
    }
}
