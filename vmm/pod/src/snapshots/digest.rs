//! What a file is known by.

use std::fs::File;
use std::io;

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Holes are passed over in units of this.
const BLOCK: usize = 4096;
/// Read at once: blocks.
const CHUNK: usize = 64 * BLOCK;

/// Length and content of a file. A memory file is mostly holes, so zeroes don't count, wherever they are in one:
/// hashed are its blocks of 4 KiB that have anything else, each behind its number (64 bits, little-endian).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Digest {
    pub size: u64,
    /// Of the blocks, in hexadecimal.
    sha256: String,
}

impl Digest {
    /// Reads the whole file, and leaves it to be read from its beginning.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn of(file: &File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        let mut position = 0;
        while let Some(data) = next_data(file, position)? {
            // Of the block in which it begins.
            position = data - data % BLOCK as u64;
            let length = read(file, &mut chunk, position)?;
            if length == 0 {
                break;
            }
            for block in chunk[..length].chunks(BLOCK) {
                if block.iter().any(|byte| *byte != 0) {
                    hash.update((position / BLOCK as u64).to_le_bytes());
                    hash.update(block);
                }
                position += block.len() as u64;
            }
        }
        // Looking for holes moves it.
        seek(file, SeekFrom::Start(0))?;
        let bytes = hash.finalize();
        Ok(Self {
            size,
            sha256: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}

/// The first place from `position` on that is in no hole. None: there is none.
fn next_data(file: &File, position: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(position)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// As much as fits, or is there.
fn read(file: &File, chunk: &mut [u8], position: u64) -> io::Result<usize> {
    let mut length = 0;
    while length < chunk.len() {
        match pread(file, &mut chunk[length..], position + length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    fn file(parts: &[(u64, &[u8])], size: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for (at, bytes) in parts {
            file.seek(SeekFrom::Start(*at)).unwrap();
            file.write_all(bytes).unwrap();
        }
        file.set_len(size).unwrap();
        file
    }

    fn digest(parts: &[(u64, &[u8])], size: u64) -> Digest {
        Digest::of(&file(parts, size)).unwrap()
    }

    #[test]
    fn holes_are_zeroes_and_all_else_counts() {
        const SIZE: u64 = 3 << 20;
        let whole = digest(&[(1 << 20, b"x")], SIZE);

        let zeroes = vec![0; 1 << 20];
        assert_eq!(digest(&[(0, &zeroes), (1 << 20, b"x")], SIZE), whole);
        for other in [
            digest(&[(1 << 20, b"y")], SIZE),
            digest(&[((1 << 20) + 1, b"x")], SIZE),
            digest(&[(2 << 20, b"x")], SIZE),
            digest(&[(1 << 20, b"x"), (SIZE - 1, b"x")], SIZE),
            digest(&[(1 << 20, b"x")], SIZE + 1),
            digest(&[], SIZE),
        ] {
            assert_ne!(other, whole);
        }
    }

    #[test]
    fn the_file_is_read_from_its_beginning_then() {
        for length in [0, CHUNK, 3 * CHUNK + 1] {
            let mut file = file(&[(0, &vec![1; length])], length as u64);
            let _ = Digest::of(&file).unwrap();
            assert_eq!(file.stream_position().unwrap(), 0, "{length}");
        }
    }

    #[test]
    fn an_empty_file_has_one() {
        assert_eq!(digest(&[], 0).size, 0);
    }
}
