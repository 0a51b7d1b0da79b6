//! What a client may ask of a supervisor, and what it answers.
//!
//! A connection is a [`hull_machine::channel::Channel`] on the pod's `supervisor.sock`. A client
//! asks one thing after another on it. Two requests change what comes after: [`Request::Follow`]
//! (then [`Reply::Changed`] comes by itself) and [`Request::Exec`] (the connection then belongs to
//! that process, and closing it hangs up). The connection ends with the supervisor.

use hull_machine::channel::Message;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The starter's first message, on the supervisor's standard input. Attached: the pod's open
    /// lock file.
    Start,
    /// Answers [`Reply::Changed`] now and whenever `state.json` has changed.
    Follow,
    /// Ends the pod. [`Reply::Done`] says that it was heard; the end of the connection that it is
    /// done. A later one may shorten the grace.
    Stop {
        /// Between SIGTERM and SIGKILL; none: as the manifest has it.
        grace_seconds: Option<u64>,
    },
    /// Sends a signal. Answered by [`Reply::Done`].
    Kill { target: Target, signal: u32 },
    /// Runs a process. Answered by [`Reply::ExecStarted`], and at its end [`Reply::ExecEnded`].
    Exec(Exec),
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

/// Of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Changed,
    Done,
    /// Attached: the stream of standard input if asked for, standard output, and standard error
    /// unless there is a terminal, in this order.
    ExecStarted {
        stdin: bool,
        stderr: bool,
    },
    /// Attached: the connection, as a stream in both directions with an end of its own in each.
    Forwarded,
    ExecEnded {
        exit_code: i32,
    },
    Refused {
        kind: Refusal,
        message: String,
    },
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
        usize::from(*self == Self::Start)
    }
}

impl Message for Reply {
    fn descriptors(&self) -> usize {
        match self {
            Self::Forwarded => 1,
            Self::ExecStarted { stdin, stderr } => 1 + usize::from(*stdin) + usize::from(*stderr),
            _ => 0,
        }
    }
}
