//! A pod's directories and its state on disk.
//!
//! ```text
//! /run/hull/                     (HULL_RUN_DIR)  gone after a reboot, as pods are
//!   names.lock                   held while a pod's name is claimed or a pod is removed
//!   pods/ID/lock                 flock'ed by the supervisor as long as it lives
//!   pods/ID/state.json           [`PodStatus`], replaced atomically
//!   pods/ID/pod.json             the manifest, as it was understood
//!   pods/ID/network.json         see [`crate::networks`]
//!   pods/ID/events.jsonl         see [`crate::events`]
//!   pods/ID/supervisor.sock      see [`crate::client`]
//!   pods/ID/console.log          the end of the guest's console
//!   shims/HASH.sock              see [`crate::metrics`]
//! /var/lib/hull/                 (HULL_DATA_DIR)
//!   images/                      see [`crate::images`]
//!   pods/ID/logs/CONTAINER/N.log see [`crate::logs`]
//!   pods/ID/...                  volumes and root file systems, see [`crate::volumes`]
//! ```
//!
//! Readers need no running process: what is here stays readable when the supervisor is dead.

mod directories;
mod registry;
mod status;

pub use directories::{Directories, PodDir, PodId};
pub(crate) use directories::{open_private, private_dir, replace as replace_file};
pub use registry::{Claim, Liveness, PodRecord, Registry, Release};
pub(crate) use registry::{read_record, remove_tree, write_status};
pub use status::{
    ContainerState, ContainerStatus, NetworkStatus, Phase, PodIp, PodStatus, Running, Terminated,
    Waiting,
};

use std::io;
use std::path::PathBuf;

/// What can go wrong with the state on disk.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is a symbolic link; remove it, state directories must be real", path = .0.display())]
    Symlink(PathBuf),
    #[error("{path} is not a directory", path = .0.display())]
    NotADirectory(PathBuf),
    #[error("{path} belongs to user {owner}, not to the user that runs hull ({euid})", path = path.display())]
    Owner {
        path: PathBuf,
        owner: u32,
        euid: u32,
    },
    #[error("{path} can't be understood", path = path.display())]
    Format {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("a pod named {name:?} is running already (id {id}); stop it first: hull stop {name}")]
    NameTaken { name: String, id: PodId },
    #[error("no pod {0:?}; `hull ps -a` lists those that there are")]
    NoSuchPod(String),
    #[error("{0:?} is the start of several pod ids; give more of it")]
    Ambiguous(String),
    #[error("pod {0:?} is running; stop it first, or force it: hull rm -f {0}")]
    StillRunning(String),
    #[error("giving back what pod {id} has outside of its directories")]
    Release {
        id: PodId,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StateError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io {
            what,
            path: path.into(),
            source: source.into(),
        }
    }
}
