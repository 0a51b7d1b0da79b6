//! A processor and the clocks of its VM, put aside, and put back into another.
//!
//! The order of the calls matters. When a state is taken, the local APIC may still take in what is pending
//! (`KVM_GET_MP_STATE` and `KVM_GET_LAPIC` do that), so events come last. When it is put back, CPUID decides what the
//! rest may be; the local APIC's base is a system register; and the deadline of its timer is a model-specific one, which
//! the APIC takes only in that mode, and which counts from the time stamp counter.

use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    KVMIO, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_device_attr, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::vm::{KvmError, call};

/// The time stamp counter.
const IA32_TSC: u32 = 0x10;
/// Where the guest wants the wall clock, to be written by the host once for each time that it is set. Who needs it sets it.
const WALL_CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
/// How often the distance of the guest's counter to the host's is taken; the best counts.
const READINGS: usize = 4;
/// Counters of two processors that differ by less are meant to be the same: what differs is how long reading takes. KVM
/// takes writes to them for the same within as much.
const SAME_COUNTER: Duration = Duration::from_secs(1);
/// Parts in a million by which the counters' rates of two boots of a host may differ. It is KVM's own bound.
const RATE_TOLERANCE: u64 = 250;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// A processor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    activity: kvm_mp_state,
    general: kvm_regs,
    system: kvm_sregs,
    extended: Extended,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    local_apic: Box<kvm_lapic_state>,
    model_specific: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    /// What the guest's time stamp counter has more than the host's, modulo 2^64.
    tsc_offset: u64,
}

/// What `xsave` saves. The type that the kernel has for it can't be copied, since it may be longer than it is.
#[derive(Debug, Serialize, Deserialize)]
struct Extended(Box<kvm_xsave>);

impl Clone for Extended {
    fn clone(&self) -> Self {
        Self(Box::new(kvm_xsave {
            region: self.0.region,
            ..Default::default()
        }))
    }
}

/// The time, as the guest is told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, in nanoseconds,
    pub nanoseconds: u64,
    /// when the host's time stamp counter was at this.
    pub host_tsc: u64,
    /// What the guest's processors count at.
    pub tsc_khz: u32,
}

/// All that KVM keeps of a machine, besides its memory and what its devices have asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KvmState {
    pub clock: ClockState,
    /// What the first processor answers to CPUID; what the others do follows from it.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// All that the guest has, whether they run or not.
    pub vcpus: Vec<VcpuState>,
}

impl VcpuState {
    /// Takes the state of a processor that is not running, with those of its model-specific registers that KVM gives.
    ///
    /// # Errors
    /// When a system call fails.
    pub fn take(vcpu: &VcpuFd, model_specific: &[u32]) -> Result<Self, KvmError> {
        let activity = vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        Ok(Self {
            activity,
            general: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            system: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
            extended: Extended(Box::new(vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?)),
            extended_control: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            local_apic: Box::new(vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?),
            tsc_offset: tsc_offset(vcpu)?,
            model_specific: take_model_specific(vcpu, model_specific)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts it back into a processor that has its CPUID and has not run. `since` is what the host's time stamp counter
    /// had more when the state was taken, modulo 2^64.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn put(&self, vcpu: &VcpuFd, since: u64) -> Result<(), KvmError> {
        vcpu.set_mp_state(self.activity)
            .map_err(call("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.general).map_err(call("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.system)
            .map_err(call("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads what a processor has without features that a process must ask for, which this one does
        // not; that is the size of the type.
        unsafe { vcpu.set_xsave(&self.extended.0) }.map_err(call("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.extended_control)
            .map_err(call("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        set_tsc_offset(vcpu, self.tsc_offset.wrapping_add(since))?;
        vcpu.set_lapic(&self.local_apic)
            .map_err(call("KVM_SET_LAPIC"))?;
        put_model_specific(vcpu, &self.model_specific)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    /// Whether it waits for another processor to start it, and so need not be there.
    pub fn is_off(&self) -> bool {
        let off = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED];
        off.contains(&self.activity.mp_state)
    }

    /// Whether all of its model-specific registers are among these.
    pub fn has_only(&self, model_specific: &[u32]) -> bool {
        let known = |entry: &kvm_msr_entry| model_specific.contains(&entry.index);
        self.model_specific.iter().all(known)
    }

    /// Gives counters that are meant to be the same the same offset.
    pub fn align(states: &mut [Self], tsc_khz: u32) {
        let Some(first) = states.first().map(|state| state.tsc_offset) else {
            return;
        };
        let same = SAME_COUNTER
            .as_secs()
            .saturating_mul(u64::from(tsc_khz) * 1000);
        for state in states {
            let distance = state.tsc_offset.wrapping_sub(first).cast_signed();
            if distance.unsigned_abs() < same {
                state.tsc_offset = first;
            }
        }
    }
}

impl ClockState {
    /// The time of a VM whose processors don't run.
    ///
    /// # Errors
    /// When the system call fails.
    pub fn take(vm: &VmFd, tsc_khz: u32) -> Result<Self, KvmError> {
        let before = host_tsc();
        let clock = vm.get_clock().map_err(call("KVM_GET_CLOCK"))?;
        Ok(Self {
            nanoseconds: clock.clock,
            host_tsc: middle(before, host_tsc()),
            tsc_khz,
        })
    }

    /// Goes on from it, in a VM whose processors have not run, on a host that counts at `tsc_khz`. Returns what the host's
    /// time stamp counter had more when the state was taken, modulo 2^64.
    ///
    /// # Errors
    /// When the host counts at another rate, or the system call fails.
    pub fn put(&self, vm: &VmFd, tsc_khz: u32) -> Result<u64, KvmError> {
        let (was, is) = (u64::from(self.tsc_khz), u64::from(tsc_khz));
        if was.abs_diff(is) * 1_000_000 > was * RATE_TOLERANCE {
            return Err(KvmError::OtherRate {
                was: self.tsc_khz,
                is: tsc_khz,
            });
        }
        let clock = kvm_clock_data {
            clock: self.nanoseconds,
            ..Default::default()
        };
        let before = host_tsc();
        vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))?;
        Ok(self.host_tsc.wrapping_sub(middle(before, host_tsc())))
    }
}

fn host_tsc() -> u64 {
    // SAFETY: every processor with KVM has the instruction, and it touches nothing.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn middle(before: u64, after: u64) -> u64 {
    before.wrapping_add(after.wrapping_sub(before) / 2)
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|source| KvmError::List("model-specific registers", source))
}

fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut counter = msrs(&[kvm_msr_entry {
        index: IA32_TSC,
        ..Default::default()
    }])?;
    let mut best: Option<(u64, u64)> = None;
    for _ in 0..READINGS {
        let before = host_tsc();
        let count = vcpu.get_msrs(&mut counter).map_err(call("KVM_GET_MSRS"))?;
        let after = host_tsc();
        let Some(entry) = counter.as_slice().first().filter(|_| count == 1) else {
            return Err(KvmError::Lacks("the time stamp counter"));
        };
        let took = after.wrapping_sub(before);
        if best.is_none_or(|(least, _)| took < least) {
            best = Some((took, entry.data.wrapping_sub(middle(before, after))));
        }
    }
    Ok(best.map_or(0, |(_, offset)| offset))
}

fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), KvmError> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw const offset).expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: the call reads the attribute and the 64 bits that it points to, both of which outlive it.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } == 0 {
        return Ok(());
    }
    let error = errno::Error::last();
    if error.errno() != libc::ENXIO && error.errno() != libc::ENOTTY {
        return Err(KvmError::Call("KVM_SET_DEVICE_ATTR", error));
    }
    // Linux before 5.16. There KVM may take the counter for one that is to be as it is anyway.
    let counter = kvm_msr_entry {
        index: IA32_TSC,
        data: host_tsc().wrapping_add(offset),
        ..Default::default()
    };
    match vcpu
        .set_msrs(&msrs(&[counter])?)
        .map_err(call("KVM_SET_MSRS"))?
    {
        1 => Ok(()),
        _ => Err(KvmError::Lacks("the time stamp counter")),
    }
}

fn take_model_specific(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let wanted = |index: &&u32| **index != IA32_TSC && !WALL_CLOCKS.contains(index);
    let mut left: Vec<_> = indices
        .iter()
        .filter(wanted)
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut taken = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let mut registers = msrs(&left)?;
        let count = vcpu
            .get_msrs(&mut registers)
            .map_err(call("KVM_GET_MSRS"))?;
        taken.extend(registers.as_slice().iter().take(count));
        // KVM stops at the first that this processor doesn't have after all.
        left.drain(..left.len().min(count.saturating_add(1)));
    }
    Ok(taken)
}

fn put_model_specific(vcpu: &VcpuFd, registers: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut left = registers;
    while !left.is_empty() {
        let count = vcpu.set_msrs(&msrs(left)?).map_err(call("KVM_SET_MSRS"))?;
        let Some((refused, rest)) = left.get(count..).and_then(<[_]>::split_first) else {
            return Ok(());
        };
        // Some can be read and not written, and are zero.
        if refused.data != 0 {
            return Err(KvmError::Register {
                index: refused.index,
                value: refused.data,
            });
        }
        left = rest;
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    fn vcpu(tsc_offset: u64) -> VcpuState {
        VcpuState {
            activity: kvm_mp_state::default(),
            general: kvm_regs::default(),
            system: kvm_sregs::default(),
            extended: Extended(Box::default()),
            extended_control: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            local_apic: Box::default(),
            model_specific: vec![kvm_msr_entry::default(); 3],
            events: kvm_vcpu_events::default(),
            tsc_offset,
        }
    }

    /// A state of two processors that have never run.
    pub fn sample() -> KvmState {
        KvmState {
            clock: ClockState {
                nanoseconds: 1_000_000_000,
                host_tsc: 5,
                tsc_khz: 2_000_000,
            },
            cpuid: vec![kvm_cpuid_entry2::default(); 2],
            vcpus: vec![vcpu(0), vcpu(0)],
        }
    }

    #[test]
    fn counters_that_are_meant_to_be_the_same_become_it() {
        let second = 2_000_000_000;
        let mut states = [0, 1000, u64::MAX - 1000, second + 1, u64::MAX - second].map(vcpu);

        VcpuState::align(&mut states, 2_000_000);

        let offsets = states.map(|state| state.tsc_offset);
        assert_eq!(offsets, [0, 0, 0, second + 1, u64::MAX - second]);
    }

    #[test]
    fn a_processor_that_waits_to_be_started_is_off() {
        let is_off = |activity| {
            let mut state = vcpu(0);
            state.activity.mp_state = activity;
            state.is_off()
        };

        assert_eq!(
            [0, 1, 2, 3, 4].map(is_off),
            [false, true, true, false, false]
        );
    }
}
