//! Work that needs a process of its own: namespaces are entered, and libcontainer
//! forks, where there is one thread and no runtime.
//!
//! The agent starts itself again from /proc/self/exe, before anything is asked: for the helper that makes infra, and for a
//! process that each other helper is forked from ([`parent`]), a program that has begun already, with its pages at hand. A
//! helper is sent one [`Request`]; it makes the process that was asked for, replies with its number, and stays until the
//! agent watches that process. So the process can't be reaped, and its number not be used again, before that.

mod call;
pub mod infra;
mod launch;
mod parent;
mod run;

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use oci_spec::runtime::LinuxCapabilities;
use serde::{Deserialize, Serialize};

use crate::stdio::Size;

pub use call::Helpers;

/// Bounds requests.
const MAX_MESSAGE: usize = 128 * 1024;
/// Bounds replies, whose texts are shorter.
const MAX_REPLY: usize = 16 * 1024;

/// What a helper is started for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    Infra(infra::Infra),
    Create(Box<Create>),
    Exec(Box<Exec>),
}

impl Request {
    /// The helper's name in the process list.
    fn name(&self) -> &'static CStr {
        match self {
            Self::Infra(_) => c"infra",
            Self::Create(_) => c"container",
            Self::Exec(_) => c"exec",
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
/// none if it has a terminal, and then its seccomp filter's program.
#[derive(Debug, Serialize, Deserialize)]
pub struct Create {
    pub id: String,
    /// Directory with libcontainer's states.
    pub states: PathBuf,
    pub bundle: PathBuf,
    /// Where a container with a terminal sends the master.
    pub console: Option<PathBuf>,
    pub confinement: Confinement,
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

/// What libcontainer is not asked to do. It would compile a seccomp filter for each container, and drops that of an exec.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Confinement {
    /// Of the filter whose program is the request's last descriptor. None: there is no filter.
    pub filter_flags: Option<u32>,
    /// Set after the filter, whose loading needs more. None: as the process has them.
    pub capabilities: Option<LinuxCapabilities>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// It has namespaces for infra, and can be asked for that.
    Waiting,
    Made {
        pid: i32,
    },
    NotFound {
        program: String,
    },
    NotExecutable {
        program: String,
    },
    Failed {
        text: String,
    },
}

/// Runs helpers, if the process was started for that, by this name. Its socket is descriptor 0.
pub fn main(name: &str) -> Option<ExitCode> {
    let role: fn(OwnedFd) -> io::Result<ExitCode> = match name {
        parent::NAME => parent::run,
        infra::NAME => |socket| run::for_infra(&socket),
        _ => return None,
    };
    Some(take_socket().and_then(role).unwrap_or_else(|error| {
        eprintln!("hull-agent: a helper failed: {error}");
        ExitCode::FAILURE
    }))
}

/// Descriptor 0 becomes a container's stdin, so the socket moves away from it.
fn take_socket() -> io::Result<OwnedFd> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(socket)
}
