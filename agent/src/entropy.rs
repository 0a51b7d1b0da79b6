//! The kernel's random numbers, made this machine's own.
//!
//! A clone has its template's generator, and would give what every other clone gives. Bytes of the host's
//! are mixed in and counted, and the generator takes a new key of them at once: without that it would go on
//! with the old one for up to a minute.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;

use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};

use crate::error::{Doing, Error, Result};

/// Bytes in one request. The kernel calls its pool full at 32.
const BYTES: RangeInclusive<usize> = 32..=MOST;
const MOST: usize = 64;

/// `struct rand_pool_info` (linux/random.h).
#[repr(C)]
struct PoolInfo {
    /// In bits.
    entropy_count: i32,
    /// In bytes.
    buf_size: i32,
    buf: [u8; MOST],
}

/// Declared with the size of a `struct rand_pool_info` without its bytes, as two `int`.
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
const RESEED: Opcode = opcode::none(b'R', 0x07);

/// Mixes the bytes into the kernel's generator, which goes on from there.
pub fn reseed(bytes: &[u8]) -> Result<()> {
    if !BYTES.contains(&bytes.len()) {
        return Err(Error::Invalid(format!(
            "{} bytes of entropy are not {} to {MOST}",
            bytes.len(),
            BYTES.start()
        )));
    }
    let mut info = PoolInfo {
        entropy_count: 0,
        buf_size: 0,
        buf: [0; MOST],
    };
    for (to, from) in info.buf.iter_mut().zip(bytes) {
        *to = *from;
        info.buf_size += 1;
        info.entropy_count += 8;
    }
    add(info).doing(|| "giving the kernel random bytes".into())
}

fn add(info: PoolInfo) -> io::Result<()> {
    let random = File::options().write(true).open("/dev/random")?;
    // SAFETY: the request reads a `struct rand_pool_info` and as many bytes after it as that says, which is
    // no more than there are.
    unsafe { ioctl(&random, Setter::<ADD_ENTROPY, PoolInfo>::new(info)) }?;
    // SAFETY: this one has no argument.
    unsafe { ioctl(&random, NoArg::<RESEED>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_the_kernels() {
        assert_eq!((ADD_ENTROPY, RESEED), (0x4008_5203, 0x5207));
    }

    #[test]
    fn too_few_and_too_many_bytes_are_refused() {
        for count in [0, 31, 65, 4096] {
            assert!(matches!(reseed(&vec![1; count]), Err(Error::Invalid(_))));
        }
    }
}
