//! Where things lie, and that nobody else can reach them.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::StateError;

/// The two roots of all state.
#[derive(Debug, Clone)]
pub struct Directories {
    run: PathBuf,
    data: PathBuf,
}

impl Directories {
    #[must_use]
    pub fn new(run: impl Into<PathBuf>, data: impl Into<PathBuf>) -> Self {
        Self {
            run: run.into(),
            data: data.into(),
        }
    }

    /// Makes what is missing and refuses what is not ours alone.
    ///
    /// # Errors
    /// When a directory is a symbolic link, belongs to somebody else, or can't be made.
    pub fn prepare(&self) -> Result<(), StateError> {
        for root in [&self.run, &self.data] {
            if let Some(parent) = root.parent() {
                fs::create_dir_all(parent)
                    .map_err(|e| StateError::io("make directory", parent, e))?;
            }
            private_dir(root)?;
            private_dir(&root.join("pods"))?;
        }
        private_dir(&self.images())
    }

    #[must_use]
    pub fn run(&self) -> &Path {
        &self.run
    }

    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The image store.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    #[must_use]
    pub fn pods_run(&self) -> PathBuf {
        self.run.join("pods")
    }

    #[must_use]
    pub fn pods_data(&self) -> PathBuf {
        self.data.join("pods")
    }

    /// The directories of one pod, made or not.
    #[must_use]
    pub fn pod(&self, id: &PodId) -> PodDir {
        PodDir {
            run: self.pods_run().join(id.as_str()),
            data: self.pods_data().join(id.as_str()),
            id: id.clone(),
        }
    }

    /// Waits for the lock under which names are claimed and pods removed.
    pub(super) fn lock_names(&self) -> Result<File, StateError> {
        let path = self.run.join("names.lock");
        let file = open_private(&path)?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| StateError::io("lock", &path, e))?;
        Ok(file)
    }
}

/// The directories of one pod.
#[derive(Debug, Clone)]
pub struct PodDir {
    id: PodId,
    run: PathBuf,
    data: PathBuf,
}

impl PodDir {
    /// Makes both, empty.
    pub(super) fn create(&self) -> Result<(), StateError> {
        for dir in [&self.run, &self.data] {
            DirBuilder::new()
                .mode(0o700)
                .create(dir)
                .map_err(|e| StateError::io("make directory", dir, e))?;
        }
        private_dir(&self.logs())
    }

    #[must_use]
    pub fn id(&self) -> &PodId {
        &self.id
    }

    /// What goes with a reboot.
    #[must_use]
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// What takes room: logs, volumes, the changes of root file systems.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// The manifest, as it was understood.
    #[must_use]
    pub fn manifest(&self) -> PathBuf {
        self.run.join("pod.json")
    }

    /// What the pod has of named networks.
    #[must_use]
    pub fn network(&self) -> PathBuf {
        self.run.join("network.json")
    }

    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.run.join("events.jsonl")
    }

    /// How the pod started.
    #[must_use]
    pub fn timeline(&self) -> PathBuf {
        self.run.join(crate::timeline::FILE)
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run.join("supervisor.sock")
    }

    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.run.join("console.log")
    }

    /// What the supervisor and `hull-vmm` have to say about themselves.
    #[must_use]
    pub fn supervisor_log(&self) -> PathBuf {
        self.run.join("supervisor.log")
    }

    /// The root of the pod's virtio-fs share.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.run.join("share")
    }

    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.data.join("logs")
    }

    /// The log files of one container, `N.log` for its N-th restart.
    #[must_use]
    pub fn container_logs(&self, container: &str) -> PathBuf {
        self.logs().join(container)
    }
}

/// A pod's identity: 12 random hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PodId(String);

impl PodId {
    const LENGTH: usize = 12;

    /// # Errors
    /// When the kernel's random numbers can't be read.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0u8; Self::LENGTH / 2];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for PodId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let valid = text.len() == Self::LENGTH
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if valid {
            Ok(Self(text))
        } else {
            Err(format!("{text:?} is not a pod id"))
        }
    }
}

impl From<PodId> for String {
    fn from(id: PodId) -> Self {
        id.0
    }
}

impl fmt::Display for PodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes `path` a directory of mode 0700, or checks that it is one, and ours.
pub(crate) fn private_dir(path: &Path) -> Result<(), StateError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(StateError::io("make directory", path, e)),
    }
    let meta = fs::symlink_metadata(path).map_err(|e| StateError::io("look at", path, e))?;
    if meta.is_symlink() {
        return Err(StateError::Symlink(path.into()));
    }
    if !meta.is_dir() {
        return Err(StateError::NotADirectory(path.into()));
    }
    let euid = rustix::process::geteuid().as_raw();
    if meta.uid() != euid {
        return Err(StateError::Owner {
            path: path.into(),
            owner: meta.uid(),
            euid,
        });
    }
    if meta.mode() & 0o077 != 0 {
        // By descriptor, so that what is changed is what was looked at.
        let dir = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY)
            .open(path)
            .map_err(|e| StateError::io("open", path, e))?;
        dir.set_permissions(fs::Permissions::from_mode(0o700))
            .map_err(|e| StateError::io("make private", path, e))?;
    }
    Ok(())
}

/// Opens a file of mode 0600 for reading and writing, made when missing.
pub(crate) fn open_private(path: &Path) -> Result<File, StateError> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| StateError::io("open", path, e))
}

/// Replaces `path` by `content` so that a reader sees the old or the new, whole.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), StateError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)
        .map_err(|e| StateError::io("open", &temporary, e))?;
    file.write_all(content)
        .map_err(|e| StateError::io("write", &temporary, e))?;
    fs::rename(&temporary, path).map_err(|e| StateError::io("replace", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn directories_are_private() {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories::new(root.path().join("run"), root.path().join("data"));

        dirs.prepare().unwrap();

        let modes = [
            mode(dirs.run()),
            mode(dirs.data()),
            mode(&dirs.pods_run()),
            mode(&dirs.pods_data()),
            mode(&dirs.images()),
        ];
        assert_eq!(modes, [0o700; 5]);
    }

    #[test]
    fn an_open_directory_is_made_private() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();

        private_dir(&run).unwrap();

        assert_eq!(mode(&run), 0o700);
    }

    #[test]
    fn a_symlinked_root_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = root.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let run = root.path().join("run");
        std::os::unix::fs::symlink(&elsewhere, &run).unwrap();

        let refused = Directories::new(&run, root.path().join("data")).prepare();

        assert!(matches!(refused, Err(StateError::Symlink(p)) if p == run));
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn a_file_in_place_of_a_directory_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        fs::write(&run, "").unwrap();

        assert!(matches!(
            private_dir(&run),
            Err(StateError::NotADirectory(_))
        ));
    }

    #[test]
    fn a_planted_symlink_is_not_written_through() {
        let root = tempfile::tempdir().unwrap();
        let victim = root.path().join("victim");
        fs::write(&victim, "mine").unwrap();
        let state = root.path().join("state.json");
        std::os::unix::fs::symlink(&victim, root.path().join("state.json.new")).unwrap();

        let refused = replace(&state, b"theirs");

        assert!(refused.is_err());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
    }

    #[test]
    fn ids_are_twelve_hex_digits_and_differ() {
        let one = PodId::random().unwrap();
        let two = PodId::random().unwrap();

        assert_ne!(one, two);
        assert_eq!(PodId::try_from(one.to_string()).as_ref(), Ok(&one));
    }

    #[test]
    fn a_path_is_no_id() {
        assert!(PodId::try_from("../../../etc".to_owned()).is_err());
        assert!(PodId::try_from("0123456789AB".to_owned()).is_err());
    }
}
