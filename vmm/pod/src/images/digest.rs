//! Content digests: computed while reading, and compared.

use std::fmt::Write as _;
use std::io::{self, Read};

use oci_spec::image::{Digest, DigestAlgorithm};
use sha2::{Digest as _, Sha256, Sha512};

/// A hash in the making, of one of the algorithms that OCI registers.
#[derive(Debug, Clone)]
enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    fn new(algorithm: &DigestAlgorithm) -> io::Result<Self> {
        match algorithm {
            DigestAlgorithm::Sha256 => Ok(Self::Sha256(Sha256::new())),
            DigestAlgorithm::Sha512 => Ok(Self::Sha512(Sha512::new())),
            other => Err(io::Error::other(format!(
                "digest algorithm {other} is not supported"
            ))),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Self::Sha256(hash) => hex(&hash.finalize()),
            Self::Sha512(hash) => hex(&hash.finalize()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a String can't fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// The digest of a small blob.
#[must_use]
pub fn sha256_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

/// Checks a small blob.
///
/// # Errors
/// When its digest is another, or of an unknown algorithm.
pub fn check(bytes: &[u8], wanted: &Digest) -> io::Result<()> {
    Verify::new(bytes, wanted)?.finish()
}

/// Passes on what it reads, and knows at the end whether it had the right digest.
#[derive(Debug)]
pub struct Verify<R> {
    source: R,
    hasher: Hasher,
    wanted: String,
    /// Bytes read so far.
    pub count: u64,
}

impl<R: Read> Verify<R> {
    /// # Errors
    /// When the algorithm is unknown.
    pub fn new(source: R, wanted: &Digest) -> io::Result<Self> {
        let hasher = Hasher::new(wanted.algorithm())?;
        Ok(Self {
            source,
            hasher,
            wanted: wanted.digest().to_owned(),
            count: 0,
        })
    }

    /// Reads what is left, and compares.
    ///
    /// # Errors
    /// When the digest is another.
    pub fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self, &mut io::sink())?;
        let found = self.hasher.finish();
        if found == self.wanted {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("damaged: its digest is {found}, not {}", self.wanted),
        ))
    }
}

impl<R: Read> Read for Verify<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_compared() {
        let right: Digest = sha256_of(b"abc").parse().unwrap();
        assert!(check(b"abc", &right).is_ok());
        assert!(
            check(b"abd", &right)
                .unwrap_err()
                .to_string()
                .starts_with("damaged: ")
        );
    }

    #[test]
    fn known_values() {
        assert_eq!(
            sha256_of(b""),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        let sha512: Digest = format!("sha512:{}", hex(&Sha512::digest(b"x")))
            .parse()
            .unwrap();
        assert!(check(b"x", &sha512).is_ok());
    }

    #[test]
    fn what_the_reader_left_is_part_of_the_digest() {
        let right: Digest = sha256_of(b"abcdef").parse().unwrap();
        let mut reader = Verify::new(&b"abcdef"[..], &right).unwrap();
        reader.read_exact(&mut [0; 2]).unwrap();
        assert!(reader.finish().is_ok());
    }
}
