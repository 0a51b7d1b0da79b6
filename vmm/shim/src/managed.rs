//! A process as containerd knows it: what its streams are, how far it is, and how it ended.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use hull_pod::agent::ExitStatus;
use hull_pod::supervisor::api::Exec;
use tokio::sync::watch;

use crate::failure::TaskError;
use crate::streams::{Places, Streams};

pub const SIGKILL: u32 = 9;
/// Of a process that nobody has seen end.
pub const KILLED: u32 = 128 + SIGKILL;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub status: u32,
    pub at: SystemTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    /// Of a container's first process: all stand still.
    Paused,
    Ended(Exit),
}

/// A process as containerd knows it.
#[derive(Debug)]
pub struct Managed {
    pub places: Places,
    /// What is to be run, of an exec.
    pub what: Option<Exec>,
    state: watch::Sender<State>,
    streams: Mutex<Option<Arc<Streams>>>,
    /// Held while it is started, paused or resumed.
    pub changing: tokio::sync::Mutex<()>,
}

impl Managed {
    #[must_use]
    pub fn new(places: Places, what: Option<Exec>, streams: Option<Streams>) -> Self {
        Self {
            places,
            what,
            state: watch::Sender::new(State::Created),
            streams: Mutex::new(streams.map(Arc::new)),
            changing: tokio::sync::Mutex::default(),
        }
    }

    #[must_use]
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Waits for its end.
    pub async fn exit(&self) -> Exit {
        let mut state = self.state.subscribe();
        // The sender is in `self`, so it can't be gone.
        let _ = state
            .wait_for(|state| matches!(state, State::Ended(_)))
            .await;
        let State::Ended(exit) = *state.borrow() else {
            return now(KILLED);
        };
        exit
    }

    pub fn set(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Replaces one state. False: it is in another one.
    #[must_use]
    pub fn replace(&self, from: State, to: State) -> bool {
        self.state.send_if_modified(|state| {
            let is = *state == from;
            if is {
                *state = to;
            }
            is
        })
    }

    #[must_use]
    pub fn streams(&self) -> Option<Arc<Streams>> {
        self.lock().clone()
    }

    pub fn set_streams(&self, streams: Streams) {
        *self.lock() = Some(Arc::new(streams));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Streams>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// # Errors
/// [`TaskError::State`] when a process's state doesn't fit.
pub fn must_be(
    id: &str,
    process: &Managed,
    must: &'static str,
    fits: impl FnOnce(State) -> bool,
) -> Result<(), TaskError> {
    let state = process.state();
    if fits(state) {
        return Ok(());
    }
    let is = match state {
        State::Created => "created",
        State::Running => "running",
        State::Paused => "paused",
        State::Ended(_) => "stopped",
    };
    Err(TaskError::State {
        id: id.to_owned(),
        is,
        must,
    })
}

/// How a process has ended that nobody has seen end.
#[must_use]
pub fn killed() -> ExitStatus {
    ExitStatus {
        code: 137,
        signal: Some(9),
        oom_killed: false,
    }
}

#[must_use]
pub fn now(status: u32) -> Exit {
    Exit {
        status,
        at: SystemTime::now(),
    }
}
