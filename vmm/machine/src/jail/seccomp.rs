//! The seccomp filters of `hull-vmm`'s threads. A thread has two: that of the nursery, from which all threads come (see
//! [`crate::threads`]), and that of its class.
//!
//! What each allows is in `build/calls.rs`; the build has compiled it.

use seccompiler::{BpfProgram, sock_filter};

use crate::threads::ThreadClass;

/// Bytes of an instruction.
const INSTRUCTION: usize = 8;

/// Whose filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The thread that makes threads.
    Nursery,
    /// A thread of a class.
    Class(ThreadClass),
}

/// The filter of a scope, for [`seccompiler::apply_filter`].
#[must_use]
pub fn program(scope: Scope) -> BpfProgram {
    macro_rules! compiled {
        ($name:literal) => {
            include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".bpf")).as_slice()
        };
    }
    let bytes = match scope {
        Scope::Nursery => compiled!("nursery"),
        Scope::Class(ThreadClass::Vcpu) => compiled!("vcpu"),
        Scope::Class(ThreadClass::Device) => compiled!("device"),
        Scope::Class(ThreadClass::Memory) => compiled!("memory"),
        Scope::Class(ThreadClass::FileSystem) => compiled!("file-system"),
        Scope::Class(ThreadClass::Control) => compiled!("control"),
    };
    let (instructions, _) = bytes.as_chunks::<INSTRUCTION>();
    instructions
        .iter()
        .map(|&[code, code_high, jt, jf, k @ ..]| sock_filter {
            code: u16::from_le_bytes([code, code_high]),
            jt,
            jf,
            k: u32::from_le_bytes(k),
        })
        .collect()
}
