//! The virtual machine and its processors, as KVM has them.
