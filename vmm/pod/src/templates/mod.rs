//! Machines put aside when their agent had just answered, for pods to begin with.
//!
//! ```text
//! <data directory>/templates/
//!   <id>/template.json    the kind, and what the files must look like
//!   <id>/state            processors and devices
//!   <id>/memory           the guest's RAM, which every clone maps and nobody changes
//!   <id>/working-set.json which of its pages the first clone had written to when its containers ran
//!   <id>.lock             held by who makes it
//!   <id>.log              why none could be made
//!   <id>.failed           that none could be made, or that no clone answered, and when
//!   .new-<id>/            one that is being made
//! ```
//!
//! There is nothing of any pod in a template. Nobody but root can read it: its guest's random numbers
//! and addresses are those that its clones begin with.

mod failures;
mod kind;
mod policy;
mod working_set;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hull_machine::client::SnapshotFiles;
use hull_machine::memory::working_set::Accesses;
use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

pub use failures::Failure;
pub use kind::{FileIdentity, HostIdentity, Kind};
pub use policy::Policy;
pub use working_set::Recording;

use crate::state::{StateError, private_dir, replace_file};

const DESCRIPTION: &str = "template.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const LOCK: &str = "lock";
const LOG: &str = "log";
const UNFINISHED: &str = ".new-";
/// Bytes of a description, at most.
const DESCRIPTION_MAX: u64 = 1 << 16;
/// So many a host keeps: each takes some 100 MiB on disk.
const MOST: usize = 16;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("the directory of templates")]
    Directory(#[from] StateError),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("template {id}: {why}; remove it with: hull template rm {id}")]
    Broken { id: String, why: String },
    #[error("there is no template {0}; hull template ls shows those there are")]
    NotFound(String),
    #[error("template {0} is being made by another process")]
    BeingMade(String),
    #[error("HULL_TEMPLATES is off, tenant or host, not {0:?}")]
    BadPolicy(String),
}

fn io_error(doing: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> TemplateError {
    move |source| TemplateError::Io {
        doing: doing(),
        source,
    }
}

/// `template.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Description {
    kind: Kind,
    created_at: Timestamp,
    state: FileIdentity,
    memory: FileIdentity,
}

/// What people are told of one.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    pub id: String,
    #[serde(flatten)]
    pub kind: Kind,
    pub created_at: Timestamp,
    pub last_used_at: Timestamp,
    /// Bytes on disk.
    pub size: u64,
    /// Whether pods still begin with it: what it was made of is there, unchanged.
    pub current: bool,
}

/// One that a machine can begin with.
#[derive(Debug)]
pub struct Template {
    pub id: String,
    pub files: SnapshotFiles,
    pub created_at: Timestamp,
    /// What its clones will access.
    pub accesses: Accesses,
    /// None: it is known what they are.
    pub recording: Option<Recording>,
}

/// The templates of a host.
#[derive(Debug, Clone)]
pub struct Templates {
    root: PathBuf,
}

impl Templates {
    /// Those under the data directory.
    ///
    /// # Errors
    /// When their directory can't be made, or isn't ours alone.
    pub fn open(data: &Path) -> Result<Self, TemplateError> {
        let root = data.join("templates");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data)
            .map_err(io_error(|| format!("making {}", data.display())))?;
        private_dir(&root)?;
        Ok(Self { root })
    }

    /// Opens one of this kind. None: there is none.
    ///
    /// # Errors
    /// When it is there and no good: it has been changed, or was written by another version.
    pub fn find(&self, kind: &Kind) -> Result<Option<Template>, TemplateError> {
        let found = self.open_one(kind)?;
        if found.is_some() {
            // When it was used last. Should it not be told, then it is removed a little earlier than others.
            let path = self.root.join(kind.id()).join(DESCRIPTION);
            let touched = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
            if let Err(error) = touched {
                tracing::debug!(%error, "noting that a template is used");
            }
        }
        Ok(found)
    }

    /// Whether somebody is at making one of this kind.
    #[must_use]
    pub fn is_being_made(&self, kind: &Kind) -> bool {
        let lock = File::open(self.root.join(format!("{}.{LOCK}", kind.id())));
        lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// Where it is told why none of this kind could be made.
    #[must_use]
    pub fn log(&self, kind: &Kind) -> PathBuf {
        self.log_of(&kind.id())
    }

    fn log_of(&self, id: &str) -> PathBuf {
        self.root.join(format!("{id}.{LOG}"))
    }

    fn open_one(&self, kind: &Kind) -> Result<Option<Template>, TemplateError> {
        let id = kind.id();
        let Some(description) = self.description(&id)? else {
            return Ok(None);
        };
        let broken = |why: String| TemplateError::Broken {
            id: id.clone(),
            why,
        };
        if description.kind != *kind {
            return Err(broken("it is of another kind".into()));
        }
        let open = |name: &str, known: &FileIdentity| -> Result<OwnedFd, TemplateError> {
            let path = self.root.join(&id).join(name);
            let opened = File::options()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .and_then(|file| Ok((FileIdentity::of(&path, &file.metadata()?), file)));
            let (found, file) = opened.map_err(|error| broken(format!("its {name}: {error}")))?;
            if found.is_of(known) {
                Ok(file.into())
            } else {
                Err(broken(format!("its {name} has been changed")))
            }
        };
        let files = SnapshotFiles {
            state: open(STATE, &description.state)?,
            memory: open(MEMORY, &description.memory)?,
        };
        let created_at = description.created_at;
        let (accesses, recording) = match self.working_set(&id) {
            Some(known) => (Accesses::Known(known), None),
            None => {
                let recording = Recording {
                    templates: self.clone(),
                    id: id.clone(),
                    created_at,
                    memory: files
                        .memory
                        .try_clone()
                        .map_err(io_error(|| "keeping a template's memory open".into()))?,
                };
                (Accesses::ToBeSeen, Some(recording))
            }
        };
        Ok(Some(Template {
            files,
            created_at,
            id,
            accesses,
            recording,
        }))
    }

    /// All of them, the newest first.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn list(&self) -> Result<Vec<Summary>, TemplateError> {
        let mut all = Vec::new();
        for id in self.ids()? {
            match self.summary(&id) {
                Ok(summary) => all.extend(summary),
                Err(error) => tracing::warn!("{}", crate::text::chain(&error)),
            }
        }
        all.sort_by_key(|summary| std::cmp::Reverse(summary.created_at));
        Ok(all)
    }

    /// Removes one, by its id, and what is known of its failures. Machines that began with it go on.
    ///
    /// # Errors
    /// When there is none, or its files can't be removed.
    pub fn remove(&self, id: &str) -> Result<(), TemplateError> {
        // Names of directories, and nothing that leads elsewhere.
        if !self.ids()?.iter().any(|known| known == id) && !self.has_failed(id) {
            return Err(TemplateError::NotFound(id.to_owned()));
        }
        self.remove_tree(id)?;
        let _ = fs::remove_file(self.root.join(format!("{id}.{LOCK}")));
        self.forget_failure(id);
        Ok(())
    }

    /// Removes one of which no machine came that is any good, unless another is in its place by now. `created_at` is
    /// when it was made.
    ///
    /// # Errors
    /// When its files can't be removed.
    pub fn discard(&self, id: &str, created_at: Timestamp) -> Result<(), TemplateError> {
        match self.description(id)? {
            Some(description) if description.created_at == created_at => self.remove_tree(id),
            _ => Ok(()),
        }
    }

    /// Removes those with which no pod can begin any more, those whose makers died, of the others the least recently
    /// used beyond a bound, and old failures.
    ///
    /// # Errors
    /// When the directory can't be read, or files can't be removed.
    pub fn tidy(&self) -> Result<(), TemplateError> {
        let (mut current, outdated): (Vec<_>, Vec<_>) = self
            .list()?
            .into_iter()
            .partition(|summary| summary.current);
        current.sort_by_key(|summary| std::cmp::Reverse(summary.last_used_at));
        for summary in outdated.iter().chain(current.iter().skip(MOST)) {
            self.remove(&summary.id)?;
        }
        for name in self.directories()? {
            if let Some(id) = name.strip_prefix(UNFINISHED)
                && let Ok(_lock) = self.lock(id)
            {
                self.remove_tree(&name)?;
            }
        }
        self.forget_failures()
    }

    /// Begins one of this kind.
    ///
    /// # Errors
    /// [`TemplateError::BeingMade`] when somebody else has; when files can't be made.
    pub fn begin(&self, kind: Kind) -> Result<Unfinished, TemplateError> {
        let id = kind.id();
        let lock = self.lock(&id)?;
        // Of somebody who died.
        self.remove_tree(&format!("{UNFINISHED}{id}"))?;
        let directory = self.root.join(format!("{UNFINISHED}{id}"));
        private_dir(&directory)?;
        Ok(Unfinished {
            templates: self.clone(),
            kind,
            directory,
            _lock: lock,
        })
    }

    /// Takes the lock of who makes a template.
    fn lock(&self, id: &str) -> Result<File, TemplateError> {
        let path = self.root.join(format!("{id}.{LOCK}"));
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(io_error(|| format!("opening {}", path.display())))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| TemplateError::BeingMade(id.to_owned()))?;
        Ok(lock)
    }

    fn ids(&self) -> Result<Vec<String>, TemplateError> {
        let mut names = self.directories()?;
        names.retain(|name| !name.starts_with('.'));
        Ok(names)
    }

    fn directories(&self) -> Result<Vec<String>, TemplateError> {
        let doing = || format!("reading {}", self.root.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error(doing))? {
            let entry = entry.map_err(io_error(doing))?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn summary(&self, id: &str) -> Result<Option<Summary>, TemplateError> {
        let Some(description) = self.description(id)? else {
            return Ok(None);
        };
        let size = |name| {
            let metadata = fs::symlink_metadata(self.root.join(id).join(name));
            // Units of 512 bytes, whatever the file system's.
            metadata.map_or(0, |metadata| metadata.blocks().saturating_mul(512))
        };
        Ok(Some(Summary {
            id: id.to_owned(),
            current: description.kind.is_current() && self.open_one(&description.kind).is_ok(),
            kind: description.kind,
            created_at: description.created_at,
            last_used_at: fs::symlink_metadata(self.root.join(id).join(DESCRIPTION))
                .and_then(|metadata| metadata.modified())
                .ok()
                .and_then(|time| Timestamp::try_from(time).ok())
                .unwrap_or(description.created_at),
            size: size(STATE).saturating_add(size(MEMORY)),
        }))
    }

    fn description(&self, id: &str) -> Result<Option<Description>, TemplateError> {
        let path = self.root.join(id).join(DESCRIPTION);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io_error(|| format!("opening {}", path.display())))?,
        };
        let mut text = Vec::new();
        file.take(DESCRIPTION_MAX)
            .read_to_end(&mut text)
            .map_err(io_error(|| format!("reading {}", path.display())))?;
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| TemplateError::Broken {
                id: id.to_owned(),
                why: format!("its {DESCRIPTION}: {error}"),
            })
    }

    fn remove_tree(&self, name: &str) -> Result<(), TemplateError> {
        let path = self.root.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error(|| format!("removing {}", path.display()))(error))
            }
            _ => Ok(()),
        }
    }
}

/// A template that is being made. Dropped before it is finished, it is gone.
#[derive(Debug)]
pub struct Unfinished {
    templates: Templates,
    kind: Kind,
    directory: PathBuf,
    /// For as long as it is being made.
    _lock: File,
}

impl Unfinished {
    /// Where else what is needed to make it can lie.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The files for [`hull_machine::client::Machine::snapshot`].
    ///
    /// # Errors
    /// When they can't be made.
    pub fn files(&self) -> Result<SnapshotFiles, TemplateError> {
        let create = |name: &str| -> Result<OwnedFd, TemplateError> {
            let path = self.directory.join(name);
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(io_error(|| format!("making {}", path.display())))?;
            Ok(file.into())
        };
        Ok(SnapshotFiles {
            state: create(STATE)?,
            memory: create(MEMORY)?,
        })
    }

    /// Puts it where pods find it, in place of another of its kind.
    ///
    /// # Errors
    /// When a file can't be looked at, written or moved.
    pub fn finish(self) -> Result<(), TemplateError> {
        let identity = |name: &str| {
            let path = self.directory.join(name);
            FileIdentity::at(&path).map_err(io_error(|| format!("looking at {}", path.display())))
        };
        let description = Description {
            kind: self.kind.clone(),
            created_at: Timestamp::now(),
            state: identity(STATE)?,
            memory: identity(MEMORY)?,
        };
        let path = self.directory.join(DESCRIPTION);
        let text = serde_json::to_vec_pretty(&description)
            .map_err(|error| io_error(|| format!("writing {}", path.display()))(error.into()))?;
        replace_file(&path, &text)?;
        let id = self.kind.id();
        self.templates.remove_tree(&id)?;
        let place = self.templates.root.join(&id);
        fs::rename(&self.directory, &place).map_err(io_error(|| {
            format!("moving a template to {}", place.display())
        }))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Not there when it is finished. What can't be removed goes with the next of its kind.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[cfg(test)]
mod tests;
