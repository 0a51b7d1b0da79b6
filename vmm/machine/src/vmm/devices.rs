//! The devices of a machine, and how the control thread reaches them.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::process::{Resource, getrlimit};

use super::{BuildError, Descriptors};
use crate::config::{
    BlockConfig, FdIndex, MachineConfig, NetConfig, ShareConfig, TapConfig, TapDescriptors,
};
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, BlockHandle};
use crate::devices::console::Console;
use crate::devices::fs::{FileSystem, FsConfig};
use crate::devices::mem::{Mem, MemHandle};
use crate::devices::net::{Net, NetHandle};
use crate::devices::rng::Rng;
use crate::devices::vsock::{GuestConnections, Vsock, VsockHandle};
use crate::jail::Shares;
use crate::pci::PciRoot;

/// Descriptors that are this process's own, without those of network interfaces: the rest is the guest's files.
const OWN_DESCRIPTORS: u64 = 512;
/// Descriptors that a network interface needs for each of its queue pairs, and then some: events of both queues, the
/// tap, vhost-net, and the thread's own.
const PAIR_DESCRIPTORS: u64 = 24;

/// What the control thread asks of devices with.
#[derive(Debug)]
pub(super) struct Handles {
    pub blocks: Vec<BlockHandle>,
    pub vsock: Option<VsockHandle>,
    pub nets: Vec<NetHandle>,
    pub mem: Option<MemHandle>,
}

/// Puts the devices of a configuration on the bus, always in the same order.
pub(super) fn add_devices(
    mut pci: PciRoot,
    config: &MachineConfig,
    processors: u8,
    descriptors: &mut Descriptors,
    shares: &Shares,
    guest_connections: GuestConnections,
    mem: Option<Mem>,
) -> Result<(PciRoot, Handles), BuildError> {
    pci.add_virtio(Box::new(console(config, descriptors)?))?;
    pci.add_virtio(Box::new(Rng::new()))?;
    let mut handles = Handles {
        blocks: Vec::new(),
        vsock: None,
        nets: Vec::new(),
        mem: None,
    };
    for block in blocks(config, descriptors)? {
        handles.blocks.push(block.handle());
        pci.add_virtio(Box::new(block))?;
    }
    for share in file_systems(config, processors, shares)? {
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
            Net::new(net, processors, tap).map_err(|source| BuildError::Net { index, source })?;
        pci.add_virtio(Box::new(device))?;
        handles.nets.push(handle);
    }
    if config.balloon {
        pci.add_virtio(Box::new(Balloon::new()))?;
    }
    if let Some(mem) = mem {
        handles.mem = Some(mem.handle());
        pci.add_virtio(Box::new(mem))?;
    }
    Ok((pci, handles))
}

pub(super) fn tap_descriptors(
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

fn file_systems(
    config: &MachineConfig,
    processors: u8,
    shares: &Shares,
) -> Result<Vec<FileSystem>, BuildError> {
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
            request_queues: processors.into(),
            guest_descriptors: each,
        })?)
    };
    config.shares.iter().zip(&shares.roots).map(make).collect()
}

fn device_error(device: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Device { device, source }
}
