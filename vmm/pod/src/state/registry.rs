//! Which pods there are, which of them live, and that no two living ones share a name.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use rustix::mount::{UnmountFlags, unmount};

use super::directories::{open_private, replace};
use super::{ContainerStatus, Directories, Phase, PodDir, PodId, PodStatus, StateError};

/// A `state.json` is never longer than this; a longer one is not ours.
const STATE_MAX: u64 = 4 << 20;

/// Whether a pod's supervisor runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    Alive,
    Dead,
}

/// A pod as found on disk.
#[derive(Debug, Clone)]
pub struct PodRecord {
    pub dir: PodDir,
    pub status: PodStatus,
    pub liveness: Liveness,
}

/// A new pod's directories and its name, as long as the lock is held by anybody.
#[derive(Debug)]
pub struct Claim {
    pub dir: PodDir,
    pub status: PodStatus,
    /// The open `lock` file. Handed to the supervisor, who keeps it open for life.
    pub lock: File,
}

/// Gives back what a dead pod has outside of its directories, before they are removed and nobody
/// knows of it any more.
pub type Release = fn(&Directories, &PodDir) -> Result<(), Box<dyn Error + Send + Sync>>;

/// The pods under one pair of directories.
#[derive(Debug, Clone)]
pub struct Registry {
    directories: Directories,
    release: Release,
}

impl Registry {
    /// # Errors
    /// When the directories can't be made, or aren't ours alone.
    pub fn open(directories: Directories, release: Release) -> Result<Self, StateError> {
        directories.prepare()?;
        Ok(Self {
            directories,
            release,
        })
    }

    #[must_use]
    pub fn directories(&self) -> &Directories {
        &self.directories
    }

    /// Claims `name` for a new pod, and removes what a dead one of that name has left.
    ///
    /// # Errors
    /// [`StateError::NameTaken`] when a living pod has the name.
    pub fn claim(
        &self,
        name: &str,
        restart_policy: &str,
        init_containers: Vec<ContainerStatus>,
        containers: Vec<ContainerStatus>,
        manifest: Option<String>,
    ) -> Result<Claim, StateError> {
        let _names = self.directories.lock_names()?;
        for record in self.list()?.into_iter().filter(|r| r.status.name == name) {
            match record.liveness {
                Liveness::Alive => {
                    return Err(StateError::NameTaken {
                        name: name.into(),
                        id: record.status.id,
                    });
                }
                Liveness::Dead => self.remove_dead(&record.dir)?,
            }
        }

        let id = PodId::random().map_err(|e| StateError::io("read", "/dev/urandom", e))?;
        let dir = self.directories.pod(&id);
        dir.create()?;
        let lock = open_private(&dir.lock())?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| StateError::io("lock", dir.lock(), e))?;
        let status = PodStatus {
            id,
            name: name.into(),
            phase: Phase::Pending,
            reason: None,
            message: None,
            created_at: Timestamp::now(),
            started_at: None,
            finished_at: None,
            supervisor_pid: None,
            vmm_pid: None,
            template: None,
            pod_ip: None,
            pod_ips: Vec::new(),
            network: None,
            restart_policy: restart_policy.into(),
            paused: false,
            completed: false,
            first_failure: None,
            guest_kernel: None,
            agent_version: None,
            init_containers,
            containers,
            joined: Vec::new(),
            manifest,
            console_tail: Vec::new(),
        };
        write_status(&dir, &status)?;
        Ok(Claim { dir, status, lock })
    }

    /// All pods, oldest first. A directory without a readable state is passed over: either it is
    /// just being made, or `gc` will take it.
    ///
    /// # Errors
    /// When the directory of pods can't be read.
    pub fn list(&self) -> Result<Vec<PodRecord>, StateError> {
        let mut pods: Vec<PodRecord> = self
            .ids(&self.directories.pods_run())?
            .into_iter()
            .filter_map(|id| read_record(self.directories.pod(&id)).ok())
            .collect();
        pods.sort_by_key(|p| p.status.created_at);
        Ok(pods)
    }

    /// Looks a pod up by its name, id, or the start of its id. A living pod's name goes first.
    ///
    /// # Errors
    /// When there is none, or the start of an id fits several.
    pub fn find(&self, query: &str) -> Result<PodRecord, StateError> {
        let pods = self.list()?;
        let by_name = pods
            .iter()
            .filter(|p| p.status.name == query)
            .max_by_key(|p| p.liveness == Liveness::Alive);
        if let Some(pod) = by_name {
            return Ok(pod.clone());
        }
        let mut by_id = pods
            .iter()
            .filter(|p| !query.is_empty() && p.status.id.as_str().starts_with(query));
        match (by_id.next(), by_id.next()) {
            (Some(pod), None) => Ok(pod.clone()),
            (Some(_), Some(_)) => Err(StateError::Ambiguous(query.into())),
            (None, _) => Err(StateError::NoSuchPod(query.into())),
        }
    }

    /// Removes everything that is left of a pod that doesn't run.
    ///
    /// # Errors
    /// [`StateError::StillRunning`] when its supervisor lives.
    pub fn remove(&self, record: &PodRecord) -> Result<(), StateError> {
        let _names = self.directories.lock_names()?;
        if liveness(&record.dir)? == Liveness::Alive {
            return Err(StateError::StillRunning(record.status.name.clone()));
        }
        self.remove_dead(&record.dir)
    }

    /// Gives up a claim for which no supervisor was started.
    ///
    /// # Errors
    /// When its directories can't be removed.
    pub fn abandon(&self, claim: Claim) -> Result<(), StateError> {
        let _names = self.directories.lock_names()?;
        drop(claim.lock);
        self.remove_dead(&claim.dir)
    }

    /// Removes all that dead supervisors left. `ended_too`: also pods that ended in order.
    /// Returns what was removed.
    ///
    /// # Errors
    /// When something can't be removed.
    pub fn collect_garbage(&self, ended_too: bool) -> Result<Vec<PodId>, StateError> {
        let _names = self.directories.lock_names()?;
        let mut ids = self.ids(&self.directories.pods_run())?;
        ids.extend(self.ids(&self.directories.pods_data())?);
        ids.sort();
        ids.dedup();
        let mut removed = Vec::new();
        for id in ids {
            let dir = self.directories.pod(&id);
            if liveness(&dir)? == Liveness::Alive {
                continue;
            }
            let ended_in_order = read_status(&dir).is_ok_and(|s| s.phase.ended());
            if ended_too || !ended_in_order {
                self.remove_dead(&dir)?;
                removed.push(id);
            } else {
                // In order but for that, perhaps.
                self.release(&dir)?;
            }
        }
        Ok(removed)
    }

    /// Removes a dead pod's directories, data first: as long as something is left, `gc` finds it.
    fn remove_dead(&self, dir: &PodDir) -> Result<(), StateError> {
        self.release(dir)?;
        remove_tree(dir.data())?;
        remove_tree(dir.run())
    }

    fn release(&self, dir: &PodDir) -> Result<(), StateError> {
        (self.release)(&self.directories, dir).map_err(|source| StateError::Release {
            id: dir.id().clone(),
            source,
        })
    }

    fn ids(&self, pods: &Path) -> Result<Vec<PodId>, StateError> {
        let entries = fs::read_dir(pods).map_err(|e| StateError::io("read", pods, e))?;
        Ok(entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter_map(|name| PodId::try_from(name).ok())
            .collect())
    }
}

impl PodRecord {
    /// Reads a pod's state.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn read(dir: &PodDir) -> Result<Self, StateError> {
        read_record(dir.clone())
    }

    /// Reads the pod's state again.
    ///
    /// # Errors
    /// When it is gone.
    pub fn reread(&self) -> Result<Self, StateError> {
        read_record(self.dir.clone())
    }
}

/// Reads a pod's state, with what its supervisor's death means for it.
pub(crate) fn read_record(dir: PodDir) -> Result<PodRecord, StateError> {
    // Liveness first: a supervisor writes its last state before it lets go of the lock.
    let liveness = liveness(&dir)?;
    let mut status = read_status(&dir)?;
    if liveness == Liveness::Dead && !status.phase.ended() {
        status.phase = Phase::Failed;
        status.reason = Some("SupervisorDied".into());
        status.message = Some("the pod's supervisor was killed; its machine ended with it".into());
    }
    Ok(PodRecord {
        dir,
        status,
        liveness,
    })
}

fn read_status(dir: &PodDir) -> Result<PodStatus, StateError> {
    use io::Read;
    let path = dir.state();
    let mut content = Vec::new();
    File::open(&path)
        .and_then(|f| f.take(STATE_MAX).read_to_end(&mut content))
        .map_err(|e| StateError::io("read", &path, e))?;
    serde_json::from_slice(&content).map_err(|source| StateError::Format { path, source })
}

/// Replaces a pod's `state.json`.
pub(crate) fn write_status(dir: &PodDir, status: &PodStatus) -> Result<(), StateError> {
    let path = dir.state();
    let content = serde_json::to_vec_pretty(status).map_err(|source| StateError::Format {
        path: path.clone(),
        source,
    })?;
    replace(&path, &content)
}

/// Whether somebody holds the pod's lock.
pub(crate) fn liveness(dir: &PodDir) -> Result<Liveness, StateError> {
    let path = dir.lock();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Liveness::Dead),
        Err(e) => return Err(StateError::io("open", path, e)),
    };
    // Shared, so that two who look at once don't take each other for a supervisor.
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Liveness::Dead),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Liveness::Alive),
        Err(e) => Err(StateError::io("lock", path, e)),
    }
}

/// Removes a directory tree that a pod wrote to, but nothing that is mounted in it.
///
/// A supervisor's mounts are private to it and gone when it is. Should one be here all the
/// same, it is detached first: removing must never reach into a volume.
pub(crate) fn remove_tree(path: &Path) -> Result<(), StateError> {
    for mount in mounts_beneath(path)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| StateError::io("unmount", mount, e))?;
    }
    if let Some(mount) = mounts_beneath(path)?.first() {
        let busy = io::Error::from(io::ErrorKind::ResourceBusy);
        return Err(StateError::io("unmount", mount, busy));
    }
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StateError::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Mount points at or beneath `path`, in the order in which they were mounted.
fn mounts_beneath(path: &Path) -> Result<Vec<PathBuf>, StateError> {
    let Ok(path) = fs::canonicalize(path) else {
        return Ok(Vec::new());
    };
    let table = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| StateError::io("read", "/proc/self/mountinfo", e))?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape_mount_point)
        .filter(|mount| mount.starts_with(&path))
        .collect())
}

/// Undoes the octal escapes of proc_pid_mountinfo(5) for space, tab, newline and backslash.
fn unescape_mount_point(field: &str) -> PathBuf {
    PathBuf::from(
        field
            .replace("\\040", " ")
            .replace("\\011", "\t")
            .replace("\\012", "\n")
            .replace("\\134", "\\"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories::new(root.path().join("run"), root.path().join("data"));
        let registry = Registry::open(dirs, |_, _| Ok(())).unwrap();
        (root, registry)
    }

    fn claim(registry: &Registry, name: &str) -> Result<Claim, StateError> {
        let containers = vec![ContainerStatus::new("main", "busybox")];
        registry.claim(name, "Always", vec![], containers, None)
    }

    #[test]
    fn a_living_pods_name_is_taken() {
        let (_root, registry) = registry();
        let first = claim(&registry, "web").unwrap();

        let second = claim(&registry, "web");

        assert!(matches!(second, Err(StateError::NameTaken { id, .. }) if id == first.status.id));
        claim(&registry, "db").unwrap();
    }

    #[test]
    fn a_dead_pods_name_is_free_and_its_leftovers_go() {
        let (_root, registry) = registry();
        let first = claim(&registry, "web").unwrap();
        let (run, data) = (first.dir.run().to_owned(), first.dir.data().to_owned());
        drop(first);

        let second = claim(&registry, "web").unwrap();

        assert!(!run.exists() && !data.exists());
        assert_eq!(registry.list().unwrap().len(), 1);
        assert!(second.dir.run().exists());
    }

    #[test]
    fn a_pod_whose_supervisor_died_reads_as_failed() {
        let (_root, registry) = registry();
        drop(claim(&registry, "web").unwrap());

        let record = registry.find("web").unwrap();

        assert_eq!(record.liveness, Liveness::Dead);
        assert_eq!(record.status.phase, Phase::Failed);
        assert_eq!(record.status.reason.as_deref(), Some("SupervisorDied"));
    }

    #[test]
    fn pods_are_found_by_name_and_by_the_start_of_the_id() {
        let (_root, registry) = registry();
        let web = claim(&registry, "web").unwrap();

        let by_name = registry.find("web").unwrap();
        let by_id = registry.find(&web.status.id.as_str()[..6]).unwrap();

        assert_eq!(by_name.status.id, web.status.id);
        assert_eq!(by_id.status.id, web.status.id);
        assert!(matches!(registry.find(""), Err(StateError::NoSuchPod(_))));
    }

    #[test]
    fn a_running_pod_is_not_removed() {
        let (_root, registry) = registry();
        let web = claim(&registry, "web").unwrap();
        let record = registry.find("web").unwrap();

        assert!(matches!(
            registry.remove(&record),
            Err(StateError::StillRunning(_))
        ));

        drop(web);
        registry.remove(&record).unwrap();
        assert!(registry.list().unwrap().is_empty());
    }

    #[test]
    fn garbage_is_what_dead_supervisors_left() {
        let (_root, registry) = registry();
        let alive = claim(&registry, "alive").unwrap();
        let mut ended = claim(&registry, "ended").unwrap();
        ended.status.phase = Phase::Succeeded;
        write_status(&ended.dir, &ended.status).unwrap();
        let dead = claim(&registry, "dead").unwrap().status.id;
        let ended_id = ended.status.id.clone();
        drop(ended);

        let first = registry.collect_garbage(false).unwrap();
        let second = registry.collect_garbage(true).unwrap();

        assert_eq!((first, second), (vec![dead], vec![ended_id]));
        assert_eq!(registry.list().unwrap()[0].status.id, alive.status.id);
    }

    #[test]
    fn what_cant_be_given_back_keeps_its_directories() {
        let (_root, mut registry) = registry();
        registry.release = |_, _| Err("no way".into());
        let web = claim(&registry, "web").unwrap();
        let dir = web.dir.clone();
        drop(web);

        let failed = registry.collect_garbage(true);

        assert!(matches!(failed, Err(StateError::Release { id, .. }) if id == *dir.id()));
        assert!(dir.run().exists() && dir.data().exists());
    }

    #[test]
    fn a_data_directory_without_state_is_garbage() {
        let (_root, registry) = registry();
        let web = claim(&registry, "web").unwrap();
        fs::remove_dir_all(web.dir.run()).unwrap();

        let removed = registry.collect_garbage(false).unwrap();

        assert_eq!(removed, [web.status.id]);
        assert!(!web.dir.data().exists());
    }

    #[test]
    fn removing_follows_no_symlink() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "kept").unwrap();
        let tree = root.path().join("tree");
        fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("link")).unwrap();

        remove_tree(&tree).unwrap();

        assert!(!tree.exists());
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "kept");
    }

    #[test]
    fn an_abandoned_claim_leaves_nothing() {
        let (_root, registry) = registry();
        let web = claim(&registry, "web").unwrap();
        let (run, data) = (web.dir.run().to_owned(), web.dir.data().to_owned());

        registry.abandon(web).unwrap();

        assert!(!run.exists() && !data.exists());
    }

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(
            unescape_mount_point("/a\\040b\\134c"),
            PathBuf::from("/a b\\c")
        );
    }
}
