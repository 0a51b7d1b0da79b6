//! Why a machine does not run, or does not do what it is asked.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use crate::channel::ChannelError;
use crate::control::{
    ConnectRefused, DiskRefused, ExitReason, MemoryRefused, PlugRefused, SnapshotRefused,
};

/// Why a machine does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("making the control socket of hull-vmm")]
    Control(#[source] io::Error),
    #[error("starting {binary:?}")]
    Start {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("handing the machine over to hull-vmm")]
    Channel(#[from] ChannelError),
    #[error("hull-vmm ended before it was jailed ({0})")]
    Launcher(ExitStatus),
    #[error("hull-vmm said something else than that it is jailed: {0}")]
    Unexpected(String),
    #[error("the machine did not start")]
    Ended(#[source] ExitReason),
}

/// Why there is no connection to the guest.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("port {port} of the guest")]
    Refused {
        port: u32,
        #[source]
        source: ConnectRefused,
    },
    #[error("making a connection to the guest")]
    Socket(#[source] io::Error),
    #[error("asking hull-vmm for a connection")]
    Channel(#[from] ChannelError),
    #[error("the machine has ended")]
    Ended(#[source] ExitReason),
}

/// Why a network interface has no tap.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    #[error("network interface {index}")]
    Refused {
        index: u8,
        #[source]
        source: PlugRefused,
    },
    #[error("handing a tap over to hull-vmm")]
    Channel(#[from] ChannelError),
    #[error("the machine has ended")]
    Ended(#[source] ExitReason),
}

/// Why a disk is not changed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk {index} of the machine")]
    Refused {
        index: u8,
        #[source]
        source: DiskRefused,
    },
    #[error(transparent)]
    Asking(#[from] AskError),
}

/// Why memory is not added, or it is not known how much is.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("changing the machine's memory")]
    Refused(#[source] MemoryRefused),
    #[error(transparent)]
    Asking(#[from] AskError),
}

/// Why a machine is not put aside.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("putting the machine aside")]
    Refused(#[source] SnapshotRefused),
    #[error(transparent)]
    Asking(#[from] AskError),
}

/// Why `hull-vmm` didn't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("asking hull-vmm")]
    Channel(#[from] ChannelError),
    #[error("the machine has ended")]
    Ended(#[source] ExitReason),
}

impl From<AskError> for ConnectError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Channel(error) => Self::Channel(error),
            AskError::Ended(reason) => Self::Ended(reason),
        }
    }
}

impl From<AskError> for PlugError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Channel(error) => Self::Channel(error),
            AskError::Ended(reason) => Self::Ended(reason),
        }
    }
}
