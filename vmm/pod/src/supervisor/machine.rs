//! The machine of a pod, as it is asked of `hull-vmm`.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use hull_machine::client::{MachineSpec, SnapshotFiles};
use hull_machine::config::CachePolicy;
use hull_machine::memory::working_set::Accesses;
use hull_protocol::READY_PORT;

use super::failure::PodFailure;
use crate::oci::MachineSize;

/// The pod's virtio-fs share.
pub const SHARE_TAG: &str = "hull";
/// Any will do: the guest's only peer is its own supervisor.
const CID: u32 = 3;
/// A panic is told by pvpanic once its driver is there, and before that by the reset that follows.
/// Legacy devices that this machine doesn't have are not looked for. The agent brings the other processors up, so that
/// those of a template never ran and a clone can do without. A kernel with one processor would take the lock prefixes
/// out of its code, thousands of them, and put them back for the second.
pub const CMDLINE: &str = "console=hvc0 loglevel=4 panic=-1 reboot=acpi random.trust_cpu=on \
                       8250.nr_uarts=0 cgroup_no_v1=all maxcpus=1 noreplace-smp";

/// Where a machine begins.
#[derive(Debug)]
pub enum Begin<'a> {
    Boot {
        kernel: &'a Path,
        initramfs: &'a Path,
    },
    Clone {
        files: SnapshotFiles,
        accesses: Accesses,
    },
}

/// Opens all that the machine needs.
pub fn spec(
    begin: Begin<'_>,
    size: MachineSize,
    console: OwnedFd,
    share: BorrowedFd<'_>,
) -> Result<MachineSpec, PodFailure> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|source| PodFailure::Open {
            path: "/dev/kvm (hull check tells what is missing)".into(),
            source,
        })?;
    let share = share
        .try_clone_to_owned()
        .map_err(|source| PodFailure::Open {
            path: "the share".into(),
            source,
        })?;
    let spec = match begin {
        Begin::Boot { kernel, initramfs } => MachineSpec::new(kvm, open(kernel)?, console)
            .memory_mib(size.memory_mib)
            .initramfs(open(initramfs)?)
            .cmdline(CMDLINE),
        Begin::Clone { files, accesses } => {
            MachineSpec::restored(kvm, files, console).accesses(accesses)
        }
    };
    Ok(spec
        .vcpus(size.vcpus)
        .share(SHARE_TAG, share, false, CachePolicy::Auto)
        .vsock(CID, vec![READY_PORT])
        .balloon())
}

fn open(path: &Path) -> Result<File, PodFailure> {
    File::open(path).map_err(|source| PodFailure::Open {
        path: path.display().to_string(),
        source,
    })
}
