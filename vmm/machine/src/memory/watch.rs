//! Memory of which can be seen from outside what was accessed: what the kernel maps of it is what was asked for, and
//! nothing next to it.

use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_REGISTER, UFFD_API, UFFD_FEATURE_WP_ASYNC, UFFD_USER_MODE_ONLY, UFFDIO,
    UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_range, uffdio_register,
};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{GuestRam, whole_pieces};

ioctl_iowr_nr!(API, UFFDIO, _UFFDIO_API, uffdio_api);
ioctl_iowr_nr!(REGISTER, UFFDIO, _UFFDIO_REGISTER, uffdio_register);

/// Has the kernel map one page for one access, as long as what is returned is open. Nothing is made to wait: where the
/// kernel keeps account of writes by itself it takes this for every kind of mapping, since Linux 6.7.
///
/// # Errors
/// When the kernel can't, or must not for this process.
pub fn one_page_at_a_time(ram: &GuestRam) -> io::Result<OwnedFd> {
    // Faults of the kernel's are never to be told here, so that no privilege is needed.
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
    // SAFETY: nobody is asked for pages with it.
    let watch = unsafe { userfaultfd(flags) }?;
    let mut api = uffdio_api {
        api: UFFD_API.into(),
        features: UFFD_FEATURE_WP_ASYNC.into(),
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes the structure only.
    if unsafe { ioctl_with_mut_ref(&watch, API(), &mut api) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for piece in whole_pieces(ram) {
        let mut register = uffdio_register {
            range: uffdio_range {
                start: piece.mapping().as_ptr().expose_provenance() as u64,
                len: piece.len(),
            },
            mode: UFFDIO_REGISTER_MODE_WP.into(),
            ioctls: 0,
        };
        // SAFETY: as above; of guest RAM no page is protected, so that accesses go on as they did.
        if unsafe { ioctl_with_mut_ref(&watch, REGISTER(), &mut register) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(watch)
}
