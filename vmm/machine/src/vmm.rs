//! The recipe of a machine: from its configuration to the reason why it ended.
//!
//! One thread, the control thread, owns the [`Machine`]:
//!
//! ```text
//! Machine::build   memory, VM, devices, kernel, processors; starts no thread
//! Machine::start   every device thread is ready, the processors run
//! poll             the control channel, and Machine::ended()
//! Machine::wait    joins all threads; why it ended
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Resource, getrlimit};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::boot::{acpi, kernel, pvh, reset};
use crate::config::{
    BlockConfig, FdIndex, MachineConfig, NetConfig, ShareConfig, TapConfig, TapDescriptors,
};
use crate::control::{ConnectRefused, DiskRefused, ExitReason, PlugRefused};
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, BlockHandle};
use crate::devices::console::Console;
use crate::devices::fs::{FileSystem, FsConfig, FsError};
use crate::devices::net::{Net, NetError, NetHandle};
use crate::devices::rng::Rng;
pub use crate::devices::vsock::{Connected, GuestConnections};
use crate::devices::vsock::{Vsock, VsockHandle};
use crate::jail::Shares;
use crate::kvm::cpuid::address_bits;
use crate::kvm::ending::Ending;
use crate::kvm::gate::Gate;
use crate::kvm::interrupts::KvmPlatform;
use crate::kvm::vcpu::{Mmio, Running, Vcpu};
use crate::kvm::vm::{KvmError, Vm};
use crate::layout::{PCI_MMIO64_SIZE, pci_mmio64_start};
use crate::memory::{self, MemoryError};
use crate::pci::{PciError, PciRoot};

/// As many processors as local APIC ids and file system queues are laid out for.
const MAX_VCPUS: u8 = 64;
/// Descriptors that are this process's own, without those of network interfaces: the rest is the guest's files.
const OWN_DESCRIPTORS: u64 = 512;
/// Descriptors that a network interface needs for each of its queue pairs, and then some: events of both queues, the
/// tap, vhost-net, and the thread's own.
const PAIR_DESCRIPTORS: u64 = 24;

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
    ready: Vec<Vcpu>,
    running: Vec<Running>,
}

impl Machine {
    /// Makes the machine in the calling process, inside its jail: nothing but the shares is opened by
    /// path, and no thread is started.
    ///
    /// `guest_connections` hears of each connection that the guest makes to the host.
    ///
    /// # Errors
    /// When the configuration can't be had on this host; says what and why.
    pub fn build(
        config: &MachineConfig,
        mut descriptors: Descriptors,
        shares: Shares,
        guest_connections: GuestConnections,
    ) -> Result<Self, BuildError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(BuildError::Processors(config.vcpus));
        }
        let memory = memory::allocate(config.memory_mib)?;
        let vm = Vm::new(descriptors.take(config.kvm)?, &memory, config.vcpus)?;
        let mmio64_start = place_mmio64(&vm, &memory)?;

        let platform = Arc::new(KvmPlatform::new(Arc::clone(vm.fd())));
        let pci = PciRoot::new(memory.clone(), platform);
        let (pci, handles) =
            add_devices(pci, config, &mut descriptors, &shares, guest_connections)?;

        let entry = load_guest(config, &mut descriptors, &memory, mmio64_start)?;
        Ok(Self {
            ending: Ending::new().map_err(BuildError::Event)?,
            gate: Gate::default(),
            pci: Arc::new(pci),
            vsock: handles.vsock,
            blocks: handles.blocks,
            nets: handles.nets,
            ready: Vcpu::create_all(&vm, config.vcpus, entry)?,
            running: Vec::new(),
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
                .start(mmio, self.ending.clone(), &self.gate)
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

    /// Keeps the processors out of the guest, and returns when they are.
    pub fn pause(&self) {
        self.gate.close();
        self.kick();
        self.gate.wait_empty();
    }

    /// Lets the processors go on.
    pub fn resume(&self) {
        self.gate.open();
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

fn device_error(device: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Device { device, source }
}

/// The 64-bit window follows RAM; the host's processors must be able to address its end.
fn place_mmio64(vm: &Vm, memory: &GuestMemoryMmap) -> Result<u64, KvmError> {
    let start = pci_mmio64_start(memory.last_addr().unchecked_add(1).raw_value());
    let end = start + PCI_MMIO64_SIZE;
    let bits = address_bits(vm.supported_cpuid());
    if end > 1_u64.checked_shl(bits.into()).unwrap_or(u64::MAX) {
        return Err(KvmError::AddressBits { end, bits });
    }
    Ok(start)
}

/// What the control thread asks of devices with.
#[derive(Debug)]
struct Handles {
    blocks: Vec<BlockHandle>,
    vsock: Option<VsockHandle>,
    nets: Vec<NetHandle>,
}

/// Puts the devices of a configuration on the bus, always in the same order.
fn add_devices(
    mut pci: PciRoot,
    config: &MachineConfig,
    descriptors: &mut Descriptors,
    shares: &Shares,
    guest_connections: GuestConnections,
) -> Result<(PciRoot, Handles), BuildError> {
    pci.add_virtio(Box::new(console(config, descriptors)?))?;
    pci.add_virtio(Box::new(Rng::new()))?;
    let mut handles = Handles {
        blocks: Vec::new(),
        vsock: None,
        nets: Vec::new(),
    };
    for block in blocks(config, descriptors)? {
        handles.blocks.push(block.handle());
        pci.add_virtio(Box::new(block))?;
    }
    for share in file_systems(config, shares)? {
        pci.add_virtio(Box::new(share))?;
    }
    if let Some(vsock) = &config.vsock {
        let (device, handle) =
            Vsock::new(vsock.clone(), guest_connections).map_err(device_error("virtio-vsock"))?;
        pci.add_virtio(Box::new(device))?;
        handles.vsock = Some(handle);
    }
    for (index, net) in config.nets.iter().enumerate() {
        let tap = match &net.tap {
            Some(tap) => Some(tap_descriptors(tap, descriptors)?),
            None => None,
        };
        let (device, handle) =
            Net::new(net, config.vcpus, tap).map_err(|source| BuildError::Net { index, source })?;
        pci.add_virtio(Box::new(device))?;
        handles.nets.push(handle);
    }
    if config.balloon {
        pci.add_virtio(Box::new(Balloon::new()))?;
    }
    Ok((pci, handles))
}

fn tap_descriptors(
    tap: &TapConfig,
    descriptors: &mut Descriptors,
) -> Result<TapDescriptors, BuildError> {
    let mut take = |indices: &[FdIndex]| -> Result<Vec<OwnedFd>, BuildError> {
        indices
            .iter()
            .map(|index| descriptors.take(*index))
            .collect()
    };
    Ok(TapDescriptors {
        queues: take(&tap.queues)?,
        vhost: take(&tap.vhost)?,
    })
}

fn console(config: &MachineConfig, descriptors: &mut Descriptors) -> Result<Console, BuildError> {
    let output = descriptors.take(config.console.output)?;
    Console::new(output).map_err(device_error("console"))
}

fn blocks(config: &MachineConfig, descriptors: &mut Descriptors) -> Result<Vec<Block>, BuildError> {
    let mut make = |block: &BlockConfig| {
        let disk = match block.disk {
            Some(index) => Some(descriptors.take(index)?),
            None => None,
        };
        Block::new(disk, &block.id, block.read_only).map_err(device_error("virtio-blk"))
    };
    config.blocks.iter().map(&mut make).collect()
}

/// Descriptors that this process needs for itself, whatever the guest opens.
fn own_descriptors(nets: &[NetConfig]) -> u64 {
    let pairs: u64 = nets.iter().map(|net| u64::from(net.queue_pairs)).sum();
    OWN_DESCRIPTORS + PAIR_DESCRIPTORS * pairs
}

fn file_systems(config: &MachineConfig, shares: &Shares) -> Result<Vec<FileSystem>, BuildError> {
    if config.shares.len() != shares.roots.len() {
        return Err(BuildError::Shares {
            configured: config.shares.len(),
            given: shares.roots.len(),
        });
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let each = limit
        .saturating_sub(own_descriptors(&config.nets))
        .checked_div(shares.roots.len() as u64)
        .unwrap_or(0);
    let make = |(share, path): (&ShareConfig, &PathBuf)| {
        let proc_self_fd = shares
            .proc_self_fd
            .try_clone()
            .map_err(device_error("virtio-fs"))?;
        Ok(FileSystem::new(FsConfig {
            tag: share.tag.clone(),
            root: path.clone(),
            proc_self_fd,
            read_only: share.read_only,
            cache: share.cache,
            request_queues: config.vcpus.into(),
            guest_descriptors: each,
        })?)
    };
    config.shares.iter().zip(&shares.roots).map(make).collect()
}

/// Puts kernel, initramfs and tables into guest memory; the address of the first instruction.
fn load_guest(
    config: &MachineConfig,
    descriptors: &mut Descriptors,
    memory: &GuestMemoryMmap,
    mmio64_start: u64,
) -> Result<GuestAddress, BuildError> {
    let mut kernel_file = File::from(descriptors.take(config.kernel)?);
    let kernel = kernel::load(memory, &mut kernel_file)?;
    let initramfs = match config.initramfs {
        Some(index) => {
            let file = File::from(descriptors.take(index)?);
            Some(pvh::load_initramfs(memory, file, kernel.end)?)
        }
        None => None,
    };
    reset::write(memory).map_err(BuildError::Reset)?;
    let rsdp = acpi::write(memory, config.vcpus, mmio64_start)?;
    pvh::write(memory, &config.cmdline, initramfs, rsdp)?;
    Ok(kernel.entry)
}

#[cfg(test)]
mod tests;
