//! Limits, descriptors and capabilities of the jailed process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{AtStep, JailError, Step};

/// Open files, at most: the file server keeps one for each file that the guest knows.
/// The kernel's default bound for a process (`fs.nr_open`).
pub const MAX_OPEN_FILES: u64 = 1 << 20;

/// What the file server's threads keep, in the jail's user namespace only: to act on
/// files as root and as any owner. No other thread keeps any.
pub const FILE_SERVER_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Raises the hard limit of open files while it may still be raised. Where it may not
/// (no CAP_SYS_RESOURCE), the limit that the host has set holds.
pub(super) fn raise_open_files() {
    let limit = Some(MAX_OPEN_FILES);
    let _ = rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    );
}

/// Limits what the process may use of the host.
pub(super) fn limit() -> Result<(), JailError> {
    let open_files = rustix::process::getrlimit(Resource::Nofile)
        .maximum
        .map_or(MAX_OPEN_FILES, |maximum| maximum.min(MAX_OPEN_FILES));
    for (resource, limit) in [
        (Resource::Nofile, open_files),
        (Resource::Core, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ] {
        let limit = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        rustix::process::setrlimit(resource, limit).at(Step::Limits)?;
    }
    Ok(())
}

/// Closes every descriptor but standard input, output, error and these.
pub(super) fn close_others(keep: &[BorrowedFd<'_>]) -> Result<(), JailError> {
    let mut kept: Vec<u32> = (0..3)
        .chain(keep.iter().map(|fd| fd.as_raw_fd().cast_unsigned()))
        .collect();
    kept.sort_unstable();
    kept.dedup();
    let ends = kept.iter().skip(1).map(|&next| next - 1);
    let gaps = kept.iter().zip(ends.chain([u32::MAX]));
    for (&last, end) in gaps {
        let start = last + 1;
        if start > end {
            continue;
        }
        // SAFETY: the process has one thread, and every descriptor that anything in it
        // owns is in `keep`: those closed came from whoever started it.
        let result = unsafe { libc::syscall(libc::SYS_close_range, start, end, 0) };
        if result != 0 {
            return Err(io::Error::last_os_error()).at(Step::CloseOthers);
        }
    }
    Ok(())
}

/// Leaves [`FILE_SERVER_CAPABILITIES`], and no way to gain any.
pub(super) fn drop_all_but_file_server() -> Result<(), JailError> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last one that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error).at(Step::Capabilities),
        }
    }
    set_capabilities(FILE_SERVER_CAPABILITIES).at(Step::Capabilities)?;
    rustix::thread::set_no_new_privs(true).at(Step::NoNewPrivileges)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::NoNewPrivileges)
}

/// Leaves the calling thread these capabilities.
pub(crate) fn set_capabilities(capabilities: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: capabilities,
            permitted: capabilities,
            inheritable: CapabilitySet::empty(),
        },
    )
}
