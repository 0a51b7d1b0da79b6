//! The state file: a header, and the state by serde in postcard's form.
//!
//! ```text
//!  0  magic, "HULLSNAP"
//!  8  version of the format: nothing but that very version is read
//! 12  architecture, as ELF's e_machine
//! 16  length of the body in bytes
//! 24  CRC-32 (IEEE) of the body
//! 28  body, to the end of the file
//! ```
//! Numbers are little-endian. A state is for the version that wrote it: what comes of an older one is made anew, not
//! converted. The checksum is against damage, not against forgery.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::pread;

use super::MachineState;

const MAGIC: &[u8; 8] = b"HULLSNAP";
/// To be raised with every change of [`MachineState`] or of what a device puts into its own part.
const VERSION: u32 = 3;
/// `EM_X86_64`.
const ARCHITECTURE: u32 = 62;
const HEADER: usize = 28;
/// Longest body: 64 processors have 10 KiB each, a full bus less than 100 KiB; the rest is for the files that guests know.
const MAX_BODY: usize = 64 << 20;

/// Why a state was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("putting it into its form")]
    Form(#[source] postcard::Error),
    #[error("it is longer than {MAX_BODY} bytes")]
    TooLong,
    #[error(transparent)]
    File(#[from] io::Error),
}

/// Why a file is not a state.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("reading the state file")]
    File(#[source] io::Error),
    #[error("the file is not the state of a machine")]
    Magic,
    #[error("the state has format {found}, this version of Hull reads {VERSION} only")]
    Version { found: u32 },
    #[error("the state is that of a machine of another architecture ({0})")]
    Architecture(u32),
    #[error("the state file is not whole, or has something after its end")]
    Length,
    #[error("the state file is damaged: its checksum is {found:#010x}, not {expected:#010x}")]
    Checksum { expected: u32, found: u32 },
    #[error("the state file has a body that is no state")]
    Form(#[source] postcard::Error),
}

/// Writes a state to the start of a file, which is to be empty.
///
/// # Errors
/// When it can't be written.
pub fn write(file: OwnedFd, state: &MachineState) -> Result<(), WriteError> {
    let bytes = encode(state)?;
    let mut file = File::from(file);
    file.rewind()?;
    Ok(file.write_all(&bytes)?)
}

/// Reads a state. The file may be in use by others at the same time.
///
/// # Errors
/// When it isn't one, or not of this version.
pub fn read(file: BorrowedFd<'_>) -> Result<MachineState, ReadError> {
    let mut header = [0; HEADER];
    if read_at(file, &mut header, 0)? != HEADER {
        return Err(ReadError::Magic);
    }
    let length = check(&header)?;
    // One more, to see whether the file ends there.
    let mut body = vec![0; length + 1];
    if read_at(file, &mut body, HEADER)? != length {
        return Err(ReadError::Length);
    }
    decode(&header, &body[..length])
}

fn read_at(file: BorrowedFd<'_>, into: &mut [u8], start: usize) -> Result<usize, ReadError> {
    let mut done = 0;
    while done < into.len() {
        match pread(file, &mut into[done..], (start + done) as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ReadError::File(error.into())),
        }
    }
    Ok(done)
}

fn encode(state: &MachineState) -> Result<Vec<u8>, WriteError> {
    let body = postcard::to_allocvec(state).map_err(WriteError::Form)?;
    if body.len() > MAX_BODY {
        return Err(WriteError::TooLong);
    }
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(ARCHITECTURE.to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// The length of the body after a header.
fn check(header: &[u8; HEADER]) -> Result<usize, ReadError> {
    if !header.starts_with(MAGIC) {
        return Err(ReadError::Magic);
    }
    match (number(header, 8), number(header, 12)) {
        (VERSION, ARCHITECTURE) => {}
        (VERSION, other) => return Err(ReadError::Architecture(other)),
        (found, _) => return Err(ReadError::Version { found }),
    }
    let [low, high] = [16, 20].map(|at| u64::from(number(header, at)));
    usize::try_from(low | high << 32)
        .ok()
        .filter(|length| *length <= MAX_BODY)
        .ok_or(ReadError::Length)
}

fn decode(header: &[u8; HEADER], body: &[u8]) -> Result<MachineState, ReadError> {
    let (expected, found) = (number(header, 24), crc32fast::hash(body));
    if expected != found {
        return Err(ReadError::Checksum { expected, found });
    }
    match postcard::take_from_bytes(body).map_err(ReadError::Form)? {
        (state, []) => Ok(state),
        _ => Err(ReadError::Length),
    }
}

fn number(header: &[u8; HEADER], at: usize) -> u32 {
    let bytes = header.get(at..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::kvm::state::tests::sample;
    use crate::pci::BusState;

    fn machine() -> MachineState {
        MachineState {
            memory_mib: 64,
            memory_device_mib: 0,
            kvm: sample(),
            bus: BusState {
                bridge: vec![0; 256],
                functions: Vec::new(),
            },
        }
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// A body with the header that it should have.
    fn with_header(body: &[u8]) -> Vec<u8> {
        let mut bytes = encode(&machine()).unwrap();
        bytes.truncate(HEADER);
        bytes[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
        bytes[24..28].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn refused(content: &[u8]) -> ReadError {
        read(file(content).as_fd()).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read() {
        let file = file(&[]);

        write(file.try_clone().unwrap().into(), &machine()).unwrap();
        let found = read(file.as_fd()).unwrap();

        assert_eq!(encode(&found).unwrap(), encode(&machine()).unwrap());
    }

    #[test]
    fn a_file_that_is_no_state_is_refused_with_the_reason() {
        let good = encode(&machine()).unwrap();
        let changed = |at: usize, to: u8| {
            let mut bytes = good.clone();
            bytes[at] = to;
            bytes
        };

        assert!(matches!(refused(&[]), ReadError::Magic));
        assert!(matches!(refused(&changed(7, 0)), ReadError::Magic));
        assert!(matches!(refused(&good[..HEADER - 1]), ReadError::Magic));
        assert!(matches!(refused(&good[..HEADER]), ReadError::Length));
        assert!(matches!(
            refused(&changed(8, 0)),
            ReadError::Version { found: 0 }
        ));
        assert!(matches!(
            refused(&changed(12, 183)),
            ReadError::Architecture(183)
        ));
        assert!(matches!(refused(&changed(23, 1)), ReadError::Length));
        assert!(matches!(refused(&changed(18, 0x40)), ReadError::Length));
        assert!(matches!(
            refused(&changed(25, !good[25])),
            ReadError::Checksum { .. }
        ));
        assert!(matches!(
            refused(&[&good[..], &[0]].concat()),
            ReadError::Length
        ));
        assert!(matches!(refused(&with_header(&[])), ReadError::Form(_)));
        let body = [&good[HEADER..], &[0]].concat();
        assert!(matches!(refused(&with_header(&body)), ReadError::Length));
    }

    proptest! {
        #[test]
        fn any_change_of_a_file_is_noticed(place: prop::sample::Index, bit in 0..8_u32) {
            let mut bytes = encode(&machine()).unwrap();
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;

            prop_assert!(read(file(&bytes).as_fd()).is_err());
        }

        #[test]
        fn a_body_of_any_bytes_is_a_state_or_an_error(
            body in prop::collection::vec(any::<u8>(), 0..20_000),
        ) {
            let bytes = with_header(&body);

            // A panic is the failure.
            drop(read(file(&bytes).as_fd()));
        }

        #[test]
        fn a_changed_body_is_a_state_or_an_error(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        ) {
            let mut body = encode(&machine()).unwrap().split_off(HEADER);
            for (place, value) in changes {
                let place = place.index(body.len());
                body[place] = value;
            }

            drop(read(file(&with_header(&body)).as_fd()));
        }
    }
}
