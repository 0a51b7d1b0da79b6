//! The VM: what KVM must be able to do, and what it is asked for.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemoryRegion};
use vmm_sys_util::errno;

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::{GuestRam, whole_pieces};

/// What the machine can't do without. All are in Linux 5.10 and later on x86-64.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::Clocksource, "KVM_CAP_CLOCKSOURCE"),
];

/// Why KVM doesn't give the machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error("the descriptor given as /dev/kvm is not KVM, or of another API version than 12")]
    NotKvm,
    #[error("this host's KVM lacks {0}; Linux 5.10 or later has it")]
    Lacks(&'static str),
    #[error("this host's KVM gives at most {max} processors, not {wanted}")]
    Processors { wanted: u8, max: usize },
    #[error(
        "the machine's memory and devices end at {end:#x}, past the {bits} address bits of this host's processors"
    )]
    AddressBits { end: u64, bits: u8 },
    #[error(
        "the snapshot was made on another processor, or with another kernel on the host: \
         CPUID leaf {function:#x}, index {index} is not what it was"
    )]
    OtherProcessor { function: u32, index: u32 },
    #[error(
        "the snapshot was made on a host whose processors count at {was} kHz, those of this one do at {is} kHz"
    )]
    OtherRate { was: u32, is: u32 },
    #[error("the snapshot has model-specific registers that KVM doesn't have here")]
    OtherRegisters,
    #[error(
        "KVM refuses the value {value:#x} of the snapshot's model-specific register {index:#x}"
    )]
    Register { index: u32, value: u64 },
    #[error(
        "processor {0} of the snapshot runs: a machine made of it needs all processors up to that one"
    )]
    Runs(usize),
    #[error("the snapshot has {has} processors, {wanted} can't run")]
    TooMany { wanted: u8, has: usize },
    #[error("making the list of {0}")]
    List(&'static str, #[source] vmm_sys_util::fam::Error),
    /// A system call.
    #[error("{0}")]
    Call(&'static str, #[source] errno::Error),
}

/// Names a system call in its error.
pub(super) fn call(name: &'static str) -> impl FnOnce(errno::Error) -> KvmError {
    move |source| KvmError::Call(name, source)
}

/// A VM with its memory, before it has processors.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    /// What a processor of this host can do in a guest.
    cpuid: CpuId,
    /// Those that KVM saves.
    model_specific: Arc<[u32]>,
    deadline_timer: bool,
    memory: GuestRam,
    slots: u32,
}

impl Vm {
    /// Makes a VM out of `/dev/kvm`, with all of `memory`, interrupts by message only.
    ///
    /// # Errors
    /// When this KVM isn't good enough, or refuses.
    pub fn new(kvm: OwnedFd, memory: &GuestRam, vcpus: u8) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and given away; what is not KVM answers no call below.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        check(&kvm, vcpus)?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let model_specific = kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;

        // Interrupts come as messages to the local APICs. There are no other controllers: a guest
        // can't attack what isn't there.
        fd.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [0; 4],
            ..Default::default()
        })
        .map_err(call("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))?;
        disable_performance_counters(&fd)?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(usize::try_from(KVM_TSS).unwrap_or(usize::MAX))
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        let mut slots = 0;
        for region in whole_pieces(memory) {
            add_memory(&fd, slots, region)?;
            slots += 1;
        }

        Ok(Self {
            fd: Arc::new(fd),
            deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
            cpuid,
            model_specific: model_specific.as_slice().into(),
            memory: memory.clone(),
            slots,
        })
    }

    /// For interrupts and notifications, which devices set up themselves.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The guest's RAM. KVM accesses it as long as a processor runs.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// How many memory slots the RAM takes, from slot 0 on.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// What this host's processors can do in a guest, before it is made one processor's.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The model-specific registers that a processor's state has, as far as the processor has them.
    pub fn model_specific(&self) -> &Arc<[u32]> {
        &self.model_specific
    }

    /// Whether KVM emulates the local APIC's TSC deadline mode, which its CPUID doesn't tell.
    pub fn deadline_timer(&self) -> bool {
        self.deadline_timer
    }
}

fn check(kvm: &Kvm, vcpus: u8) -> Result<(), KvmError> {
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        return Err(KvmError::NotKvm);
    }
    for (capability, name) in REQUIRED {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Lacks(name));
        }
    }
    let max = kvm.get_max_vcpus();
    if usize::from(vcpus) > max {
        return Err(KvmError::Processors { wanted: vcpus, max });
    }
    Ok(())
}

/// Counters of the host's hardware tell a guest about its neighbours. Hosts before 5.18 can't turn
/// them off; there, CPUID alone hides them.
fn disable_performance_counters(fd: &VmFd) -> Result<(), KvmError> {
    let supported = fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(supported).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    fd.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [u64::from(KVM_PMU_CAP_DISABLE), 0, 0, 0],
        ..Default::default()
    })
    .map_err(call("KVM_ENABLE_CAP(KVM_CAP_PMU_CAPABILITY)"))
}

fn add_memory(fd: &VmFd, slot: u32, region: &impl GuestMemoryRegion) -> Result<(), KvmError> {
    let start = region.start_addr();
    let address = region
        .get_host_address(vm_memory::MemoryRegionAddress(0))
        .map_err(|_| {
            KvmError::Call(
                "KVM_SET_USER_MEMORY_REGION",
                errno::Error::new(libc::EFAULT),
            )
        })?;
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: start.raw_value(),
        memory_size: region.len(),
        userspace_addr: address as u64,
    };
    // SAFETY: the range is one mapping, to which the VM and each of its processors keep a
    // reference; what the guest does there is accessed as volatile memory only.
    unsafe { fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
}
