//! KVM: the VM, its processors, and what they are told about themselves.

pub mod cpuid;
pub mod ending;
pub mod gate;
pub mod interrupts;
pub mod ports;
pub mod registers;
pub mod slots;
pub mod state;
pub mod vcpu;
pub mod vm;
