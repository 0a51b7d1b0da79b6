//! The virtual machine: KVM, memory, boot, PCI, virtio devices, and the process they run in.
//!
//! A supervisor uses [`client`]; everything else runs in `hull-vmm`. Nothing here knows of pods.

pub mod boot;
pub mod channel;
pub mod client;
pub mod config;
pub mod control;
pub mod devices;
pub mod jail;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod pci;
pub mod snapshot;
pub mod steps;
pub mod threads;
pub mod virtio;
pub mod vmm;
pub mod warnings;
