//! How tasks end, whatever their guest does.

use std::sync::Arc;
use std::time::Duration;

use hull_pod::agent::Process;
use hull_pod::text::chain;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Task, Tasks, lock};
use crate::failure::TaskError;
use crate::managed::{Managed, SIGKILL, State, must_be};

impl Tasks {
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
}

impl Task {
    /// Waits for the further processes, which end with the container; not longer than `limit`.
    pub(super) async fn ends_of_execs(&self, limit: Duration) {
        let execs = lock(&self.execs).values().cloned().collect::<Vec<_>>();
        let until = Instant::now() + limit;
        for (_, process) in execs {
            if process.state() == State::Running {
                let _ = timeout_at(until, process.exit()).await;
            }
        }
    }
}
