//! The messages between a supervisor and its `hull-vmm`.
//!
//! They travel over one [`crate::channel::Channel`] (a `SOCK_SEQPACKET` pair made before
//! the process starts), JSON by serde, with descriptors attached.

use serde::{Deserialize, Serialize};

use crate::channel::Message;
use crate::config::{MachineConfig, TapConfig};
use crate::steps::Started;

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// The first message, once, with all descriptors that the configuration names.
    Boot(MachineConfig),
    /// Connect to a port in the guest. Attached: one end of a `SOCK_STREAM` pair,
    /// which becomes the connection. Answered by [`Event::Connected`].
    Connect { id: u64, port: u32 },
    /// Bring a network interface up, by its place among [`MachineConfig::nets`].
    /// Attached: the descriptors that `tap` names, by their place in this message. Answered by [`Event::Plugged`].
    PlugNet { id: u64, index: u8, tap: TapConfig },
    /// Put a disk into an empty slot, by its place among [`MachineConfig::blocks`]. Attached: the disk, a regular file
    /// or a block device. Answered by [`Event::DiskChanged`].
    InsertDisk { id: u64, index: u8, read_only: bool },
    /// Take the disk out of a slot; an empty one stays so. Answered by [`Event::DiskChanged`], when nothing is written
    /// to it any more.
    EjectDisk { id: u64, index: u8 },
    /// Have the guest's driver plug or unplug memory until there is this much of it, in MiB. Answered by
    /// [`Event::AddedMemory`], before the driver has done anything.
    ResizeMemory { id: u64, requested_mib: u64 },
    /// Say how much memory has been added. Answered by [`Event::AddedMemory`].
    AskMemory { id: u64 },
    /// Keep the processors out of the guest. Answered by [`Event::Paused`] when they are.
    Pause { id: u64 },
    /// Let them go on. Answered by [`Event::Resumed`].
    Resume { id: u64 },
    /// Pause, have the devices stand still, and put the machine aside ([`crate::snapshot`]). It stays so until it is
    /// resumed or stopped. Attached: the state file and the memory file, empty, open for writing. Answered by
    /// [`Event::SnapshotTaken`].
    Snapshot { id: u64 },
    /// End the machine at once, as a power cut would.
    Stop,
}

impl Message for Request {
    fn descriptors(&self) -> usize {
        match self {
            Self::Boot(config) => config.descriptors(),
            Self::Connect { .. } | Self::InsertDisk { .. } => 1,
            Self::Snapshot { .. } => 2,
            Self::PlugNet { tap, .. } => tap.descriptors(),
            Self::EjectDisk { .. }
            | Self::ResizeMemory { .. }
            | Self::AskMemory { .. }
            | Self::Pause { .. }
            | Self::Resume { .. }
            | Self::Stop => 0,
        }
    }
}

/// From `hull-vmm`.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The first event, once: the jailed process, a child of the supervisor (see
    /// [`crate::jail`]). Attached: its pidfd.
    Jailed { pid: i32 },
    /// The machine is made, and about to run the guest's first instruction.
    Running(Started),
    /// How [`Request::Connect`] went.
    Connected {
        id: u64,
        result: Result<(), ConnectRefused>,
    },
    /// How [`Request::PlugNet`] went.
    Plugged {
        id: u64,
        result: Result<(), PlugRefused>,
    },
    /// How [`Request::InsertDisk`] or [`Request::EjectDisk`] went.
    DiskChanged {
        id: u64,
        result: Result<(), DiskRefused>,
    },
    /// How [`Request::ResizeMemory`] went, or what [`Request::AskMemory`] has found.
    AddedMemory {
        id: u64,
        result: Result<AddedMemory, MemoryRefused>,
    },
    /// No processor is in the guest.
    Paused { id: u64 },
    /// The processors go on.
    Resumed { id: u64 },
    /// How [`Request::Snapshot`] went. The machine is paused in any case.
    SnapshotTaken {
        id: u64,
        result: Result<(), SnapshotRefused>,
    },
    /// The guest connected to `port` of the host. Attached: the stream.
    GuestConnection { port: u32 },
    /// Something is not as it should be, and the machine goes on.
    Warning(String),
    /// The machine has ended; the process exits after this.
    Ended(ExitReason),
}

impl Message for Event {
    fn descriptors(&self) -> usize {
        match self {
            Self::Jailed { .. } | Self::GuestConnection { .. } => 1,
            Self::Running(_)
            | Self::Connected { .. }
            | Self::Plugged { .. }
            | Self::DiskChanged { .. }
            | Self::AddedMemory { .. }
            | Self::Paused { .. }
            | Self::Resumed { .. }
            | Self::SnapshotTaken { .. }
            | Self::Warning(_)
            | Self::Ended(_) => 0,
        }
    }
}

/// Why the guest did not take a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ConnectRefused {
    #[error("nothing listens on that port in the guest")]
    Reset,
    #[error("the guest's vsock driver is not up")]
    NoDriver,
    #[error("the guest did not answer in time")]
    TimedOut,
    #[error("too many connections are open")]
    TooMany,
}

/// Why a tap was not plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum PlugRefused {
    #[error("the machine has no such network interface")]
    NoInterface,
    #[error("the network interface has a tap already")]
    Plugged,
    #[error(
        "the descriptors are not one of a tap, and one or none of vhost-net, for each queue pair"
    )]
    Descriptors,
    #[error("setting the tap up: {}", std::io::Error::from_raw_os_error(*.errno))]
    Tap { errno: i32 },
}

/// Why a disk was not put in or taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum DiskRefused {
    #[error("the machine has no such disk")]
    NoSlot,
    #[error("there is a disk already")]
    Occupied,
    #[error("it is no regular file or block device: {}", std::io::Error::from_raw_os_error(*.errno))]
    Disk { errno: i32 },
}

/// Memory that a machine has beyond what it booted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedMemory {
    /// What was asked for last, in MiB.
    pub requested_mib: u64,
    /// What the guest's driver has plugged, in MiB. It follows what is asked for, but may stay above for ever.
    pub plugged_mib: u64,
}

/// Why no memory is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum MemoryRefused {
    #[error("the machine has no memory device")]
    NoDevice,
    #[error("its memory device can add at most {region_mib} MiB")]
    TooMuch { region_mib: u64 },
    #[error("memory is added in blocks of 2 MiB")]
    Blocks,
}

/// Why a machine was not put aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{0}")]
pub struct SnapshotRefused(pub String);

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ExitReason {
    #[error("the guest powered off")]
    PowerOff,
    #[error("the guest asked for a reset")]
    Reset,
    #[error("the guest kernel panicked")]
    Panic,
    #[error("a processor of the guest triple-faulted")]
    TripleFault,
    #[error("the supervisor stopped the machine")]
    Stopped,
    /// The machine could not be made or could not go on.
    #[error("{0}")]
    Failed(String),
    /// `hull-vmm` was killed before it could say why.
    #[error("hull-vmm was killed by signal {0}")]
    Killed(i32),
    /// `hull-vmm` exited before it could say why.
    #[error("hull-vmm exited with status {0}")]
    Exited(i32),
}
