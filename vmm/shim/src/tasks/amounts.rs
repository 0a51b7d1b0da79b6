//! What tasks use and may use, and tasks that stand still.

use std::time::Duration;

use containerd_shim_protos::events::task::{TaskOOM, TaskPaused, TaskResumed};
use hull_pod::agent::{ExitStatus, Process, Stats};
use oci_spec::runtime::LinuxResources;

use super::{Task, Tasks};
use crate::failure::TaskError;
use crate::managed::{State, must_be};

/// Between two events of a container whose processes are killed for its memory limit one after another.
const BETWEEN_OOMS: Duration = Duration::from_secs(1);

impl Tasks {
    /// What a container uses. The task that stands for infra has what all of the pod's use together.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub async fn stats(&self, id: &str) -> Result<Stats, TaskError> {
        self.pod.stats(self.task(id)?.name.as_deref()).await
    }

    /// Lets a container stand still.
    ///
    /// # Errors
    /// See [`TaskError`]. It goes on then.
    pub async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let name = task.container("be paused")?;
        let _pausing = task.first.pausing.lock().await;
        must_be(id, &task.first, "running", |state| state == State::Running)?;
        self.pod.freeze(name).await?;
        // Not if it has ended meanwhile.
        let _telling = task.first.starting.lock().await;
        if task.first.replace(State::Running, State::Paused) {
            let paused = TaskPaused {
                container_id: id.into(),
                ..Default::default()
            };
            self.events.publish(paused).await;
        }
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let name = task.container("be resumed")?;
        let _pausing = task.first.pausing.lock().await;
        must_be(id, &task.first, "paused", |state| state == State::Paused)?;
        self.pod.thaw(name).await?;
        let _telling = task.first.starting.lock().await;
        if task.first.replace(State::Paused, State::Running) {
            let resumed = TaskResumed {
                container_id: id.into(),
                ..Default::default()
            };
            self.events.publish(resumed).await;
        }
        Ok(())
    }

    /// Changes what a container may use.
    ///
    /// # Errors
    /// See [`TaskError`]. More than the pod's machine has is refused.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let name = task.container("be given more or less: its machine stays as it is")?;
        must_be(id, &task.first, "not stopped", |state| {
            !matches!(state, State::Ended(_))
        })?;
        self.pod.update(name, resources).await
    }

    /// Waits for the end of a container's first process, and tells of others that are killed for its memory limit.
    /// Returns whether it has told of one, too.
    pub(super) async fn outlive(
        &self,
        task: &Task,
        container: &str,
    ) -> (Result<ExitStatus, TaskError>, bool) {
        let ended = self.pod.wait(Process::Container(container));
        tokio::pin!(ended);
        let (mut kills, mut wait) = (0, Duration::ZERO);
        loop {
            let more = async {
                tokio::time::sleep(wait).await;
                self.pod.wait_oom(container, kills).await
            };
            let more = tokio::select! {
                biased;
                ended = &mut ended => return (ended, kills > 0),
                more = more => more,
            };
            match more {
                Ok(more) if more > kills => (kills, wait) = (more, BETWEEN_OOMS),
                // It has ended, or nobody tells.
                _ => return (ended.await, kills > 0),
            }
            self.tell_oom(task).await;
        }
    }

    pub(super) async fn tell_oom(&self, task: &Task) {
        let oom = TaskOOM {
            container_id: task.id.clone(),
            ..Default::default()
        };
        self.events.publish(oom).await;
    }
}

impl Task {
    /// The container as the agent knows it.
    fn container(&self, what: &str) -> Result<&str, TaskError> {
        self.name.as_deref().ok_or_else(|| {
            TaskError::Unsupported(format!(
                "{:?} stands for the pod's namespaces, and can't {what}",
                self.id
            ))
        })
    }
}
