//! Locks between processes that use the store. The kernel drops them with the process.
//!
//! `lock` guards the index: shared to look an image up and take its lease, exclusive
//! to change names and to remove what has none. `load.lock` is held for as long as
//! layers are unpacked that no name stands for yet, so that nobody takes them for
//! waste; lookups don't wait for it. Order: `load.lock`, then `lock`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, FlockOperation, Mode, OFlags};

/// Opens and locks a file, which is made if it isn't there.
///
/// # Errors
/// When it can't be opened, or (with a non-blocking operation) is locked by another.
pub fn lock(path: &Path, operation: FlockOperation) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR)?;
    loop {
        match rustix::fs::flock(&file, operation) {
            Err(rustix::io::Errno::INTR) => {}
            done => {
                done?;
                return Ok(file);
            }
        }
    }
}
