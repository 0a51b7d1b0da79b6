//! The generation's identifier: a machine that finds another than before is a clone (Virtual Machine Generation ID,
//! 2012), and its kernel makes its random numbers anew.

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::GENERATION_ID;
use crate::memory::GuestRam;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("taking random bytes")]
    Random(#[source] rustix::io::Errno),
    #[error("writing them to guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// Writes one that no machine has had.
///
/// # Errors
/// When it can't be written.
pub fn renew(memory: &GuestRam) -> Result<(), GenerationError> {
    let mut identifier = [0; 16];
    // So few bytes come whole (getrandom(2)).
    getrandom(&mut identifier, GetRandomFlags::empty()).map_err(GenerationError::Random)?;
    Ok(memory.write_slice(&identifier, GuestAddress(GENERATION_ID))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn each_is_another_and_is_aligned() {
        let memory = memory::allocate(64).unwrap();
        let mut found = [[0; 16]; 3];

        for identifier in &mut found[1..] {
            renew(&memory).unwrap();
            memory
                .read_slice(identifier, GuestAddress(GENERATION_ID))
                .unwrap();
        }

        assert!(found[0] != found[1] && found[1] != found[2]);
        assert_eq!(GENERATION_ID % 8, 0);
    }
}
