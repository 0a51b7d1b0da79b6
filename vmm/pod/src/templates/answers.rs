//! When a clone of a template answered last. It speaks for the template when another clone comes to nothing: on a host that is
//! too busy clones are slow, or are killed, and their template is none the worse for it.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::time::SystemTime;

use super::Templates;

/// An empty file; when it was modified tells.
const NAME: &str = "answered";

impl Templates {
    /// Notes that a clone of this one has answered just now. What fails is logged: then nothing speaks for the template.
    pub fn note_answer(&self, id: &str) {
        let noted = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.root.join(id).join(NAME))
            .and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = noted {
            tracing::debug!(%error, id, "noting that a clone has answered");
        }
    }

    /// Whether one has answered at `time` or later. A clock that was set back since lets nothing speak for the template.
    #[must_use]
    pub fn answered_since(&self, id: &str, time: SystemTime) -> bool {
        let answered = fs::symlink_metadata(self.root.join(id).join(NAME))
            .and_then(|metadata| metadata.modified());
        answered.is_ok_and(|answered| (time..=SystemTime::now()).contains(&answered))
    }
}
