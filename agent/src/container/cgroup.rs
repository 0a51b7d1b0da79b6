//! The guest's cgroup tree: the agent, infra, and a group for each container.

use std::fs;
use std::io::{self, ErrorKind, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Doing, Error, Result};
use crate::process::send_signal;

/// Where the one hierarchy is mounted; libcontainer expects it here.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// Parent of the containers' groups.
const CONTAINERS: &str = "containers";
/// Most processes that are listed or signalled one by one.
const MAX_PIDS: usize = 4096;
/// Nested groups that are looked into; a container may make its own.
const MAX_DEPTH: usize = 8;
/// How long killed processes may take to be gone.
const REMOVAL: Duration = Duration::from_secs(10);
/// How long processes may take to stand still: those that wait for a file system do not.
const FREEZING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// Makes the agent's, infra's and the containers' groups, and moves this process.
pub fn set_up() -> Result<()> {
    let mount = Path::new(MOUNT);
    for name in ["hull-agent", "infra", CONTAINERS] {
        make(&mount.join(name))?;
    }
    write(&mount.join("hull-agent/cgroup.procs"), "0")?;
    enable_controllers(mount)?;
    enable_controllers(&mount.join(CONTAINERS))
}

/// The parent of the containers' groups, with what they use together.
pub fn all_containers() -> PathBuf {
    Path::new(MOUNT).join(CONTAINERS)
}

/// The file that moves a process into infra's group.
pub fn infra_procs() -> PathBuf {
    Path::new(MOUNT).join("infra/cgroup.procs")
}

fn enable_controllers(group: &Path) -> Result<()> {
    let path = group.join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).doing(|| format!("reading {}", path.display()))?;
    for controller in controllers.split_whitespace() {
        write(
            &group.join("cgroup.subtree_control"),
            &format!("+{controller}"),
        )?;
    }
    Ok(())
}

fn make(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other.doing(|| format!("making cgroup {}", path.display())),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).doing(|| format!("writing {text:?} to {}", path.display()))
}

/// A container's group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// As libcontainer names it.
    pub name: PathBuf,
}

impl Cgroup {
    /// Makes the group of a new container.
    pub fn create(id: &str) -> Result<Self> {
        Self::create_at(&Path::new(CONTAINERS).join(id))
    }

    fn create_at(name: &Path) -> Result<Self> {
        let path = Path::new(MOUNT).join(name);
        let name = Path::new("/").join(name);
        fs::create_dir(&path).doing(|| format!("making cgroup {}", path.display()))?;
        Ok(Self { path, name })
    }

    /// Makes a group beside those of the containers, which doesn't count as one of theirs.
    pub fn create_beside(id: &str) -> Result<Self> {
        Self::create_at(Path::new(id))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The group's directory, for what is attached to it.
    pub fn open(&self) -> Result<OwnedFd> {
        let directory =
            fs::File::open(&self.path).doing(|| format!("opening {}", self.path.display()))?;
        Ok(directory.into())
    }

    /// Kills every process, those just being made included.
    pub fn kill(&self) -> Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            // Removed already: nothing lives.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.doing(|| format!("killing {}", self.name.display())),
        }
    }

    /// Waits until every process stands still. Those that do go on when one doesn't in time.
    pub async fn freeze(&self) -> Result<()> {
        write(&self.path.join("cgroup.freeze"), "1")?;
        let frozen = async {
            let path = self.path.join("cgroup.events");
            loop {
                let events =
                    fs::read_to_string(&path).doing(|| format!("reading {}", path.display()))?;
                if events.lines().any(|line| line == "frozen 1") {
                    return Ok(());
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        let frozen = tokio::time::timeout(FREEZING, frozen)
            .await
            .unwrap_or_else(|_| {
                Err(Error::State(format!(
                    "processes of {} do not stand still",
                    self.name.display()
                )))
            });
        if frozen.is_err() {
            self.thaw()?;
        }
        frozen
    }

    /// Lets processes go on that [`Self::freeze`] has stopped.
    pub fn thaw(&self) -> Result<()> {
        write(&self.path.join("cgroup.freeze"), "0")
    }

    /// How often the kernel killed a process here for the memory limit.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        oom_kills(&events)
    }

    /// Waits until [`Self::oom_kills`] is more than `kills`.
    pub async fn more_oom_kills(&self, kills: u64) -> Result<u64> {
        let path = self.path.join("memory.events");
        let doing = || format!("watching {}", path.display());
        let file = fs::File::open(&path).doing(doing)?;
        // SAFETY: the file keeps its descriptor as long as it lives, and is never taken out.
        let mut events =
            unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.doing(doing)?;
        loop {
            // The kernel tells of what changes after it was read.
            let mut text = String::new();
            let file = events.get_mut();
            file.rewind()
                .and_then(|()| file.read_to_string(&mut text))
                .doing(doing)?;
            let now = oom_kills(&text);
            if now > kills {
                return Ok(now);
            }
            let ready = events.ready(Interest::PRIORITY).await;
            ready.doing(doing)?.clear_ready();
        }
    }

    /// The numbers of all processes, bounded.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        collect_pids(&self.path, 0, &mut pids)
            .doing(|| format!("listing processes of {}", self.name.display()))?;
        Ok(pids)
    }

    /// Sends a signal to every process.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.pids()? {
            let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
                continue;
            };
            let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else {
                continue;
            };
            // Ended and its number given away before the descriptor was opened?
            if self.holds(pid) {
                send_signal(&fd, signal).doing(|| format!("signalling process {pid}"))?;
            }
        }
        Ok(())
    }

    fn holds(&self, pid: Pid) -> bool {
        let path = format!("/proc/{}/cgroup", pid.as_raw_nonzero());
        fs::read_to_string(path).is_ok_and(|text| {
            text.lines()
                .filter_map(|line| line.strip_prefix("0::"))
                .any(|group| Path::new(group).starts_with(&self.name))
        })
    }

    /// Kills what is left and removes the group and those a container made in it.
    pub async fn remove(&self) -> Result<()> {
        self.kill()?;
        let removal = async {
            loop {
                match remove_tree(&self.path, 0) {
                    // Killed processes take a moment to be gone.
                    Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                        tokio::time::sleep(PAUSE).await;
                    }
                    other => return other,
                }
            }
        };
        match tokio::time::timeout(REMOVAL, removal).await {
            Ok(removed) => removed.doing(|| format!("removing cgroup {}", self.name.display())),
            Err(_) => Err(Error::State(format!(
                "processes of {} do not die",
                self.name.display()
            ))),
        }
    }
}

fn subgroups(path: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(path)?
        .filter_map(|entry| {
            entry
                .and_then(|entry| Ok(entry.file_type()?.is_dir().then(|| entry.path())))
                .transpose()
        })
        .collect()
}

fn collect_pids(path: &Path, depth: usize, pids: &mut Vec<u32>) -> io::Result<()> {
    for line in fs::read_to_string(path.join("cgroup.procs"))?.lines() {
        if pids.len() >= MAX_PIDS {
            return Ok(());
        }
        pids.extend(line.parse::<u32>().ok());
    }
    if depth < MAX_DEPTH {
        for group in subgroups(path)? {
            match collect_pids(&group, depth + 1, pids) {
                // A container removed its own group meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => other?,
            }
        }
    }
    Ok(())
}

fn remove_tree(path: &Path, depth: usize) -> io::Result<()> {
    // One level more than is listed, so that a deep tree ends in an error.
    if depth <= MAX_DEPTH {
        match subgroups(path) {
            Ok(groups) => {
                for group in groups {
                    remove_tree(&group, depth + 1)?;
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_kills_are_read_from_events() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(oom_kills(events), 2);
        assert_eq!(oom_kills("oom 3\n"), 0);
    }
}
