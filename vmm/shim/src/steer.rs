//! Brings every TCP connection to a loopback address of a network namespace to one socket, whatever its port.
//!
//! By a BPF program of the type sk_lookup (Linux 5.9), which the kernel asks when it looks for a listening socket:
//! `struct bpf_sk_lookup` is what it is asked with. No packet is touched, and no module is needed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Offsets in `struct bpf_sk_lookup`.
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
/// 127.0.0.0/8: the first byte in memory, on a little-endian machine.
const LOOPBACK: i32 = 127;

const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// One instruction: `struct bpf_insn`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Instruction codes, `<linux/bpf.h>` and `<linux/bpf_common.h>`.
const LOAD_IMMEDIATE_64: u8 = 0x18;
const LOAD_WORD: u8 = 0x61;
const STORE_WORD_IMMEDIATE: u8 = 0x62;
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE_32: u8 = 0x54;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Marks the immediate of a 64-bit load as a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;
const FRAME: u8 = 10;

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

/// Whatever it finds, the kernel goes on (SK_PASS): with the socket that was assigned, or as without the program.
fn program(map: RawFd) -> [Instruction; 22] {
    [
        instruction(MOVE_REGISTER, 6, 1, 0, 0),
        instruction(LOAD_WORD, 2, 1, PROTOCOL, 0),
        instruction(JUMP_NOT_EQUAL, 2, 0, 17, libc::IPPROTO_TCP),
        instruction(LOAD_WORD, 2, 1, LOCAL_IP4, 0),
        instruction(AND_IMMEDIATE_32, 2, 0, 0, 0xff),
        instruction(JUMP_NOT_EQUAL, 2, 0, 14, LOOPBACK),
        // The map's only socket.
        instruction(STORE_WORD_IMMEDIATE, FRAME, 0, -4, 0),
        instruction(LOAD_IMMEDIATE_64, 1, PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE_REGISTER, 2, FRAME, 0, 0),
        instruction(ADD_IMMEDIATE, 2, 0, 0, -4),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        instruction(JUMP_EQUAL, 0, 0, 7, 0),
        instruction(MOVE_REGISTER, 7, 0, 0, 0),
        instruction(MOVE_REGISTER, 1, 6, 0, 0),
        instruction(MOVE_REGISTER, 2, 7, 0, 0),
        instruction(MOVE_IMMEDIATE, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SK_ASSIGN),
        instruction(MOVE_REGISTER, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SK_RELEASE),
        instruction(MOVE_IMMEDIATE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

// The parts of `union bpf_attr` that are used.

#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

/// Steers to a listening socket in a network namespace, as long as what is returned is open.
///
/// # Errors
/// When the kernel says no: it is older, or this process may not load programs.
pub fn steer(listener: &impl AsFd, namespace: &impl AsFd) -> io::Result<OwnedFd> {
    let map = owned(
        BPF_MAP_CREATE,
        &MapAttributes {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            flags: 0,
        },
    )?;
    let (key, value) = (0u32, listener.as_fd().as_raw_fd());
    let update = UpdateAttributes {
        map: map.as_raw_fd(),
        padding: 0,
        key: std::ptr::from_ref(&key).addr() as u64,
        value: std::ptr::from_ref(&value).addr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &update)?;
    let instructions = program(map.as_raw_fd());
    let program = owned(
        BPF_PROG_LOAD,
        &LoadAttributes {
            program_type: BPF_PROG_TYPE_SK_LOOKUP,
            instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            instructions: instructions.as_ptr().addr() as u64,
            license: c"Apache-2.0".as_ptr().addr() as u64,
            log_level: 0,
            log_size: 0,
            log_buffer: 0,
            kernel_version: 0,
            flags: 0,
            name: *b"hull_forward\0\0\0\0",
            interface: 0,
            attach_type: BPF_SK_LOOKUP,
        },
    )?;
    owned(
        BPF_LINK_CREATE,
        &LinkAttributes {
            program: program.as_raw_fd(),
            target: namespace.as_fd().as_raw_fd(),
            attach_type: BPF_SK_LOOKUP,
            flags: 0,
        },
    )
}

fn owned<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: `attributes` is a beginning of the union that the command reads, and
    // all that it points to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}
