//! What `hull-vmm` says of its own accord, and how it ends.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::answers::Answers;
use super::{GuestConnection, kill};
use crate::channel::AsyncChannel;
use crate::control::{
    AddedMemory, ConnectRefused, DiskRefused, Event, ExitReason, MemoryRefused, PlugRefused,
    SnapshotRefused,
};
use crate::steps::Started;
use crate::warnings::WARNING_CHARS;

/// Longest reason taken from `hull-vmm`, in characters.
const REASON_CHARS: usize = 2000;
/// Steps of its start that are taken from `hull-vmm`, and the longest name of one, in characters.
const STEPS: usize = 32;
const STEP_CHARS: usize = 40;
/// Warnings that a machine gets into the log in all its life: a guest can cause as many as it likes.
pub(super) const WARNINGS: u32 = 1000;

/// Listens to one `hull-vmm` until its end.
#[derive(Debug)]
pub(super) struct Follower {
    pub(super) control: Arc<AsyncChannel>,
    pub(super) process: Arc<AsyncFd<OwnedFd>>,
    pub(super) connects: Arc<Answers<ConnectRefused>>,
    pub(super) plugs: Arc<Answers<PlugRefused>>,
    pub(super) disks: Arc<Answers<DiskRefused>>,
    pub(super) memory: Arc<Answers<MemoryRefused, AddedMemory>>,
    pub(super) pauses: Arc<Answers<Infallible>>,
    pub(super) snapshots: Arc<Answers<SnapshotRefused>>,
    pub(super) running: Option<oneshot::Sender<Started>>,
    pub(super) guest_connections: mpsc::Sender<GuestConnection>,
    pub(super) warnings_left: u32,
}

impl Follower {
    pub(super) async fn follow(mut self, end: watch::Sender<Option<ExitReason>>) {
        let told = self.listen().await;
        // Whatever it said, it is over: nothing waits on a process that says so and goes on.
        kill(&self.process);
        let found = self.reap().await;
        // Those who wait for the start or for a connection find the reason there when they are woken.
        end.send_replace(Some(told.unwrap_or(found)));
    }

    /// Handles events up to the end, and gives the reason if one was told.
    async fn listen(&mut self) -> Option<ExitReason> {
        loop {
            // What was said before the death counts, so the channel comes first.
            tokio::select! {
                biased;
                received = self.control.receive::<Event>() => match received {
                    Ok(Some((event, descriptors))) => {
                        if let Some(reason) = self.handle(event, descriptors) {
                            return Some(reason);
                        }
                    }
                    Ok(None) => return None,
                    Err(error) => return Some(broken(&error.to_string())),
                },
                _ = self.process.readable() => return None,
            }
        }
    }

    fn handle(&mut self, event: Event, mut descriptors: Vec<OwnedFd>) -> Option<ExitReason> {
        match event {
            Event::Running(started) => match self.running.take() {
                // Dropping the future of `launch` drops the machine, which ends it.
                Some(running) => drop(running.send(bounded(started))),
                None => return Some(broken("it started twice")),
            },
            Event::Connected { id, result } => self.connects.finish(id, result),
            Event::Plugged { id, result } => self.plugs.finish(id, result),
            Event::DiskChanged { id, result } => self.disks.finish(id, result),
            Event::AddedMemory { id, result } => self.memory.finish(id, result),
            Event::Paused { id } | Event::Resumed { id } => self.pauses.finish(id, Ok(())),
            Event::SnapshotTaken { id, result } => {
                let shown = |SnapshotRefused(why)| SnapshotRefused(printable(&why, REASON_CHARS));
                self.snapshots.finish(id, result.map_err(shown));
            }
            Event::GuestConnection { port } => {
                if let Some(stream) = descriptors.pop().and_then(|fd| stream(fd).ok()) {
                    // When the supervisor has no room or no interest, closing is the answer.
                    let _ = self
                        .guest_connections
                        .try_send(GuestConnection { port, stream });
                }
            }
            Event::Warning(text) => self.log(&text),
            Event::Ended(ExitReason::Failed(text)) => {
                return Some(ExitReason::Failed(printable(&text, REASON_CHARS)));
            }
            Event::Ended(reason) => return Some(reason),
            Event::Jailed { .. } => return Some(broken("it was jailed twice")),
        }
        None
    }

    fn log(&mut self, text: &str) {
        let Some(left) = self.warnings_left.checked_sub(1) else {
            return;
        };
        self.warnings_left = left;
        let text = printable(text, WARNING_CHARS);
        tracing::warn!(target: "hull-vmm", "{text}");
        if left == 0 {
            tracing::warn!(target: "hull-vmm", "what it says from here on is not written down");
        }
    }

    async fn reap(&self) -> ExitReason {
        if let Err(error) = self.process.readable().await {
            return ExitReason::Failed(format!("watching the process: {error}"));
        }
        let pidfd = WaitId::PidFd(self.process.get_ref().as_fd());
        match waitid(pidfd, WaitIdOptions::EXITED) {
            Ok(Some(status)) => match (status.terminating_signal(), status.exit_status()) {
                // An access to what a mapping of a file has past the file's end. Nothing else is mapped from one.
                (Some(libc::SIGBUS), _) => ExitReason::Failed(
                    "the file of its memory is shorter than it was, or can't be read".to_owned(),
                ),
                (Some(signal), _) => ExitReason::Killed(signal),
                (None, Some(code)) => ExitReason::Exited(code),
                (None, None) => ExitReason::Failed("it ended in an unknown way".to_owned()),
            },
            Ok(None) => ExitReason::Failed("it ended in an unknown way".to_owned()),
            Err(error) => ExitReason::Failed(format!("asking how the process ended: {error}")),
        }
    }
}

/// A stream that `hull-vmm` sent, if it is one.
fn stream(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let kind = (
        sockopt::socket_domain(&descriptor)?,
        sockopt::socket_type(&descriptor)?,
    );
    if kind != (AddressFamily::UNIX, SocketType::STREAM) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let stream = StdUnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

fn broken(how: &str) -> ExitReason {
    ExitReason::Failed(format!("hull-vmm broke the protocol: {how}"))
}

fn bounded(mut started: Started) -> Started {
    started.steps.truncate(STEPS);
    for step in &mut started.steps {
        step.name = printable(&step.name, STEP_CHARS);
    }
    started
}

/// Text of `hull-vmm`, safe to show on a terminal and to keep.
fn printable(text: &str, most: usize) -> String {
    text.chars()
        .take(most)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
