//! A whole pod in a directory, to go on from there, any number of times.
//!
//! ```text
//! DIR/                 root's alone
//!   snapshot.json      version of the form, of Hull; length and digest of each file below. Written last
//!   pod.json           manifest, status, networks, size of the machine
//!   state, memory      the machine: see [`hull_machine::snapshot`]
//!   files.tar          what the pod has on disk: writes into root file systems, emptyDirs, logs
//! ```
//!
//! Not in it are images, which must be in the host's store by the same ids, and what hostPath volumes point to.
//!
//! A snapshot is as much trusted as the manifest of its pod: it names the host's directories. The digests are against
//! damage, not against forgery.

mod digest;
mod files;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hull_machine::client::SnapshotFiles;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use digest::Digest;
pub(crate) use files::{pack, unpack};

use crate::manifest::PodManifest;
use crate::networks::{Asked, Choice, Publication};
use crate::oci::MachineSize;
use crate::state::{Claim, ContainerStatus, PodStatus, StateError, write_status};

/// To be raised with every change of what is in the directory. A machine's state has a version of its own.
const FORMAT: u32 = 1;
const DESCRIPTION: &str = "snapshot.json";
/// What it is called while it is written: [`crate::state::replace_file`].
const DESCRIPTION_NEW: &str = "snapshot.json.new";
const POD: &str = "pod.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const FILES: &str = "files.tar";
const ALL: [&str; 4] = [POD, STATE, MEMORY, FILES];
/// Bytes of the two texts, at most.
const DESCRIPTION_MAX: u64 = 1 << 16;
const POD_MAX: u64 = 16 << 20;

/// Why a pod is not put aside, or doesn't go on.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not empty; a snapshot needs a directory of its own", path = .0.display())]
    NotEmpty(PathBuf),
    #[error("{path} has a snapshot already; a new one needs a directory of its own", path = .0.display())]
    Taken(PathBuf),
    #[error(
        "{path} has parts of a snapshot ({found}) and no {DESCRIPTION}: `hull snapshot` is still at it, or was killed; then remove {path} first",
        path = path.display()
    )]
    Left { path: PathBuf, found: String },
    #[error("{path} has no snapshot, or one that was not finished: there is no {DESCRIPTION}", path = .0.display())]
    None(PathBuf),
    #[error("{path} is a snapshot of form {found}; this version of Hull reads form {FORMAT} only", path = path.display())]
    Format { path: PathBuf, found: u32 },
    #[error(
        "{path} was taken by Hull {found}, and this is {own}: the agent in the snapshot is that version's",
        path = path.display(),
        own = env!("CARGO_PKG_VERSION")
    )]
    Version { path: PathBuf, found: String },
    #[error("{path} is damaged: {why}", path = path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("the pod's files")]
    State(#[from] StateError),
}

pub(crate) fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> SnapshotError {
    let doing = doing.into();
    move |source| SnapshotError::Io { doing, source }
}

/// `snapshot.json`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Description {
    format: u32,
    hull: String,
    created_at: Timestamp,
    files: BTreeMap<String, Digest>,
}

/// `pod.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Contents {
    pub manifest: PodManifest,
    pub status: PodStatus,
    pub size: MachineSize,
    /// The named ones; none: the pod has no network.
    pub networks: Vec<String>,
    pub ports: Vec<Publication>,
}

/// Files to be written by who has the pod, in the order of [`ALL`].
#[derive(Debug)]
pub struct Files {
    pub pod: OwnedFd,
    pub machine: SnapshotFiles,
    pub files: OwnedFd,
}

impl Files {
    pub const COUNT: usize = ALL.len();

    /// As they come over a channel. None: there are more or fewer.
    #[must_use]
    pub fn of(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let [pod, state, memory, files] = descriptors.try_into().ok()?;
        Some(Self {
            pod,
            machine: SnapshotFiles { state, memory },
            files,
        })
    }

    /// As they go over a channel.
    #[must_use]
    pub fn descriptors(&self) -> [&OwnedFd; Self::COUNT] {
        [
            &self.pod,
            &self.machine.state,
            &self.machine.memory,
            &self.files,
        ]
    }
}

/// A snapshot that is being taken. Dropped before it is finished, nothing is left of it.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
    /// It was not there before.
    made: bool,
    finished: bool,
}

impl Unfinished {
    /// Begins one in a directory that is empty or not there.
    ///
    /// # Errors
    /// What is there in place of nothing, or when it can't be made.
    pub fn begin(path: &Path) -> Result<Self, SnapshotError> {
        let doing = || format!("making {}", path.display());
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = names(path).map_err(io_error(doing()))?;
                if !found.is_empty() {
                    return Err(in_the_way(path, &found));
                }
                false
            }
            Err(error) => return Err(io_error(doing())(error)),
        };
        let unfinished = Self {
            path: path.to_owned(),
            made,
            finished: false,
        };
        // In it are the guest's secrets.
        crate::state::private_dir(path)?;
        Ok(unfinished)
    }

    /// The files for who has the pod.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn files(&self) -> Result<Files, SnapshotError> {
        let create = |name| -> Result<OwnedFd, SnapshotError> {
            let path = self.path.join(name);
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(io_error(format!("making {}", path.display())))?;
            Ok(file.into())
        };
        Ok(Files {
            pod: create(POD)?,
            machine: SnapshotFiles {
                state: create(STATE)?,
                memory: create(MEMORY)?,
            },
            files: create(FILES)?,
        })
    }

    /// Now that all is in them: makes it a snapshot. Reads every file. Dropping the future leaves nothing.
    ///
    /// # Errors
    /// When a file can't be read or written.
    pub async fn finish(mut self) -> Result<(), SnapshotError> {
        let mut files = BTreeMap::new();
        for name in ALL {
            let path = self.path.join(name);
            let doing = format!("reading {}", path.display());
            let digest = tokio::task::spawn_blocking(move || {
                let file = File::open(path)?;
                file.sync_all()?;
                Digest::of(&file)
            });
            let digest = digest.await.unwrap_or_else(|error| Err(error.into()));
            files.insert(name.to_owned(), digest.map_err(io_error(doing))?);
        }
        let description = Description {
            format: FORMAT,
            hull: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: Timestamp::now(),
            files,
        };
        let path = self.path.join(DESCRIPTION);
        let doing = format!("writing {}", path.display());
        let text = serde_json::to_vec_pretty(&description)
            .map_err(|error| io_error(&doing)(error.into()))?;
        crate::state::replace_file(&path, &text)?;
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(io_error(&doing))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // What can't be removed is no snapshot without its description.
        for name in ALL.into_iter().chain([DESCRIPTION, DESCRIPTION_NEW]) {
            let _ = fs::remove_file(self.path.join(name));
        }
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

fn names(path: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name()));
    names
        .map(|name| name.map(|name| name.to_string_lossy().into_owned()))
        .collect()
}

/// What is in a directory that was to be empty.
fn in_the_way(path: &Path, found: &[String]) -> SnapshotError {
    let path = path.to_owned();
    let ours = |name: &String| ALL.contains(&&**name) || name == DESCRIPTION_NEW;
    if found.iter().any(|name| name == DESCRIPTION) {
        SnapshotError::Taken(path)
    } else if found.iter().all(ours) {
        let mut found = found.to_vec();
        found.sort();
        let found = found.join(", ");
        SnapshotError::Left { path, found }
    } else {
        SnapshotError::NotEmpty(path)
    }
}

/// A snapshot whose files are what they were.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    pub contents: Contents,
    machine: SnapshotFiles,
    files: File,
}

impl Snapshot {
    /// Opens one, and compares every file with its digest.
    ///
    /// # Errors
    /// When it is none, another version's, or damaged.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let description = describe(path)?;
        let open = |name: &str| -> Result<File, SnapshotError> {
            let file = path.join(name);
            let damaged = |why: String| SnapshotError::Damaged {
                path: path.to_owned(),
                why,
            };
            let opened = open_file(&file).map_err(|error| damaged(format!("{name}: {error}")))?;
            let known = description.files.get(name);
            let known = known.ok_or_else(|| damaged(format!("{DESCRIPTION} has no {name}")))?;
            let found =
                Digest::of(&opened).map_err(io_error(format!("reading {}", file.display())))?;
            if found == *known {
                return Ok(opened);
            }
            Err(damaged(if found.size == known.size {
                format!("{name} has been changed")
            } else {
                format!("{name} has {} bytes, not {}", found.size, known.size)
            }))
        };
        let pod = open(POD)?;
        let machine = SnapshotFiles {
            state: open(STATE)?.into(),
            memory: open(MEMORY)?.into(),
        };
        let files = open(FILES)?;
        let mut text = Vec::new();
        pod.take(POD_MAX)
            .read_to_end(&mut text)
            .map_err(io_error(format!("reading {}", path.join(POD).display())))?;
        let contents = Contents::parse(&text).map_err(|why| SnapshotError::Damaged {
            path: path.to_owned(),
            why: format!("{POD}: {why}"),
        })?;
        Ok(Self {
            path: path.to_owned(),
            contents,
            machine,
            files,
        })
    }

    /// Gives a claimed pod what the snapshot's had on disk, and the status of its containers. What its machine goes on
    /// with.
    ///
    /// # Errors
    /// When the files can't be written.
    pub fn restore(self, claim: &mut Claim) -> Result<Restored, SnapshotError> {
        let doing = format!("unpacking {}", self.path.join(FILES).display());
        unpack(self.files, claim.dir.data()).map_err(io_error(doing))?;
        let status = self.contents.status;
        claim.status.first_failure = status.first_failure;
        claim.status.joined = status.joined;
        write_status(&claim.dir, &claim.status)?;
        Ok(Restored {
            size: self.contents.size,
            machine: self.machine,
        })
    }
}

impl Contents {
    /// Reads it, and looks whether its parts fit together.
    fn parse(text: &[u8]) -> Result<Self, String> {
        let contents: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let fits = |manifests: &[k8s_openapi::api::core::v1::Container],
                    statuses: &[ContainerStatus]| {
            let names = manifests.iter().map(|container| &container.name);
            names.eq(statuses.iter().map(|status| &status.name))
        };
        let Self {
            manifest, status, ..
        } = &contents;
        if !fits(manifest.init_containers(), &status.init_containers)
            || !fits(manifest.containers(), &status.containers)
        {
            return Err("its containers are not those of its manifest".into());
        }
        if status.joined.iter().any(|container| !container.finished) {
            return Err("a container has joined it and runs".into());
        }
        Ok(contents)
    }

    /// The networks that the pod is to have again.
    #[must_use]
    pub fn choice(&self) -> Choice {
        if self.networks.is_empty() {
            Choice::None
        } else {
            Choice::Named(self.networks.clone())
        }
    }

    /// The host's ports that it is to have again.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.ports.iter().cloned().map(Asked::by_snapshot).collect()
    }

    /// The ids of images that containers still need, each with the name that it had.
    #[must_use]
    pub fn images(&self) -> Vec<(String, String)> {
        let needed = self.status.manifests_containers().filter(|c| !c.finished);
        needed
            .filter_map(|container| Some((container.image_id.clone()?, container.image.clone())))
            .collect()
    }
}

/// What a pod goes on with that was put aside.
#[derive(Debug)]
pub struct Restored {
    pub size: MachineSize,
    pub machine: SnapshotFiles,
}

fn describe(path: &Path) -> Result<Description, SnapshotError> {
    let file = match open_file(&path.join(DESCRIPTION)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(SnapshotError::None(path.to_owned()));
        }
        opened => opened.map_err(io_error(format!(
            "opening {}",
            path.join(DESCRIPTION).display()
        )))?,
    };
    let mut text = Vec::new();
    file.take(DESCRIPTION_MAX)
        .read_to_end(&mut text)
        .map_err(io_error(format!(
            "reading {}",
            path.join(DESCRIPTION).display()
        )))?;
    parse_description(path, &text)
}

fn parse_description(path: &Path, text: &[u8]) -> Result<Description, SnapshotError> {
    /// What every version has.
    #[derive(Deserialize)]
    struct Any {
        format: u32,
        hull: String,
    }
    let damaged = |error: serde_json::Error| SnapshotError::Damaged {
        path: path.to_owned(),
        why: format!("{DESCRIPTION}: {error}"),
    };
    let Any { format, hull } = serde_json::from_slice(text).map_err(damaged)?;
    if format != FORMAT {
        return Err(SnapshotError::Format {
            path: path.to_owned(),
            found: format,
        });
    }
    if hull != env!("CARGO_PKG_VERSION") {
        return Err(SnapshotError::Version {
            path: path.to_owned(),
            found: crate::text::printable(crate::text::cut(&hull, 100).as_bytes()),
        });
    }
    serde_json::from_slice(text).map_err(damaged)
}

/// A file, and nothing else: no link is followed, and a FIFO is not waited for.
fn open_file(path: &Path) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is no file"))
    }
}

/// Writes what a pod is to one of [`Files`].
///
/// # Errors
/// When it can't be written.
pub(crate) fn write_contents(file: &OwnedFd, contents: &Contents) -> io::Result<()> {
    let mut file = File::from(file.try_clone()?);
    file.write_all(&serde_json::to_vec_pretty(contents)?)
}

#[cfg(test)]
mod tests;
