//! KVM: the VM, its processors, and what they are told about themselves.

pub mod ending;
pub mod interrupts;
