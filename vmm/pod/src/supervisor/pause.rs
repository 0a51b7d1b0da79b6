//! A pod that stands still until it is told to go on.

use std::sync::{Arc, OnceLock, Weak};

use hull_machine::client::{AskError, Machine};
use tokio::sync::Mutex;

use super::record::Record;
use super::stop::Stop;
use crate::agent::{Agent, Hold};
use crate::events::EventType;

/// Why a pod doesn't stand still.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    #[error("the pod's machine is not up; `hull events` tells how far it is")]
    NotUp,
    #[error("the pod is ending")]
    Ending,
    #[error(transparent)]
    Machine(#[from] AskError),
}

/// Pauses the pod's machine, and lets it go on.
#[derive(Debug)]
pub struct Pause {
    record: Arc<Record>,
    stop: Stop,
    /// There once the guest is up.
    guest: OnceLock<(Weak<Machine>, Agent)>,
    /// There while the pod stands still.
    hold: Mutex<Option<Hold>>,
}

impl Pause {
    pub fn new(record: Arc<Record>, stop: Stop) -> Self {
        Self {
            record,
            stop,
            guest: OnceLock::new(),
            hold: Mutex::default(),
        }
    }

    /// The guest is up. From here on a pod that is to end goes on, which it must to end in order.
    pub fn begin(self: &Arc<Self>, machine: &Arc<Machine>, agent: Agent) {
        if self.guest.set((Arc::downgrade(machine), agent)).is_ok() {
            let pause = Arc::clone(self);
            tokio::spawn(async move {
                pause.stop.requested().await;
                // The only failure is that the machine has ended.
                let _ = pause.resume().await;
            });
        }
    }

    #[must_use]
    pub fn is_on(&self) -> bool {
        self.record.read(|status| status.paused)
    }

    /// Lets what the agent was asked come to its end, and then stops the guest's processors.
    ///
    /// # Errors
    /// When the guest is not up, or is to end.
    pub async fn pause(&self) -> Result<(), PauseError> {
        let mut hold = self.hold.lock().await;
        if self.stop.is_requested() {
            return Err(PauseError::Ending);
        }
        if hold.is_some() {
            return Ok(());
        }
        let (machine, agent) = self.guest()?;
        let held = agent.hold().await;
        machine.pause().await?;
        *hold = Some(held);
        self.note(true, "Paused", "the pod stands still");
        Ok(())
    }

    /// Does `work` with the machine while the guest stands still, as in [`Self::pause`]; then it goes on, unless it
    /// was paused before.
    ///
    /// # Errors
    /// When the guest is not up, or is to end.
    pub async fn standing<T>(
        &self,
        work: impl AsyncFnOnce(&Machine) -> T,
    ) -> Result<T, PauseError> {
        let paused = self.hold.lock().await;
        if self.stop.is_requested() {
            return Err(PauseError::Ending);
        }
        let (machine, agent) = self.guest()?;
        if paused.is_some() {
            return Ok(work(&machine).await);
        }
        let _held = agent.hold().await;
        machine.pause().await?;
        let done = work(&machine).await;
        machine.resume().await?;
        Ok(done)
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// When it is not up.
    pub async fn resume(&self) -> Result<(), PauseError> {
        let mut hold = self.hold.lock().await;
        let (machine, _) = self.guest()?;
        if hold.is_some() {
            machine.resume().await?;
            *hold = None;
            self.note(false, "Resumed", "the pod goes on");
        }
        Ok(())
    }

    fn guest(&self) -> Result<(Arc<Machine>, &Agent), PauseError> {
        let (machine, agent) = self.guest.get().ok_or(PauseError::NotUp)?;
        Ok((machine.upgrade().ok_or(PauseError::Ending)?, agent))
    }

    fn note(&self, paused: bool, reason: &str, message: &str) {
        self.record.update(|status| status.paused = paused);
        self.record.event(EventType::Normal, reason, None, message);
    }
}
