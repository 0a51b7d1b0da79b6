//! What a client may ask of a supervisor, and what it answers.
//!
//! A connection is a [`hull_machine::channel::Channel`] on the pod's `supervisor.sock`. A client
//! asks one thing after another on it. Some requests change what comes after: [`Request::Follow`]
//! (then [`Reply::Changed`] comes by itself), [`Request::Exec`] and a [`Request::Join`] that attaches
//! (the connection then belongs to that process, and closing it hangs up). The connection ends with
//! the supervisor.

use hull_machine::channel::Message;
use k8s_openapi::api::core::v1::Container;
use serde::{Deserialize, Serialize};

use crate::manifest::RestartPolicy;
use crate::metrics::PodMetrics;
use crate::oci::MachineSize;
use crate::snapshots::Files;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// The starter's first message, on the supervisor's standard input. Attached: the pod's open
    /// lock file.
    Start {
        /// When the pod was asked for, on [`crate::timeline::now_micros`].
        requested: u64,
        /// It goes on where it was put aside. Attached, too: state and memory of its machine.
        restored: Option<MachineSize>,
    },
    /// Answers [`Reply::Changed`] now and whenever `state.json` has changed.
    Follow,
    /// Ends the pod. [`Reply::Done`] says that it was heard; the end of the connection that it is
    /// done. A later one may shorten the grace.
    Stop {
        /// Between SIGTERM and SIGKILL; none: as the manifest has it.
        grace_seconds: Option<u64>,
    },
    /// Stops the guest's processors. Answered by [`Reply::Done`] when they stand.
    Pause,
    /// Lets them go on. Answered by [`Reply::Done`].
    Resume,
    /// Puts the pod aside; meanwhile it stands still. Attached: [`crate::snapshots::Files`]. Answered by
    /// [`Reply::Done`] when all is in them.
    Snapshot,
    /// Sends a signal. Answered by [`Reply::Done`].
    Kill { target: Target, signal: u32 },
    /// Runs a process. Answered by [`Reply::ExecStarted`], and at its end [`Reply::Ended`].
    Exec(Exec),
    /// Adds a container to the running pod. Answered by [`Reply::Joined`] when it has been started,
    /// and if it is attached by [`Reply::Ended`] at its end; that of the connection is then its own.
    Join(Box<Join>),
    /// Measures the pod. Answered by [`Reply::Metrics`], whatever the guest does.
    Metrics,
    /// Connects to a TCP port of the pod. Answered by [`Reply::Forwarded`].
    Forward { port: u16 },
    /// The size of the terminal of this connection's process. Answered by nothing.
    Resize(Size),
}

/// Whom a signal is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    Infra,
    Container(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    pub container: String,
    pub args: Vec<String>,
    /// `NAME=value`, on top of the container's.
    pub env: Vec<String>,
    /// None: the container's.
    pub cwd: Option<String>,
    /// None: the container's. As an image has it: `uid`, `uid:gid`, `name`, `name:group`.
    pub user: Option<String>,
    /// Give it the client's standard input; else it reads the end of file at once.
    pub stdin: bool,
    /// Give it a terminal of this size.
    pub tty: Option<Size>,
}

/// A container that is to join the pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Join {
    /// As a manifest has it. Without a name it gets one.
    pub container: Container,
    /// In place of runAsUser and runAsGroup: `name`, `name:group`.
    pub user: Option<String>,
    /// Its own, whatever the pod's.
    pub restart: RestartPolicy,
    /// Forget it at its end, with its log. Else that comes with the pod's.
    pub remove: bool,
    /// Give its streams to the client, until the first time that it ends.
    pub attach: bool,
    /// Of the client's terminal.
    pub size: Option<Size>,
}

impl Default for Join {
    fn default() -> Self {
        Self {
            container: Container::default(),
            user: None,
            restart: RestartPolicy::Never,
            remove: false,
            attach: false,
            size: None,
        }
    }
}

/// Of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Changed,
    Done,
    Metrics(Box<PodMetrics>),
    /// Attached: the stream of standard input if asked for, standard output, and standard error
    /// unless there is a terminal, in this order.
    ExecStarted {
        stdin: bool,
        stderr: bool,
    },
    /// Attached: as of [`Self::ExecStarted`], if there are streams.
    Joined {
        name: String,
        streams: Option<Streams>,
    },
    /// Attached: the connection, as a stream in both directions with an end of its own in each.
    Forwarded,
    Ended {
        exit_code: i32,
    },
    Refused {
        kind: Refusal,
        message: String,
    },
}

/// Which streams come beside standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    pub stdin: bool,
    pub stderr: bool,
}

/// Why a request was not carried out, as far as a program wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No such container, or it doesn't run.
    NotRunning,
    /// There is no such program in the container.
    ProgramNotFound,
    /// The program can't be executed.
    ProgramNotExecutable,
    /// Anything else.
    Failed,
}

impl Message for Request {
    fn descriptors(&self) -> usize {
        match self {
            Self::Start { restored: None, .. } => 1,
            Self::Start {
                restored: Some(_), ..
            } => 3,
            Self::Snapshot => Files::COUNT,
            _ => 0,
        }
    }
}

impl Message for Reply {
    fn descriptors(&self) -> usize {
        match self {
            Self::Forwarded => 1,
            Self::ExecStarted { stdin, stderr }
            | Self::Joined {
                streams: Some(Streams { stdin, stderr }),
                ..
            } => 1 + usize::from(*stdin) + usize::from(*stderr),
            _ => 0,
        }
    }
}
