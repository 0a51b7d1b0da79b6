//! The guest's processes as process 1 sees them: started, found, and told when they end.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The exit status, or 128 + the signal's number.
    pub code: u32,
    /// The signal that ended it, or 0.
    pub signal: u32,
    pub at: SystemTime,
}

/// A process that is watched until it ends.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: Pid,
    /// Names this very process, also after its number was given to another.
    fd: Arc<OwnedFd>,
    ended: watch::Receiver<Option<Ended>>,
}

impl Process {
    /// Waits for the end. May be called by many, and again after.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(value) => value.unwrap_or_else(lost),
            Err(_) => lost(),
        }
    }

    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Moves the calling thread into the process's network namespace.
    pub fn enter_network(&self) -> io::Result<()> {
        Ok(move_into_thread_name_spaces(
            self.fd.as_fd(),
            ThreadNameSpaceType::NETWORK,
        )?)
    }

    /// Sends a signal; nothing happens if the process has ended.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        send_signal(&self.fd, signal)
    }
}

/// Only when the reaper is gone, that is with the agent itself.
fn lost() -> Ended {
    Ended {
        code: 255,
        signal: 0,
        at: SystemTime::now(),
    }
}

/// Sends a signal to the process that `pidfd` names.
pub fn send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    // rustix's Signal has no real-time signals, and containers use them.
    // SAFETY: the descriptor is open, and a null siginfo is allowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            error => Err(error),
        },
    }
}

/// Collects every child's end. As process 1, that is every orphan's, too.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: Mutex<HashMap<i32, watch::Sender<Option<Ended>>>>,
}

impl Reaper {
    fn watched(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<Ended>>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a child. Its end can't be missed: nothing is reaped meanwhile.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Process> {
        let mut watched = self.watched();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(io::ErrorKind::InvalidData)?;
        watch(&mut watched, pid)
    }

    /// Watches a process that is to become a child. Its present parent must hold
    /// it (as a zombie, if it ends) until this returns.
    pub fn adopt(&self, pid: Pid) -> io::Result<Process> {
        watch(&mut self.watched(), pid)
    }

    /// Collects all that have ended.
    pub fn reap(&self) {
        let mut watched = self.watched();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let signal = status.terminating_signal().unwrap_or(0).unsigned_abs();
            let code = match status.exit_status() {
                Some(code) => code.unsigned_abs(),
                None => 128 + signal,
            };
            if let Some(sender) = watched.remove(&pid.as_raw_nonzero().get()) {
                sender.send_replace(Some(Ended {
                    code,
                    signal,
                    at: SystemTime::now(),
                }));
            }
        }
    }

    /// Reaps for as long as the agent lives.
    pub async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.reap();
            children.recv().await;
        }
    }
}

fn watch(
    watched: &mut HashMap<i32, watch::Sender<Option<Ended>>>,
    pid: Pid,
) -> io::Result<Process> {
    let fd = Arc::new(pidfd_open(pid, PidfdFlags::empty())?);
    let (sender, ended) = watch::channel(None);
    watched.insert(pid.as_raw_nonzero().get(), sender);
    Ok(Process { pid, fd, ended })
}
