//! A processor: made on the control thread, run on its own.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use kvm_bindings::{KVMIO, kvm_cpuid_entry2, kvm_pre_fault_memory};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Address, GuestAddress};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::cpuid::{self, Processors};
use super::ending::Ending;
use super::gate::{Gate, Pass};
use super::state::{KvmState, VcpuState};
use super::vm::{KvmError, Vm, call};
use super::{ports, registers};
use crate::control::ExitReason;
use crate::memory::GuestRam;
use crate::memory::working_set::Run;
use crate::threads::{self, ThreadClass};

// KVM_PRE_FAULT_MEMORY, Linux 6.11; kvm-ioctls doesn't have it.
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// What a processor finds at addresses without RAM.
pub trait Mmio: Send + Sync + std::fmt::Debug {
    /// Fills `data`, wherever `address` is.
    fn read(&self, address: u64, data: &mut [u8]);
    /// Takes `data`, wherever `address` is.
    fn write(&self, address: u64, data: &[u8]);
}

/// A processor that has not run yet.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    /// See [`Vm::model_specific`].
    model_specific: Arc<[u32]>,
    // Dropped last: the guest runs in it.
    _memory: GuestRam,
}

impl Vcpu {
    /// Makes all processors of a machine; the first is to start at `entry`, the others when it wakes them.
    ///
    /// # Errors
    /// When a system call fails.
    pub fn create_all(vm: &Vm, count: u8, entry: GuestAddress) -> Result<Created, KvmError> {
        let (vcpus, processors) = Self::make(vm, count, count)?;
        let created = Created::new(vm, vcpus, processors)?;
        for vcpu in &created.vcpus {
            vcpu.reset()?;
        }
        if let Some(first) = created.vcpus.first() {
            first.enter_at(entry)?;
        }
        Ok(created)
    }

    /// Makes the first `run` processors of a machine again, and has the guest's clocks go on.
    ///
    /// # Errors
    /// When this host is another than that on which the state was taken, the state is none, or one of the other
    /// processors is needed.
    pub fn restore_all(vm: &Vm, state: &KvmState, run: u8) -> Result<Created, KvmError> {
        let most = state.vcpus.len();
        let (runs, rest) = state
            .vcpus
            .split_at_checked(run.into())
            .filter(|(runs, _)| !runs.is_empty())
            .ok_or(KvmError::TooMany {
                wanted: run,
                has: most,
            })?;
        if let Some(needed) = rest.iter().rposition(|vcpu| !vcpu.is_off()) {
            return Err(KvmError::Runs(runs.len() + needed));
        }
        let known = vm.model_specific();
        if !runs.iter().all(|vcpu| vcpu.has_only(known)) {
            return Err(KvmError::OtherRegisters);
        }
        let count = u8::try_from(most).map_err(|_| KvmError::Processors {
            wanted: u8::MAX,
            max: usize::from(u8::MAX),
        })?;
        let (vcpus, mut processors) = Self::make(vm, count, run)?;
        let since = state.clock.put(vm.fd(), processors.tsc_khz)?;
        // What the guest knows, though the host may have measured it anew.
        processors.tsc_khz = state.clock.tsc_khz;
        let created = Created::new(vm, vcpus, processors)?;
        check_cpuid(&state.cpuid, &created.cpuid)?;
        for (vcpu, state) in created.vcpus.iter().zip(runs) {
            state.put(&vcpu.fd, since)?;
        }
        Ok(created)
    }

    /// Makes the first `run` of `count` processors, as they are before they have their CPUID.
    fn make(vm: &Vm, count: u8, run: u8) -> Result<(Vec<Self>, Processors), KvmError> {
        register_signal_handler(kick_signal(), leave_guest).map_err(call("sigaction"))?;
        let make = |id: u8| {
            let fd = vm.fd().create_vcpu(id.into());
            Ok(Self {
                fd: fd.map_err(call("KVM_CREATE_VCPU"))?,
                id,
                model_specific: Arc::clone(vm.model_specific()),
                _memory: vm.memory().clone(),
            })
        };
        let vcpus: Vec<_> = (0..run).map(make).collect::<Result<_, KvmError>>()?;
        let tsc_khz = match vcpus.first() {
            Some(first) => first.fd.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?,
            None => 0,
        };
        let processors = Processors {
            count,
            tsc_khz,
            deadline_timer: vm.deadline_timer(),
        };
        Ok((vcpus, processors))
    }

    /// Sets the model-specific registers that differ from what KVM sets at reset.
    fn reset(&self) -> Result<(), KvmError> {
        let msrs = registers::model_specific()
            .map_err(|source| KvmError::List("model-specific registers", source))?;
        let set = self.fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
        if set != msrs.as_slice().len() {
            return Err(KvmError::Lacks(
                "a model-specific register of every x86-64 processor",
            ));
        }
        Ok(())
    }

    fn enter_at(&self, entry: GuestAddress) -> Result<(), KvmError> {
        let reset = self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        self.fd
            .set_sregs(&registers::pvh_system(&reset))
            .map_err(call("KVM_SET_SREGS"))?;
        self.fd
            .set_regs(&registers::pvh_general(entry))
            .map_err(call("KVM_SET_REGS"))
    }

    /// Has KVM map memory for the guest before it is accessed. A kernel that can't leaves it to the guest's accesses.
    pub fn map_ahead(&self, runs: &[Run]) {
        for run in runs {
            let mut wanted = kvm_pre_fault_memory {
                gpa: run.guest.raw_value(),
                size: run.size as u64,
                ..Default::default()
            };
            // What is done is taken off; a signal or a change of memory ends a call in the middle.
            while wanted.size > 0 {
                // SAFETY: the kernel reads and writes the structure only, and maps guest RAM as the guest's own
                // accesses would.
                let result =
                    unsafe { ioctl_with_mut_ref(&self.fd, KVM_PRE_FAULT_MEMORY(), &mut wanted) };
                let again = matches!(errno::Error::last().errno(), libc::EINTR | libc::EAGAIN);
                if result < 0 && !again {
                    return;
                }
            }
        }
    }

    /// Runs it on a thread of its own until the machine ends, while the gate is open. Asked at the gate, it tells
    /// `states` its number and its state.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(
        self,
        mmio: Arc<dyn Mmio>,
        ending: Ending,
        gate: &Gate,
        states: States,
    ) -> std::io::Result<Running> {
        let name = format!("vcpu{}", self.id);
        let pass = gate.pass();
        let thread = threads::spawn(ThreadClass::Vcpu, &name, move || {
            self.run(&*mmio, &ending, &pass, &states);
        })?;
        Ok(Running(thread))
    }

    fn run(mut self, mmio: &dyn Mmio, ending: &Ending, pass: &Pass, states: &States) {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        loop {
            // Before looking whether there is a reason to stay out: who has one says so before it kicks.
            self.fd.set_kvm_immediate_exit(0);
            let tell = || {
                let state = VcpuState::take(&self.fd, &self.model_specific);
                // Who asked waits for it.
                drop(states.send((self.id, state)));
            };
            if pass.check(tell) {
                // The guest's watchdogs are to know that it was not their fault. A guest without
                // kvmclock can't be told.
                let _ = self.fd.kvmclock_ctrl();
            }
            if ending.is_over() {
                break;
            }
            if let Some(reason) = step(&mut self.fd, mmio) {
                ending.end(reason);
            }
        }
        IMMEDIATE_EXIT.set(null_mut());
    }
}

/// Where processors tell their states.
pub type States = Sender<(u8, Result<VcpuState, KvmError>)>;

/// The processors of a machine that run, and what they have in common with those that don't.
#[derive(Debug)]
pub struct Created {
    pub vcpus: Vec<Vcpu>,
    /// What their time stamp counters count at.
    pub tsc_khz: u32,
    /// What the first answers to CPUID.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

impl Created {
    /// Gives all of them their CPUID.
    fn new(vm: &Vm, vcpus: Vec<Vcpu>, processors: Processors) -> Result<Self, KvmError> {
        let of = |id| cpuid::of_processor(vm.supported_cpuid(), processors, id);
        for vcpu in &vcpus {
            vcpu.fd
                .set_cpuid2(&of(vcpu.id)?)
                .map_err(call("KVM_SET_CPUID2"))?;
        }
        Ok(Self {
            vcpus,
            tsc_khz: processors.tsc_khz,
            cpuid: of(0)?.as_slice().to_vec(),
        })
    }
}

/// Whether a guest that has seen one can go on with the other.
fn check_cpuid(was: &[kvm_cpuid_entry2], is: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let differs = |entry: &kvm_cpuid_entry2| KvmError::OtherProcessor {
        function: entry.function,
        index: entry.index,
    };
    for (was, is) in was.iter().zip(is) {
        if was != is {
            return Err(differs(was));
        }
    }
    match was.get(is.len()).or(is.get(was.len())) {
        Some(further) => Err(differs(further)),
        None => Ok(()),
    }
}

/// A processor's thread.
#[derive(Debug)]
pub struct Running(JoinHandle<()>);

impl Running {
    /// Makes it leave the guest and see whether the machine has ended or its gate is closed.
    pub fn kick(&self) {
        // The thread may have ended by itself; it is not gone before it is joined.
        let _ = self.0.kill(kick_signal());
    }

    /// Waits for the thread's end.
    pub fn join(self) {
        // A panic aborts the process, so that there is no other way for it to end.
        let _ = self.0.join();
    }
}

fn kick_signal() -> c_int {
    SIGRTMIN()
}

thread_local! {
    /// `kvm_run.immediate_exit` of the processor that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// The signal itself ends a `KVM_RUN` under way. One that comes just before would be lost without the flag.
extern "C" fn leave_guest(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is set by `Vcpu::run` on this very thread, from a mapping that lives until
        // `run` has cleared it again; the kernel reads the byte concurrently, hence the atomic.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
    }
}

/// Runs the guest up to its next exit and serves that; the machine's end, if that is what it means.
fn step(vcpu: &mut VcpuFd, mmio: &dyn Mmio) -> Option<ExitReason> {
    match vcpu.run() {
        Ok(VcpuExit::MmioWrite(address, data)) => mmio.write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => mmio.read(address, data),
        Ok(VcpuExit::IoOut(port, data)) => return ports::write(port, data),
        Ok(VcpuExit::IoIn(port, data)) => ports::read(port, data),
        // Kicked, or woken while it waits to be started.
        Ok(VcpuExit::Intr) => {}
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
        Ok(VcpuExit::Shutdown) => return Some(ExitReason::TripleFault),
        Ok(VcpuExit::InternalError) => return Some(internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Some(failed(format!(
                "the host's processor {cpu} refused to run the guest: hardware reason {reason:#x}"
            )));
        }
        Ok(exit) => return Some(failed(format!("KVM left the guest unexpectedly: {exit:?}"))),
        Err(error) if error.errno() == libc::EFAULT => {
            return Some(failed(
                "the guest's memory can't be reached, as when the file of its memory is shorter than it was"
                    .to_owned(),
            ));
        }
        Err(error) => return Some(failed(format!("KVM_RUN failed: {error}"))),
    }
    None
}

fn internal_error(vcpu: &mut VcpuFd) -> ExitReason {
    // SAFETY: KVM has just left with KVM_EXIT_INTERNAL_ERROR, whose part of the union this is.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
    let data = internal.data.get(..count).unwrap_or(&internal.data);
    let at = vcpu.get_regs().map(|registers| registers.rip);
    failed(format!(
        "KVM could not go on with the guest: suberror {}, data {data:x?}, at {at:x?}",
        internal.suberror
    ))
}

fn failed(detail: String) -> ExitReason {
    ExitReason::Failed(detail)
}
