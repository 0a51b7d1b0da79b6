//! What happened to a pod, one JSON object a line.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::state::{PodDir, StateError};

/// An older half of the events is dropped when the file gets larger.
const FILE_MAX: u64 = 1 << 20;
/// A message is cut to this many bytes.
const MESSAGE_MAX: usize = 1024;

/// As Kubernetes has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventType {
    Normal,
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEvent {
    pub time: Timestamp,
    #[serde(rename = "type")]
    pub kind: EventType,
    /// One word, for example `Started`.
    pub reason: String,
    /// The container that it is about; none: the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    pub message: String,
}

/// Appends to a pod's events.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
}

impl EventLog {
    /// # Errors
    /// When the file can't be opened.
    pub fn open(dir: &PodDir) -> Result<Self, StateError> {
        Self::at(&dir.events())
    }

    fn at(path: &Path) -> Result<Self, StateError> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(|e| StateError::io("open", path, e))?;
        Ok(Self {
            path: path.into(),
            file,
        })
    }

    /// # Errors
    /// When the disk is full, for example. The pod doesn't depend on it.
    pub fn append(
        &mut self,
        kind: EventType,
        reason: &str,
        container: Option<&str>,
        message: &str,
    ) -> Result<(), StateError> {
        let event = PodEvent {
            time: Timestamp::now(),
            kind,
            reason: reason.into(),
            container: container.map(Into::into),
            message: crate::text::cut(message, MESSAGE_MAX).into(),
        };
        let mut line = serde_json::to_vec(&event).map_err(|source| StateError::Format {
            path: self.path.clone(),
            source,
        })?;
        line.push(b'\n');
        // One write, so that a reader never sees half a line of a living writer.
        self.file
            .write_all(&line)
            .map_err(|e| StateError::io("write", &self.path, e))?;
        self.bound()
    }

    /// Keeps the younger half of a file that has grown too large.
    fn bound(&mut self) -> Result<(), StateError> {
        let length = self
            .file
            .metadata()
            .map_err(|e| StateError::io("look at", &self.path, e))?
            .len();
        if length <= FILE_MAX {
            return Ok(());
        }
        let content = fs::read(&self.path).map_err(|e| StateError::io("read", &self.path, e))?;
        let half = content.len() / 2;
        let start = content[half..]
            .iter()
            .position(|b| *b == b'\n')
            .map_or(content.len(), |n| half + n + 1);
        crate::state::replace_file(&self.path, &content[start..])?;
        *self = Self::at(&self.path)?;
        Ok(())
    }
}

/// The events of a pod, oldest first. Lines that can't be understood are passed over: the last
/// one of a supervisor that was killed may be cut.
///
/// # Errors
/// When the file is there but can't be read.
pub fn read(dir: &PodDir) -> Result<Vec<PodEvent>, StateError> {
    let path = dir.events();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StateError::io("open", path, e)),
    };
    Ok(BufReader::new(file)
        .split(b'\n')
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_slice(&line).ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Directories, PodId};

    fn pod_dir(root: &Path) -> PodDir {
        let dirs = Directories::new(root.join("run"), root.join("data"));
        let dir = dirs.pod(&PodId::random().unwrap());
        fs::create_dir_all(dir.run()).unwrap();
        dir
    }

    #[test]
    fn events_are_read_as_written() {
        let root = tempfile::tempdir().unwrap();
        let dir = pod_dir(root.path());
        let mut log = EventLog::open(&dir).unwrap();

        log.append(
            EventType::Normal,
            "Started",
            Some("web"),
            "started\ncontainer",
        )
        .unwrap();
        log.append(EventType::Warning, "Failed", None, "gone")
            .unwrap();

        let events = read(&dir).unwrap();
        assert_eq!(events.len(), 2);
        assert_eq!(events[0].container.as_deref(), Some("web"));
        assert_eq!(events[0].message, "started\ncontainer");
        assert_eq!(events[1].kind, EventType::Warning);
    }

    #[test]
    fn a_cut_line_hides_no_other() {
        let root = tempfile::tempdir().unwrap();
        let dir = pod_dir(root.path());
        EventLog::open(&dir)
            .unwrap()
            .append(EventType::Normal, "Started", None, "whole")
            .unwrap();
        let mut file = File::options().append(true).open(dir.events()).unwrap();
        file.write_all(b"{\"time\":\"20").unwrap();

        let events = read(&dir).unwrap();

        assert_eq!(events.len(), 1);
    }

    #[test]
    fn the_file_stays_bounded_and_keeps_the_young() {
        let root = tempfile::tempdir().unwrap();
        let dir = pod_dir(root.path());
        let mut log = EventLog::open(&dir).unwrap();
        let message = "x".repeat(5000);

        for _ in 0..1200 {
            log.append(EventType::Normal, "Old", None, &message)
                .unwrap();
        }
        log.append(EventType::Normal, "Young", None, "").unwrap();

        assert!(fs::metadata(dir.events()).unwrap().len() <= FILE_MAX);
        let events = read(&dir).unwrap();
        assert_eq!(events.last().unwrap().reason, "Young");
        assert_eq!(events[0].message.len(), MESSAGE_MAX);
    }
}
