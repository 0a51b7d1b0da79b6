//! What a template's clones access before their containers run: noted of one of them, and got ready for the others.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use hull_machine::client::Machine;
use hull_machine::memory::working_set::WorkingSet;
use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};

use super::{TemplateError, Templates, io_error};
use crate::state::replace_file;

const NAME: &str = "working-set.json";
/// Bytes of it, at most.
const MAX: u64 = 1 << 16;

/// A clone of a template of which it isn't known yet what clones access.
#[derive(Debug)]
pub struct Recording {
    pub(super) templates: Templates,
    pub(super) id: String,
    pub(super) created_at: Timestamp,
    /// The template's.
    pub(super) memory: OwnedFd,
}

impl Recording {
    /// Notes what the clone has accessed so far, in place of what was noted before, for those that come after it. Blocking.
    ///
    /// # Errors
    /// When that can't be seen or written down.
    pub fn record(&self, machine: &Machine) -> Result<(), TemplateError> {
        let accessed = machine
            .working_set(self.memory.as_fd())
            .map_err(io_error(|| "looking at what a clone has accessed".into()))?;
        self.note(&accessed)
    }

    pub(super) fn note(&self, accessed: &WorkingSet) -> Result<(), TemplateError> {
        // Of another one that has taken its place meanwhile it says nothing.
        match self.templates.description(&self.id)? {
            Some(description) if description.created_at == self.created_at => {}
            _ => return Ok(()),
        }
        let directory = self.templates.root.join(&self.id);
        let opened = File::open(&directory);
        let opened = opened.map_err(io_error(|| format!("opening {}", directory.display())))?;
        // Of those that started together one is enough.
        if flock(&opened, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        let path = directory.join(NAME);
        let text = serde_json::to_vec(accessed)
            .map_err(|error| io_error(|| format!("writing {}", path.display()))(error.into()))?;
        Ok(replace_file(&path, &text)?)
    }
}

impl Templates {
    /// What is noted of the clones of one. None: nothing, or nothing that can be read; a clone then takes its time.
    pub(super) fn working_set(&self, id: &str) -> Option<WorkingSet> {
        let path = self.root.join(id).join(NAME);
        let read = || -> io::Result<WorkingSet> {
            let mut text = Vec::new();
            File::open(&path)?.take(MAX).read_to_end(&mut text)?;
            Ok(serde_json::from_slice(&text)?)
        };
        match read() {
            Ok(known) => Some(known),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, path = %path.display(), "a template's working set");
                }
                None
            }
        }
    }
}
