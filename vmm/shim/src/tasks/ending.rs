//! How tasks end: by themselves, killed, and deleted.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskDelete, TaskExit};
use hull_pod::agent::Process;
use hull_pod::text::chain;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Task, Tasks, lock};
use crate::events::timestamp;
use crate::failure::TaskError;
use crate::managed::{Exit, KILLED, Managed, SIGKILL, State, killed, must_be, now};

impl Tasks {
    /// Follows a process, if nobody does yet.
    pub(super) fn see_end(
        self: &Arc<Self>,
        task: Arc<Task>,
        exec: &str,
        handle: Option<String>,
        process: &Arc<Managed>,
    ) {
        if process.follow() {
            let (tasks, exec) = (Arc::clone(self), exec.to_owned());
            let process = Arc::clone(process);
            tokio::spawn(async move { tasks.follow(&task, &exec, handle, &process).await });
        }
    }

    /// Waits for a process's end, and tells of it when all that it has printed is out.
    async fn follow(&self, task: &Task, exec: &str, handle: Option<String>, process: &Managed) {
        let (ended, oom_told) = match task.known(handle.as_deref()) {
            Some(Process::Container(name)) => self.outlive(task, name).await,
            Some(exec) => (self.pod.wait(exec).await, true),
            None => {
                self.pod.ended().await;
                (Ok(process.killed()), true)
            }
        };
        process.set_gone();
        let ended = ended.unwrap_or_else(|error| {
            tracing::warn!(
                id = task.id,
                exec,
                error = chain(&error),
                "a process is lost"
            );
            killed()
        });
        if let Some(streams) = process.streams() {
            streams.drain(self.limits.drain).await;
        }
        if handle.is_none() {
            task.ends_of_execs(self.limits.drain).await;
        }
        // The event of its start comes before that of its end, if there is one.
        let _starting = process.starting.lock().await;
        if matches!(process.state(), State::Ended(_)) {
            // It was deleted before it was started.
            return;
        }
        if ended.oom_killed && !oom_told {
            self.tell_oom(task).await;
        }
        let exit = now(u32::try_from(ended.code).unwrap_or(KILLED));
        let told = TaskExit {
            container_id: task.id.clone(),
            id: if exec.is_empty() { &task.id } else { exec }.to_owned(),
            pid: std::process::id(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(told).await;
        process.set(State::Ended(exit));
    }

    /// Sends a signal to a process, or to `all` of its container. One for infra ends the pod.
    ///
    /// # Errors
    /// [`TaskError::Ended`] when there is none to get it.
    pub async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let (handle, process) = task.process(exec)?;
        if process.is_gone() {
            return Err(TaskError::Ended(id.to_owned()));
        }
        if handle.is_some() {
            must_be(id, &process, "running", |state| state != State::Created)?;
        } else {
            // One that waits to be started can end as well.
            self.see_end(Arc::clone(&task), exec, None, &process);
        }
        let sent = match task.known(handle.as_deref()) {
            Some(known) if signal == SIGKILL => {
                self.end(&task, known, &process, handle.is_none(), all)
                    .await
            }
            Some(known) => self.pod.signal(known, signal, all).await,
            None => {
                process.set_signal(signal);
                self.pod.shut_down().await;
                Ok(())
            }
        };
        sent.map_err(|error| {
            if error.is_too_late() {
                TaskError::Ended(id.to_owned())
            } else {
                error
            }
        })
    }

    /// Kills a process, whatever the guest says to it: one that doesn't answer loses its machine, and so does one whose
    /// only container, which is the pod, goes on.
    async fn end(
        &self,
        task: &Task,
        known: Process<'_>,
        process: &Arc<Managed>,
        whole: bool,
        all: bool,
    ) -> Result<(), TaskError> {
        let sent = self.pod.signal(known, SIGKILL, all).await;
        if let Err(error) = &sent
            && !error.is_answer()
        {
            tracing::error!(
                id = task.id,
                error = chain(error),
                "SIGKILL is not taken: the machine ends"
            );
            self.pod.shut_down().await;
            return Ok(());
        }
        let refused = sent.is_err();
        if whole && lock(&self.owner).as_deref() == Some(&task.id) {
            let (pod, process) = (Arc::clone(&self.pod), Arc::clone(process));
            let (id, limit) = (task.id.clone(), self.limits.end);
            let end = tokio::spawn(async move {
                if timeout(limit, process.gone()).await.is_err() {
                    tracing::error!(id, "SIGKILL has no effect: the machine ends");
                    pod.shut_down().await;
                }
            });
            if refused {
                return Ok(end.await?);
            }
        }
        sent
    }

    /// Removes what has ended, or was never started.
    ///
    /// # Errors
    /// [`TaskError::State`] when it runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<Exit, TaskError> {
        let task = self.task(id)?;
        let (handle, process) = task.process(exec)?;
        must_be(id, &process, "stopped", |state| {
            !matches!(state, State::Running | State::Paused)
        })?;
        let exit = match process.state() {
            State::Ended(exit) => exit,
            _ => now(KILLED),
        };
        process.set(State::Ended(exit));
        if let Some(handle) = handle {
            lock(&task.execs).remove(exec);
            if let (Some(name), true) = (&task.name, process.streams().is_some())
                && let Err(error) = self.pod.remove_exec(name, &handle).await
            {
                // The container has ended, and its processes with it.
                tracing::debug!(id, exec, error = chain(&error), "removing a process");
            }
            return Ok(exit);
        }
        if let Some(name) = &task.name {
            self.take_away(name).await;
        }
        if lock(&self.owner).as_deref() == Some(id) {
            self.end_pod().await;
        }
        task.hooks.stopped(&self.host).await;
        lock(&self.tasks).remove(id);
        let deleted = TaskDelete {
            container_id: id.into(),
            pid: std::process::id(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(deleted).await;
        Ok(exit)
    }

    pub(super) async fn end_pod(&self) {
        self.pod.shut_down().await;
        *lock(&self.owner) = None;
    }

    /// What can't be removed goes with the machine.
    pub(super) async fn take_away(&self, name: &str) {
        if let Err(error) = self.pod.remove(name).await {
            tracing::warn!(name, error = chain(&error), "removing a container");
        }
    }
}

impl Task {
    /// Waits for the further processes, which end with the container; not longer than `limit`.
    async fn ends_of_execs(&self, limit: Duration) {
        let execs = lock(&self.execs).values().cloned().collect::<Vec<_>>();
        let until = Instant::now() + limit;
        for (_, process) in execs {
            if process.state() == State::Running {
                let _ = timeout_at(until, process.exit()).await;
            }
        }
    }
}
