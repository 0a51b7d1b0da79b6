//! Memory that comes to a machine which runs.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestAddress};

use crate::devices::mem::Slots;

/// The slots of a VM that its RAM has left.
#[derive(Debug)]
pub struct KvmSlots {
    vm: Arc<VmFd>,
    next: u32,
}

impl KvmSlots {
    /// The first `taken` slots are in use.
    pub fn new(vm: Arc<VmFd>, taken: u32) -> Self {
        Self { vm, next: taken }
    }
}

impl Slots for KvmSlots {
    fn add(&mut self, start: GuestAddress, size: u64, host: usize) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.next,
            flags: 0,
            guest_phys_addr: start.raw_value(),
            memory_size: size,
            userspace_addr: host as u64,
        };
        // SAFETY: the addresses are this process's for good and lie in guest memory, which is accessed as
        // volatile memory only.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        self.next += 1;
        Ok(())
    }
}
