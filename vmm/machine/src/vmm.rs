//! The recipe of a machine: from its configuration to the reason why it ended.
//!
//! One thread, the control thread, owns the [`Machine`]:
//!
//! ```text
//! Machine::build   memory, VM, devices, kernel, processors; starts no thread, but for the devices of a snapshot
//! Machine::start   every device thread is ready, the processors run
//! poll             the control channel, and Machine::ended()
//! Machine::wait    joins all threads; why it ended
//! ```

mod devices;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestAddress, GuestMemory};

use crate::boot::{acpi, kernel, pvh, reset};
use crate::config::{BootConfig, FdIndex, MachineConfig, Start, TapConfig};
use crate::control::{
    AddedMemory, ConnectRefused, DiskRefused, ExitReason, MemoryRefused, PlugRefused,
};
use crate::devices::block::BlockHandle;
use crate::devices::fs::FsError;
use crate::devices::mem::{Mem, MemHandle};
use crate::devices::net::{NetError, NetHandle};
use crate::devices::vsock::VsockHandle;
pub use crate::devices::vsock::{Connected, GuestConnections};
use crate::jail::Shares;
use crate::kvm::cpuid::address_bits;
use crate::kvm::ending::Ending;
use crate::kvm::gate::Gate;
use crate::kvm::interrupts::KvmPlatform;
use crate::kvm::slots::KvmSlots;
use crate::kvm::state::{ClockState, KvmState, VcpuState};
use crate::kvm::vcpu::{Created, Mmio, Running, States, Vcpu};
use crate::kvm::vm::{KvmError, Vm};
use crate::layout::{PCI_MMIO64_SIZE, pci_mmio64_start};
use crate::memory::working_set::{self, Accesses};
use crate::memory::{self, GuestRam, MemoryError, watch};
use crate::pci::{PciError, PciRoot, RestoreBusError};
use crate::snapshot::format::ReadError;
use crate::snapshot::{self, MachineState, SnapshotError};
use crate::steps::Steps;
use devices::{add_devices, tap_descriptors};

/// As many processors as local APIC ids and file system queues are laid out for.
const MAX_VCPUS: u8 = 64;
/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the configuration names descriptor {0}, which did not come with it or is used twice")]
    Descriptor(u16),
    #[error("a machine has 1 to {MAX_VCPUS} processors, not {0}")]
    Processors(u8),
    #[error("the configuration has {configured} shares, but {given} directories were given")]
    Shares { configured: usize, given: usize },
    #[error("creating the machine's event descriptor")]
    Event(#[source] io::Error),
    #[error("making guest memory")]
    Memory(#[from] MemoryError),
    #[error("making the virtual machine")]
    Kvm(#[from] KvmError),
    #[error("placing a device on the PCI bus")]
    Pci(#[from] PciError),
    #[error("making the virtio-fs device")]
    FileSystem(#[from] FsError),
    #[error("making network interface {index}")]
    Net { index: usize, source: NetError },
    #[error("making the {device} device")]
    Device {
        device: &'static str,
        source: io::Error,
    },
    #[error("booting the kernel")]
    Kernel(#[from] kernel::KernelError),
    #[error("preparing the kernel's boot")]
    Pvh(#[from] pvh::PvhError),
    #[error("writing the reset code to guest memory")]
    Reset(#[source] vm_memory::GuestMemoryError),
    #[error("describing the machine to the kernel")]
    Acpi(#[from] acpi::AcpiError),
    #[error("reading the snapshot")]
    Snapshot(#[from] ReadError),
    #[error(
        "the snapshot is of a machine whose memory device has {expected} MiB of addresses, not {found} MiB"
    )]
    MemoryDevice { expected: u64, found: u64 },
    #[error("the snapshot is of another machine")]
    Bus(#[from] RestoreBusError),
}

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
#[error("starting a processor's thread")]
pub struct StartError(#[source] io::Error);

/// The descriptors that came with a configuration, each to be taken once.
#[derive(Debug)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    pub fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    /// Takes one out.
    ///
    /// # Errors
    /// When there is none at that place, or no longer.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, BuildError> {
        self.0
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(BuildError::Descriptor(index.0))
    }

    /// Those that nobody has taken yet.
    pub fn remaining(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().flatten().map(AsFd::as_fd)
    }
}

/// A virtual machine, built and not yet ended.
#[derive(Debug)]
pub struct Machine {
    ending: Ending,
    gate: Gate,
    pci: Arc<PciRoot>,
    vsock: Option<VsockHandle>,
    blocks: Vec<BlockHandle>,
    nets: Vec<NetHandle>,
    mem: Option<MemHandle>,
    ready: Vec<Vcpu>,
    running: Vec<Running>,
    aside: Aside,
    /// Memory is watched as long as this is open.
    _watch: Option<OwnedFd>,
}

/// What the machine is put aside with.
#[derive(Debug)]
struct Aside {
    vm: Arc<VmFd>,
    memory: GuestRam,
    memory_mib: u64,
    memory_device_mib: u64,
    tsc_khz: u32,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Processors that the guest has and that don't run.
    off: Vec<VcpuState>,
    /// The running ones tell their states here.
    states: (States, mpsc::Receiver<ProcessorState>),
    /// The devices stand still.
    suspended: bool,
}

/// A processor's number and its state.
type ProcessorState = (u8, Result<VcpuState, KvmError>);

impl Machine {
    /// Makes the machine in the calling process, inside its jail: nothing but the shares is opened by
    /// path, and no thread is started, but those of devices that a snapshot has at work.
    ///
    /// `guest_connections` hears of each connection that the guest makes to the host, `steps` of what has been made.
    ///
    /// # Errors
    /// When the configuration can't be had on this host; says what and why.
    pub fn build(
        config: &MachineConfig,
        mut descriptors: Descriptors,
        shares: Shares,
        guest_connections: GuestConnections,
        steps: &mut Steps,
    ) -> Result<Self, BuildError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(BuildError::Processors(config.vcpus));
        }
        let (ram, mut state) = load_memory(config, &mut descriptors)?;
        let to_be_seen = matches!(
            config.start,
            Start::Snapshot {
                accesses: Accesses::ToBeSeen,
                ..
            }
        );
        // On a host that can't, less will be known.
        let watch = to_be_seen.then(|| watch::one_page_at_a_time(&ram).ok());
        let (memory, managed) = match config.memory_device_mib {
            0 => (ram, None),
            mib => {
                let (memory, managed) = memory::with_managed(&ram, mib)?;
                (memory, Some(managed))
            }
        };
        steps.end("memory");
        let processors = match &state {
            Some(state) => processors(state)?,
            None => config.vcpus,
        };
        let vm = Vm::new(descriptors.take(config.kvm)?, &memory, processors)?;
        let mmio64_start = place_mmio64(&vm, &memory)?;
        steps.end("virtual machine");

        let mem = managed.map(|managed| {
            let slots = KvmSlots::new(Arc::clone(vm.fd()), vm.slots());
            Mem::new(managed, Box::new(slots))
        });
        let platform = Arc::new(KvmPlatform::new(Arc::clone(vm.fd())));
        let pci = PciRoot::new(memory.clone(), platform);
        let (pci, handles) = add_devices(
            pci,
            config,
            processors,
            &mut descriptors,
            &shares,
            guest_connections,
            mem,
        )?;
        steps.end("devices");

        let created = match (&config.start, &state) {
            (_, Some(state)) => Vcpu::restore_all(&vm, &state.kvm, config.vcpus)?,
            (Start::Boot(boot), None) => {
                let entry = load_guest(boot, processors, &mut descriptors, &memory, mmio64_start)?;
                steps.end("kernel and initramfs");
                Vcpu::create_all(&vm, processors, entry)?
            }
            (Start::Snapshot { .. }, None) => return Err(BuildError::Snapshot(ReadError::Magic)),
        };
        let Created {
            vcpus,
            tsc_khz,
            cpuid,
        } = created;
        steps.end("processors");
        if let Start::Snapshot {
            accesses: Accesses::Known(known),
            ..
        } = &config.start
            && let Some(first) = vcpus.first()
        {
            let runs = working_set::runs(&memory, &known.written);
            working_set::copy(&runs);
            first.map_ahead(&runs);
            steps.end("pages to be written");
            let runs = working_set::runs(&memory, &known.read);
            working_set::map(&runs);
            first.map_ahead(&runs);
            steps.end("pages to be read");
        }
        let mut off = Vec::new();
        let mut memory_mib = config.memory_mib;
        if let Some(state) = state.take() {
            memory_mib = state.memory_mib;
            off.extend(state.kvm.vcpus.into_iter().skip(vcpus.len()));
            pci.restore(state.bus)?;
            steps.end("devices' state");
        }
        Ok(Self {
            ending: Ending::new().map_err(BuildError::Event)?,
            gate: Gate::default(),
            pci: Arc::new(pci),
            vsock: handles.vsock,
            blocks: handles.blocks,
            nets: handles.nets,
            mem: handles.mem,
            ready: vcpus,
            running: Vec::new(),
            aside: Aside {
                vm: Arc::clone(vm.fd()),
                memory,
                memory_mib,
                memory_device_mib: config.memory_device_mib,
                tsc_khz,
                cpuid,
                off,
                states: mpsc::channel(),
                suspended: false,
            },
            _watch: watch.flatten(),
        })
    }

    /// Runs the guest. Returns at once.
    ///
    /// # Errors
    /// When a thread can't be made. The machine has ended then.
    pub fn start(&mut self) -> Result<(), StartError> {
        for vcpu in self.ready.drain(..) {
            let mmio = Arc::clone(&self.pci) as Arc<dyn Mmio>;
            let running = vcpu
                .start(
                    mmio,
                    self.ending.clone(),
                    &self.gate,
                    self.aside.states.0.clone(),
                )
                .map_err(|error| {
                    self.ending
                        .end(ExitReason::Failed(format!("starting a processor: {error}")));
                    StartError(error)
                })?;
            self.running.push(running);
        }
        Ok(())
    }

    /// Connects `stream` to a port in the guest; `connected` hears how it went.
    pub fn connect(&self, port: u32, stream: UnixStream, connected: Connected) {
        match &self.vsock {
            Some(vsock) => vsock.connect(port, stream, connected),
            None => connected(Err(ConnectRefused::NoDriver)),
        }
    }

    /// Brings a network interface up with a tap, by its place in the configuration. The descriptors are those that
    /// came with the request.
    ///
    /// # Errors
    /// When there is no such interface, it has a tap, or the descriptors are not what it needs.
    pub fn plug_net(
        &self,
        index: u8,
        tap: &TapConfig,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), PlugRefused> {
        let net = self
            .nets
            .get(usize::from(index))
            .ok_or(PlugRefused::NoInterface)?;
        let mut descriptors = Descriptors::new(descriptors);
        let tap = tap_descriptors(tap, &mut descriptors).map_err(|_| PlugRefused::Descriptors)?;
        net.plug(tap)
    }

    /// Puts a disk into a slot, by its place in the configuration.
    ///
    /// # Errors
    /// When there is no such slot, it has a disk, or the descriptor is none of a disk.
    pub fn insert_disk(
        &self,
        index: u8,
        disk: OwnedFd,
        read_only: bool,
    ) -> Result<(), DiskRefused> {
        self.block(index)?.insert(disk, read_only)
    }

    /// Takes the disk out of a slot, and returns when nothing is written to it any more.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn eject_disk(&self, index: u8) -> Result<(), DiskRefused> {
        self.block(index)?.eject();
        Ok(())
    }

    fn block(&self, index: u8) -> Result<&BlockHandle, DiskRefused> {
        self.blocks
            .get(usize::from(index))
            .ok_or(DiskRefused::NoSlot)
    }

    /// Has the guest's driver add or give back memory, in MiB; what there is now.
    ///
    /// # Errors
    /// When there is no device for it, or it has no addresses for as much.
    pub fn resize_memory(&self, requested_mib: u64) -> Result<AddedMemory, MemoryRefused> {
        let mem = self.mem.as_ref().ok_or(MemoryRefused::NoDevice)?;
        mem.resize(requested_mib)?;
        Ok(mem.added())
    }

    /// How much memory the guest has added.
    ///
    /// # Errors
    /// When there is no device for it.
    pub fn added_memory(&self) -> Result<AddedMemory, MemoryRefused> {
        let mem = self.mem.as_ref().ok_or(MemoryRefused::NoDevice)?;
        Ok(mem.added())
    }

    /// Keeps the processors out of the guest, and returns when they are.
    pub fn pause(&self) {
        self.gate.close();
        self.kick();
        self.gate.wait_empty();
    }

    /// Lets the processors go on, and the devices, if they stand still.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.aside.suspended) {
            self.pci.resume();
        }
        self.gate.open();
    }

    /// Puts the machine aside: pauses it, has the devices stand still, and writes its memory and its state to two empty
    /// files. It stays so until it is resumed.
    ///
    /// # Errors
    /// When it has ended, a device or KVM can't do it, or the files can't be written.
    pub fn snapshot(&mut self, state: OwnedFd, memory: OwnedFd) -> Result<(), SnapshotError> {
        self.pause();
        if self.ending.is_over() {
            return Err(SnapshotError::Ended);
        }
        self.aside.suspended = true;
        let bus = self.pci.suspend()?;
        // Now that the driver's last request is answered.
        let plugged_mib = self.mem.as_ref().map_or(0, |mem| mem.added().plugged_mib);
        if plugged_mib > 0 {
            return Err(SnapshotError::AddedMemory(plugged_mib));
        }
        let kvm = self.kvm_state()?;
        snapshot::memory::write(memory, &self.aside.memory).map_err(SnapshotError::Memory)?;
        let machine = MachineState {
            memory_mib: self.aside.memory_mib,
            memory_device_mib: self.aside.memory_device_mib,
            kvm,
            bus,
        };
        Ok(snapshot::format::write(state, &machine)?)
    }

    /// What KVM has of the machine. The processors are at the gate.
    fn kvm_state(&self) -> Result<KvmState, SnapshotError> {
        let aside = &self.aside;
        self.gate.ask();
        let mut told: Vec<_> = aside.states.1.iter().take(self.running.len()).collect();
        told.sort_unstable_by_key(|(number, _)| *number);
        let mut vcpus = told
            .into_iter()
            .map(|(_, state)| state)
            .collect::<Result<Vec<_>, _>>()
            .map_err(SnapshotError::Processor)?;
        vcpus.extend(aside.off.iter().cloned());
        VcpuState::align(&mut vcpus, aside.tsc_khz);
        Ok(KvmState {
            clock: ClockState::take(&aside.vm, aside.tsc_khz).map_err(SnapshotError::Clock)?,
            cpuid: aside.cpuid.clone(),
            vcpus,
        })
    }

    fn kick(&self) {
        for vcpu in &self.running {
            vcpu.kick();
        }
    }

    /// Ends the machine as a power cut would. Returns at once.
    pub fn stop(&self) {
        self.ending.end(ExitReason::Stopped);
    }

    /// Readable from the moment when the machine has ended, for whatever reason.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ending.as_fd()
    }

    /// Waits for the machine's end, then ends all its threads, the devices' last: what the guest has
    /// written before it powered off is written.
    pub fn wait(self) -> ExitReason {
        let reason = self.ending.wait();
        self.gate.open();
        self.kick();
        for vcpu in self.running {
            vcpu.join();
        }
        self.pci.stop();
        reason
    }
}

/// All that a processor's thread sees besides RAM is the PCI bus.
impl Mmio for PciRoot {
    fn read(&self, address: u64, data: &mut [u8]) {
        self.mmio_read(address, data);
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.mmio_write(address, data);
    }
}

/// The 64-bit window follows RAM; the host's processors must be able to address its end.
fn place_mmio64(vm: &Vm, memory: &GuestRam) -> Result<u64, KvmError> {
    let start = pci_mmio64_start(memory.last_addr().unchecked_add(1).raw_value());
    let end = start + PCI_MMIO64_SIZE;
    let bits = address_bits(vm.supported_cpuid());
    if end > 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX) {
        return Err(KvmError::AddressBits { end, bits });
    }
    Ok(start)
}

/// The guest's memory, and where it goes on if it is a snapshot's.
fn load_memory(
    config: &MachineConfig,
    descriptors: &mut Descriptors,
) -> Result<(GuestRam, Option<MachineState>), BuildError> {
    match config.start {
        Start::Boot(ref boot) => {
            let ram = memory::allocate(config.memory_mib)?;
            if boot.huge_pages {
                memory::ask_for_huge_pages(&ram);
            }
            Ok((ram, None))
        }
        Start::Snapshot { state, memory, .. } => {
            let state = snapshot::format::read(descriptors.take(state)?.as_fd())?;
            let file = descriptors.take(memory)?;
            if state.memory_device_mib != config.memory_device_mib {
                return Err(BuildError::MemoryDevice {
                    expected: state.memory_device_mib,
                    found: config.memory_device_mib,
                });
            }
            let memory = memory::from_file(state.memory_mib, file.as_fd())?;
            Ok((memory, Some(state)))
        }
    }
}

/// How many processors the guest of a snapshot knows.
fn processors(state: &MachineState) -> Result<u8, BuildError> {
    u8::try_from(state.kvm.vcpus.len())
        .ok()
        .filter(|count| (1..=MAX_VCPUS).contains(count))
        .ok_or(BuildError::Processors(u8::MAX))
}

/// Puts kernel, initramfs and tables into guest memory; the address of the first instruction.
fn load_guest(
    boot: &BootConfig,
    processors: u8,
    descriptors: &mut Descriptors,
    memory: &GuestRam,
    mmio64_start: u64,
) -> Result<GuestAddress, BuildError> {
    let mut kernel_file = File::from(descriptors.take(boot.kernel)?);
    let kernel = kernel::load(memory, &mut kernel_file)?;
    let initramfs = match boot.initramfs {
        Some(index) => {
            let file = File::from(descriptors.take(index)?);
            Some(pvh::load_initramfs(memory, file, kernel.end)?)
        }
        None => None,
    };
    reset::write(memory).map_err(BuildError::Reset)?;
    let rsdp = acpi::write(memory, processors, mmio64_start)?;
    pvh::write(memory, &boot.cmdline, initramfs, rsdp)?;
    Ok(kernel.entry)
}

#[cfg(test)]
mod tests;
