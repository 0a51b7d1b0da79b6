//! A process as containerd knows it: what its streams are, how far it is, and how it ended.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
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
    /// Whether it has ended, although its last output may not be out.
    gone: watch::Sender<bool>,
    /// Whether somebody waits for its end already.
    followed: AtomicBool,
    /// The last signal that it was sent.
    signal: AtomicU32,
    streams: Mutex<Option<Arc<Streams>>>,
    /// Held while its state and the events that tell of it change.
    pub starting: tokio::sync::Mutex<()>,
    /// Held while it is paused or resumed.
    pub pausing: tokio::sync::Mutex<()>,
}

impl Managed {
    #[must_use]
    pub fn new(places: Places, what: Option<Exec>, streams: Option<Streams>) -> Self {
        Self {
            places,
            what,
            state: watch::Sender::new(State::Created),
            gone: watch::Sender::new(false),
            followed: AtomicBool::new(false),
            signal: AtomicU32::new(SIGKILL),
            streams: Mutex::new(streams.map(Arc::new)),
            starting: tokio::sync::Mutex::default(),
            pausing: tokio::sync::Mutex::default(),
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
        if matches!(state, State::Ended(_)) {
            self.gone.send_replace(true);
        }
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

    /// Its end has been seen; [`State::Ended`] follows when its last output is out.
    pub fn set_gone(&self) {
        self.gone.send_replace(true);
    }

    #[must_use]
    pub fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Waits until its end has been seen.
    pub async fn gone(&self) {
        // The sender is in `self`.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Whether the caller is the first to ask, and so the one who is to wait for its end.
    #[must_use]
    pub fn follow(&self) -> bool {
        !self.followed.swap(true, Ordering::Relaxed)
    }

    pub fn set_signal(&self, signal: u32) {
        self.signal.store(signal, Ordering::Relaxed);
    }

    /// How it has ended if nobody has seen it, but the signal was sent.
    #[must_use]
    pub fn killed(&self) -> ExitStatus {
        let signal = self.signal.load(Ordering::Relaxed);
        let signal = i32::try_from(signal).ok().filter(|s| (1..=64).contains(s));
        let signal = signal.unwrap_or(9);
        ExitStatus {
            code: 128 + signal,
            signal: Some(signal),
            oom_killed: false,
        }
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
