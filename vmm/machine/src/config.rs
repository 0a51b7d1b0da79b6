//! What a machine is made of, as the supervisor tells `hull-vmm`.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::memory::working_set::Accesses;

/// Position of a descriptor among those sent with the configuration message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub u16);

/// A machine, whole and before its first instruction. No device is added later: a tap or a disk comes
/// into one that is here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Virtual processors, 1 to 64. Of a snapshot's: how many of its processors run.
    pub vcpus: u8,
    /// Guest memory in MiB, 64 to 1 TiB. A snapshot's is what it was.
    pub memory_mib: u64,
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: FdIndex,
    pub start: Start,
    pub console: ConsoleConfig,
    pub shares: Vec<ShareConfig>,
    pub blocks: Vec<BlockConfig>,
    pub vsock: Option<VsockConfig>,
    pub nets: Vec<NetConfig>,
    /// Addresses for memory that comes while the machine runs, in MiB: a multiple of 128, up to 1 TiB
    /// ([`crate::devices::mem`]). 0: there is no such device. A snapshot's must be what it was.
    pub memory_device_mib: u64,
    /// Whether pages that the guest has freed go back to the host ([`crate::devices::balloon`]).
    pub balloon: bool,
}

impl MachineConfig {
    /// How many descriptors the configuration names.
    pub fn descriptors(&self) -> usize {
        let taps = self.nets.iter().filter_map(|net| net.tap.as_ref());
        // /dev/kvm and the console's output.
        2 + self.start.descriptors()
            + self.shares.len()
            + self
                .blocks
                .iter()
                .filter(|block| block.disk.is_some())
                .count()
            + taps.map(TapConfig::descriptors).sum::<usize>()
    }
}

/// Where the machine begins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Start {
    /// With a kernel's first instruction.
    Boot(BootConfig),
    /// Where a snapshot was taken ([`crate::snapshot`]). The devices must be of the same kinds, in the same number; what
    /// is behind them may be another.
    Snapshot {
        /// The two files, open for reading. They may be shared with other machines.
        state: FdIndex,
        memory: FdIndex,
        /// Pages of the memory file that the guest will soon access, as far as that is known: of each kind, at most
        /// [`MAX_RANGES`](crate::memory::working_set::MAX_RANGES) and
        /// [`MAX_PAGES`](crate::memory::working_set::MAX_PAGES) count.
        accesses: Accesses,
    },
}

/// What a machine boots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BootConfig {
    /// An ELF kernel with a PVH note (see [`crate::boot::kernel`]).
    pub kernel: FdIndex,
    /// The initial RAM file system, in any form that the kernel unpacks.
    pub initramfs: Option<FdIndex>,
    /// The kernel's command line, at most 2047 bytes of ASCII.
    pub cmdline: String,
    /// Whether guest memory is asked for in huge pages.
    pub huge_pages: bool,
}

impl Start {
    fn descriptors(&self) -> usize {
        match self {
            Self::Boot(boot) => 1 + usize::from(boot.initramfs.is_some()),
            Self::Snapshot { .. } => 2,
        }
    }
}

/// The guest's `hvc0`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// Where output goes: a pipe, written without blocking; what doesn't fit is
    /// dropped, so that a reader which is slow or gone never stops the guest.
    pub output: FdIndex,
}

/// A directory tree for the guest (virtio-fs).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShareConfig {
    /// The mount tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory, an `O_PATH` descriptor on the supervisor's mount.
    pub root: FdIndex,
    /// Refuse every change, whatever the guest's mount flags say.
    pub read_only: bool,
    pub cache: CachePolicy,
}

/// How long the guest may believe what it has read of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// Nothing is kept: host changes are seen at once.
    Never,
    /// Attributes and names for a second, data until the file is opened again.
    #[default]
    Auto,
    /// For trees that nobody else changes.
    Always,
}

/// A raw disk (virtio-blk). The format is never guessed from the content.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockConfig {
    /// `VIRTIO_BLK_T_GET_ID` answer, at most 20 bytes.
    pub id: String,
    /// None: a slot, of no sectors until a disk is put in ([`crate::control::Request::InsertDisk`]).
    pub disk: Option<FdIndex>,
    /// What the driver is told. A disk that is put in later is read-only or not by itself.
    pub read_only: bool,
}

/// The guest's socket address family to its supervisor (virtio-vsock).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Host ports that the guest may connect to; each such connection reaches
    /// the supervisor as [`crate::control::Event::GuestConnection`].
    pub guest_ports: Vec<u32>,
}

/// A network interface (virtio-net).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetConfig {
    /// The interface's hardware address. The guest may take another.
    pub mac: [u8; 6],
    /// Bytes of the longest packet, without Ethernet's header: 68 to 65535.
    pub mtu: u16,
    /// 1 to the number of processors, and at most [`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u8,
    /// None: the link is down until a tap is plugged ([`crate::control::Request::PlugNet`]).
    pub tap: Option<TapConfig>,
    /// Whether UDP segmentation is offered before there is a tap. One that is plugged later and can't do it is refused.
    pub udp_segmentation: bool,
    pub limits: NetLimits,
}

/// As many queue pairs as an interface can have: descriptors for them fit in one message, beside others.
pub const MAX_QUEUE_PAIRS: u8 = 8;

/// The host's end of a network interface.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TapConfig {
    /// See [`TapDescriptors::queues`].
    pub queues: Vec<FdIndex>,
    /// See [`TapDescriptors::vhost`].
    pub vhost: Vec<FdIndex>,
}

impl TapConfig {
    /// How many descriptors it names.
    pub fn descriptors(&self) -> usize {
        self.queues.len() + self.vhost.len()
    }
}

/// The descriptors that a [`TapConfig`] names.
#[derive(Debug, Default)]
pub struct TapDescriptors {
    /// A tap, opened once for each queue pair with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, and with
    /// `IFF_MULTI_QUEUE` if there are several, attached to its interface.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, opened once for each queue pair: the host's kernel moves packets. Empty: `hull-vmm` does. It
    /// also does whenever there are [`NetLimits`], which the kernel would not keep, and when the kernel refuses.
    pub vhost: Vec<OwnedFd>,
}

/// How much an interface may move, from the guest's point of view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetLimits {
    pub receive: DirectionLimits,
    pub transmit: DirectionLimits,
}

/// How much may go one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DirectionLimits {
    /// Bytes of Ethernet frames.
    pub bandwidth: Option<RateLimit>,
    /// Packets; one that is to be cut into segments by whoever takes it counts once.
    pub packets: Option<RateLimit>,
}

impl DirectionLimits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// A rate over any length of time, and what may be moved at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    pub per_second: NonZeroU64,
    /// A packet is let through whole while any of it is left, so 0 is taken for 1.
    pub burst: u64,
}
