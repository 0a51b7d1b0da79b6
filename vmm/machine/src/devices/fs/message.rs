//! One FUSE message: the checks that the file server leaves out, and an answer in every case.

use std::io::Write;
use std::mem::size_of;

use virtio_queue::DescriptorChain;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use vm_memory::{Address, ByteValued, Bytes};

use super::mapping::FileServerMemory;
use super::server::{MessageServer, Session};
use crate::memory::GuestRam;

/// Size of an answer's header, which is all of a refusal.
const HEADER_SIZE: u32 = 16;
const _: () = assert!(size_of::<OutHeader>() == 16);
/// Where the answer to `FUSE_INIT` has the lowest byte of `fuse_init_out.flags` (linux/fuse.h).
const INIT_FLAGS: usize = 28;
/// `FUSE_ATOMIC_O_TRUNC`, in that byte.
const ATOMIC_O_TRUNC: u8 = 1 << 3;

/// Serves the message in `chain`. Returns how many bytes of the chain were written.
pub(super) fn serve(
    chain: &DescriptorChain<&GuestRam>,
    memory: &FileServerMemory,
    server: &dyn MessageServer,
) -> u32 {
    let Ok(memory) = memory.get() else {
        return 0;
    };
    let memory = memory.as_ref();
    let (Ok(message), Ok(answer)) = (
        Reader::new(memory, chain.clone()),
        Writer::new(memory, chain.clone()),
    ) else {
        return 0;
    };
    let Ok(header) = message.clone().read_obj::<InHeader>() else {
        return 0;
    };
    let opcode = Opcode::try_from(header.opcode);
    let answered = !matches!(
        opcode,
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::Destroy)
    );
    // The file server takes it for granted that the header of an answer fits.
    if answered && answer.available_bytes() < size_of::<OutHeader>() {
        return 0;
    }
    let session = match opcode {
        Ok(Opcode::Init) => Session::Begins,
        Ok(Opcode::Destroy) => Session::Ends,
        _ => Session::Within,
    };
    // The answer's place is the same for a refusal, so it is kept.
    let refusal = answer.clone();
    let length = match server.serve(session, message, answer) {
        Ok(length) => {
            if matches!(opcode, Ok(Opcode::Init)) && length > INIT_FLAGS {
                withhold_atomic_truncation(chain);
            }
            length
        }
        Err(_) if !answered => 0,
        // A malformed message is the guest's mistake; but without an answer its process would wait for ever.
        Err(_) => refuse(refusal, header.unique, libc::EINVAL),
    };
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Takes `FUSE_ATOMIC_O_TRUNC` out of the answer to `FUSE_INIT`, which the library always offers. With it the guest's
/// kernel leaves truncation to the server's `open`, and looks only then whether the file is a program that
/// runs: `O_RDONLY | O_TRUNC` would cut it off under the processes that run it. Without it the kernel asks
/// for the truncation itself, after it has looked.
fn withhold_atomic_truncation(chain: &DescriptorChain<&GuestRam>) {
    let mut before = INIT_FLAGS;
    for descriptor in chain.clone().writable() {
        let length = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        if let Some(past) = before.checked_sub(length) {
            before = past;
            continue;
        }
        let Some(address) = descriptor.addr().checked_add(before as u64) else {
            return;
        };
        let memory = chain.memory();
        // A guest that changes its own answer meanwhile gets what it wrote; it alone reads it.
        if let Ok(flags) = memory.read_obj::<u8>(address) {
            let _ = memory.write_obj(flags & !ATOMIC_O_TRUNC, address);
        }
        return;
    }
}

/// Answers with an error. Returns the answer's length.
fn refuse(mut answer: Writer<'_>, unique: u64, errno: i32) -> usize {
    let header = OutHeader {
        len: HEADER_SIZE,
        error: -errno,
        unique,
    };
    match answer.write_all(header.as_slice()) {
        Ok(()) => size_of::<OutHeader>(),
        Err(_) => 0,
    }
}
