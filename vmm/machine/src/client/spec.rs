//! A machine before it is one.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::config::{
    BlockConfig, BootConfig, CachePolicy, ConsoleConfig, FdIndex, MachineConfig, NetConfig,
    NetLimits, ShareConfig, Start, TapConfig, TapDescriptors, VsockConfig,
};
use crate::memory::working_set::Accesses;

/// A machine as the supervisor describes it, with the descriptors it hands over.
#[derive(Debug)]
pub struct MachineSpec {
    pub(super) config: MachineConfig,
    pub(super) descriptors: Vec<OwnedFd>,
}

impl MachineSpec {
    /// One processor and 256 MiB of memory, a kernel, and a pipe for the guest's console.
    pub fn new(
        kvm: impl Into<OwnedFd>,
        kernel: impl Into<OwnedFd>,
        console: impl Into<OwnedFd>,
    ) -> Self {
        let start = Start::Boot(BootConfig {
            kernel: FdIndex(2),
            initramfs: None,
            cmdline: String::new(),
            huge_pages: must_ask_for_huge_pages(),
        });
        Self::starting(start, vec![kvm.into(), console.into(), kernel.into()])
    }

    /// A machine that goes on where a snapshot was taken, with one of its processors running, its memory, and a pipe for
    /// the guest's console. Add the same devices that it had, in the same order; what is behind them may be another.
    /// The files may be shared by many machines, and removed while they run, but not changed.
    ///
    /// The guest's vsock connections are gone; its listeners are there. Of a share that was mounted, files that were open
    /// must be there by the same paths, mounts included, before the launch; what else the guest knew of it may be gone.
    pub fn restored(
        kvm: impl Into<OwnedFd>,
        files: SnapshotFiles,
        console: impl Into<OwnedFd>,
    ) -> Self {
        let start = Start::Snapshot {
            state: FdIndex(2),
            memory: FdIndex(3),
            accesses: Accesses::Unknown,
        };
        let SnapshotFiles { state, memory } = files;
        Self::starting(start, vec![kvm.into(), console.into(), state, memory])
    }

    /// `descriptors` are `/dev/kvm`, the console, and what `start` names.
    fn starting(start: Start, descriptors: Vec<OwnedFd>) -> Self {
        Self {
            config: MachineConfig {
                vcpus: 1,
                memory_mib: 256,
                kvm: FdIndex(0),
                start,
                console: ConsoleConfig { output: FdIndex(1) },
                shares: Vec::new(),
                blocks: Vec::new(),
                vsock: None,
                nets: Vec::new(),
                memory_device_mib: 0,
                balloon: false,
            },
            descriptors,
        }
    }

    /// Of a restored machine: how many of its processors run. The others must never have been started by the guest.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.config.vcpus = vcpus;
        self
    }

    /// Of a restored machine: what is known of the pages that it will soon access, from
    /// [`super::Machine::working_set`] of another that went on from the same files. It has them from the start, and so
    /// they cost it less time.
    #[must_use]
    pub fn accesses(mut self, known: Accesses) -> Self {
        if let Start::Snapshot { accesses, .. } = &mut self.config.start {
            *accesses = known;
        }
        self
    }

    /// A restored machine has what it had.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.config.memory_mib = memory_mib;
        self
    }

    /// A restored machine needs none.
    #[must_use]
    pub fn initramfs(mut self, file: impl Into<OwnedFd>) -> Self {
        if matches!(self.config.start, Start::Boot(_)) {
            let index = self.attach(file.into());
            if let Start::Boot(boot) = &mut self.config.start {
                boot.initramfs = Some(index);
            }
        }
        self
    }

    /// A restored machine needs none.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        if let Start::Boot(boot) = &mut self.config.start {
            boot.cmdline = cmdline.into();
        }
        self
    }

    /// Adds a directory tree. Mounts that the supervisor makes under `root` after
    /// [`Machine::launch`] reach the guest if `root` lies on a shared mount; those
    /// made while it runs may not.
    #[must_use]
    pub fn share(
        mut self,
        tag: impl Into<String>,
        root: impl Into<OwnedFd>,
        read_only: bool,
        cache: CachePolicy,
    ) -> Self {
        let root = self.attach(root.into());
        self.config.shares.push(ShareConfig {
            tag: tag.into(),
            root,
            read_only,
            cache,
        });
        self
    }

    #[must_use]
    pub fn block(
        mut self,
        id: impl Into<String>,
        disk: impl Into<OwnedFd>,
        read_only: bool,
    ) -> Self {
        let disk = self.attach(disk.into());
        self.config.blocks.push(BlockConfig {
            id: id.into(),
            disk: Some(disk),
            read_only,
        });
        self
    }

    /// Adds a slot for a disk, after the disks and slots that were added before. It is empty until a disk is put in
    /// ([`super::Machine::insert_disk`]).
    #[must_use]
    pub fn disk_slot(mut self, id: impl Into<String>) -> Self {
        self.config.blocks.push(BlockConfig {
            id: id.into(),
            disk: None,
            read_only: false,
        });
        self
    }

    #[must_use]
    pub fn vsock(mut self, cid: u32, guest_ports: Vec<u32>) -> Self {
        self.config.vsock = Some(VsockConfig { cid, guest_ports });
        self
    }

    /// Adds a network interface, after those that were added before. Without a tap its link is down until one is
    /// plugged ([`super::Machine::plug_net`]).
    #[must_use]
    pub fn net(mut self, net: NetSpec, tap: Option<TapDescriptors>) -> Self {
        let mut attach = |fds: Vec<OwnedFd>| fds.into_iter().map(|fd| self.attach(fd)).collect();
        let tap = tap.map(|tap| TapConfig {
            queues: attach(tap.queues),
            vhost: attach(tap.vhost),
        });
        self.config.nets.push(NetConfig {
            mac: net.mac,
            mtu: net.mtu,
            queue_pairs: net.queue_pairs,
            tap,
            udp_segmentation: net.udp_segmentation,
            limits: net.limits,
        });
        self
    }

    /// Pages that the guest has freed go back to the host.
    #[must_use]
    pub fn balloon(mut self) -> Self {
        self.config.balloon = true;
        self
    }

    /// Gives the machine a device by which up to this many MiB can be added to its memory while it runs
    /// ([`super::Machine::resize_memory`]): a multiple of 128, up to 1 TiB. Until then that costs the host nothing.
    /// A restored machine needs as many as it had.
    #[must_use]
    pub fn memory_device(mut self, region_mib: u64) -> Self {
        self.config.memory_device_mib = region_mib;
        self
    }

    fn attach(&mut self, descriptor: OwnedFd) -> FdIndex {
        // More than the channel takes (and so more than fits) is refused when it is sent.
        let index = u16::try_from(self.descriptors.len()).unwrap_or(u16::MAX);
        self.descriptors.push(descriptor);
        FdIndex(index)
    }
}

/// Whether the host gives huge pages to those who ask, and to nobody else (Linux, admin-guide/mm/transhuge.rst). Where
/// everybody gets them, who asks may wait for pages to be moved.
fn must_ask_for_huge_pages() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|setting| setting.contains("[madvise]"))
}

/// The two files of a snapshot: [`crate::snapshot`].
#[derive(Debug)]
pub struct SnapshotFiles {
    pub state: OwnedFd,
    pub memory: OwnedFd,
}

impl SnapshotFiles {
    /// Other descriptors of the same files.
    ///
    /// # Errors
    /// When there are no more.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            state: self.state.try_clone()?,
            memory: self.memory.try_clone()?,
        })
    }
}

/// A network interface; see [`NetConfig`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct NetSpec {
    pub mac: [u8; 6],
    /// 68 to 65535.
    pub mtu: u16,
    /// 1 to the number of processors, and at most [`crate::config::MAX_QUEUE_PAIRS`].
    pub queue_pairs: u8,
    /// See [`NetConfig::udp_segmentation`].
    pub udp_segmentation: bool,
    pub limits: NetLimits,
}

/// A tap as a message has it that comes with no other descriptors, and these.
pub(super) fn tap_alone(tap: TapDescriptors) -> (TapConfig, Vec<OwnedFd>) {
    let TapDescriptors { mut queues, vhost } = tap;
    let mut indices = (0..).map(FdIndex);
    let config = TapConfig {
        queues: indices.by_ref().take(queues.len()).collect(),
        vhost: indices.take(vhost.len()).collect(),
    };
    queues.extend(vhost);
    (config, queues)
}
