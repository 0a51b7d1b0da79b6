//! Work that needs a process of its own: namespaces are entered, and libcontainer
//! forks, where there is one thread and no runtime.
//!
//! The agent starts itself again from /proc/self/exe and sends one [`Request`]; the
//! helper makes the process that was asked for, replies with its number, and stays
//! until the agent has taken that process over. So the process can't be reaped, and
//! its number not be used again, before the agent watches it.

pub mod infra;
mod launch;
mod run;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result};
use crate::message;
use crate::process::{Process, Reaper};
use crate::stdio::Size;

pub use run::main;

/// Bounds requests and replies.
const MAX_MESSAGE: usize = 128 * 1024;

/// What a helper is started for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Infra(infra::Infra),
    Create(Create),
    Exec(Box<Exec>),
}

impl Request {
    /// The helper's name in the process list.
    fn name(&self) -> &'static str {
        match self {
            Self::Infra(_) => "infra",
            Self::Create(_) => "container",
            Self::Exec(_) => "exec",
        }
    }

    fn doing(&self) -> &'static str {
        match self {
            Self::Infra(_) => "starting infra",
            Self::Create(_) => "creating the container",
            Self::Exec(_) => "starting the process",
        }
    }
}

/// Makes a container from a bundle. Comes with three descriptors for its stdio, or
/// none if it has a terminal.
#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    pub id: String,
    /// Directory with libcontainer's states.
    pub states: PathBuf,
    pub bundle: PathBuf,
    /// Where a container with a terminal sends the master.
    pub console: Option<PathBuf>,
}

/// Runs a process in a container. Descriptors as with [`Create`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    pub id: String,
    /// Directory with a state of the container for this exec.
    pub states: PathBuf,
    /// An OCI process in JSON.
    pub process: PathBuf,
    pub console: Option<PathBuf>,
    pub confinement: Confinement,
    pub terminal_size: Option<Size>,
}

/// What libcontainer leaves out of an exec: it drops the container's seccomp filter.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Confinement {
    pub seccomp: Option<LinuxSeccomp>,
    /// Set after the filter, whose loading needs more. None: as the process has them.
    pub capabilities: Option<LinuxCapabilities>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Made { pid: i32 },
    NotFound { program: String },
    NotExecutable { program: String },
    Failed { text: String },
}

/// Runs a helper, and takes over the process that it makes.
pub async fn call(reaper: &Reaper, request: &Request, fds: Vec<OwnedFd>) -> Result<Process> {
    let doing = request.doing();
    let bytes = serde_json::to_vec(request).map_err(|error| Error::Invalid(error.to_string()))?;
    if bytes.len() > MAX_MESSAGE {
        return Err(Error::Invalid(format!("{doing}: the request is too large")));
    }
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(|| "making a socket for a helper".into())?;

    let helper = reaper
        .spawn(
            Command::new("/proc/self/exe")
                .arg0(request.name())
                .env_clear()
                .stdin(Stdio::from(theirs)),
        )
        .doing(|| "starting a helper".into())?;
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    message::send(&ours, &bytes, &borrowed).doing(|| "asking a helper".into())?;
    drop(fds);

    let socket = Endpoint::new(ours).doing(|| "asking a helper".into())?;
    let made = receive(&socket, doing)
        .await
        .and_then(|pid| reaper.adopt(pid).doing(|| "watching a process".into()));
    drop(socket);
    helper.ended().await;
    made
}

async fn receive(socket: &Endpoint, doing: &'static str) -> Result<Pid> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (count, _) = socket
        .receive(&mut buffer, 0)
        .await
        .doing(|| format!("{doing}: waiting for its helper"))?;
    if count == 0 {
        return Err(Error::Helper {
            doing,
            text: "its helper died; see the machine's console".into(),
        });
    }
    let reply = serde_json::from_slice(&buffer[..count])
        .map_err(io::Error::from)
        .doing(|| format!("{doing}: reading the reply"))?;
    match reply {
        Reply::Made { pid } => Pid::from_raw(pid).ok_or(Error::Helper {
            doing,
            text: "its helper replied with no process".into(),
        }),
        Reply::NotFound { program } => Err(Error::ProgramNotFound { program }),
        Reply::NotExecutable { program } => Err(Error::ProgramNotExecutable { program }),
        Reply::Failed { text } => Err(Error::Helper { doing, text }),
    }
}

/// Whether a process of that name is a helper.
pub fn is_helper(name: &str) -> bool {
    matches!(name, "infra" | "container" | "exec")
}
