//! What the supervisor knows of its pod: in memory, on disk, and told to who follows.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::events::{EventLog, EventType};
use crate::state::{ContainerState, ContainerStatus, PodDir, PodStatus, StateError, write_status};
use crate::timeline::Recorder;

/// A pod's status and events. Its locks are held for no longer than a small file is written.
#[derive(Debug)]
pub struct Record {
    dir: PodDir,
    status: Mutex<PodStatus>,
    events: Mutex<EventLog>,
    changes: watch::Sender<u64>,
    timeline: Recorder,
}

impl Record {
    /// # Errors
    /// When the files can't be written.
    pub fn new(dir: PodDir, status: PodStatus, timeline: Recorder) -> Result<Self, StateError> {
        let events = EventLog::open(&dir)?;
        write_status(&dir, &status)?;
        Ok(Self {
            dir,
            status: Mutex::new(status),
            events: Mutex::new(events),
            changes: watch::Sender::new(0),
            timeline,
        })
    }

    #[must_use]
    pub fn dir(&self) -> &PodDir {
        &self.dir
    }

    /// Where the pod's start is noted.
    #[must_use]
    pub fn timeline(&self) -> &Recorder {
        &self.timeline
    }

    /// Looks at the status.
    pub fn read<T>(&self, look: impl FnOnce(&PodStatus) -> T) -> T {
        look(&self.lock())
    }

    /// Changes the status, and writes it when it has changed.
    pub fn update(&self, change: impl FnOnce(&mut PodStatus)) {
        let mut status = self.lock();
        let before = status.clone();
        change(&mut status);
        if *status == before {
            return;
        }
        // The pod goes on without: `hull ps` then shows what was last written.
        if let Err(error) = write_status(&self.dir, &status) {
            tracing::error!(%error, "writing the pod's state");
        }
        drop(status);
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Changes the status of one container.
    pub fn update_container(&self, name: &str, change: impl FnOnce(&mut ContainerStatus)) {
        self.update(|status| {
            if let Some(container) = status.container_mut(name) {
                change(container);
            }
        });
    }

    /// Sets the state of one container.
    pub fn set_container(&self, name: &str, state: ContainerState) {
        self.update_container(name, |container| container.state = state);
    }

    /// Counts whenever the status has changed.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Notes that something happened.
    pub fn event(&self, kind: EventType, reason: &str, container: Option<&str>, message: &str) {
        tracing::info!(reason, container, message);
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = events.append(kind, reason, container, message) {
            tracing::error!(%error, "writing the pod's events");
        }
    }

    fn lock(&self) -> MutexGuard<'_, PodStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
