//! A machine put aside in two files, to go on from there, any number of times.
//!
//! ```text
//! format.rs    the state file: header, checksum, and a bounded body
//! memory.rs    the memory file: the pieces of RAM one after the other, with holes for pages of zeroes
//! ```
//!
//! A state is taken while the processors are out of the guest and the devices stand still. A machine that is made of it
//! maps the memory file copy-on-write, and is otherwise built as any machine is: its devices have backends of its
//! own, and what the state says of them is put into their registers and queues by the same checks that a driver's
//! writes meet. Whoever has written the state may be another tenant's guest that owned its `hull-vmm`, so it is read
//! in the jail, and trusted no more than a guest is.
//!
//! The content of the memory file is not looked at, so nothing here notices when it is another than it was: that is for
//! the owner of the files to see to. Its length is checked.

pub mod format;
pub mod memory;

use std::io;

use serde::{Deserialize, Serialize};

use crate::kvm::state::KvmState;
use crate::kvm::vm::KvmError;
use crate::pci::{BusState, SuspendError};

/// All of a machine but its memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    pub memory_mib: u64,
    /// Addresses of its memory device, of which nothing is plugged.
    pub memory_device_mib: u64,
    pub kvm: KvmState,
    pub bus: BusState,
}

/// Why a machine was not put aside.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("the machine has ended")]
    Ended,
    #[error(transparent)]
    Device(#[from] SuspendError),
    #[error(
        "{0} MiB of memory have been added to the machine while it ran, which a snapshot can't have"
    )]
    AddedMemory(u64),
    #[error("taking the state of a processor")]
    Processor(#[source] KvmError),
    #[error("taking the time")]
    Clock(#[source] KvmError),
    #[error("writing the memory file")]
    Memory(#[source] io::Error),
    #[error("writing the state file")]
    State(#[from] format::WriteError),
}
