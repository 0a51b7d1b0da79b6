//! The device program of a container's cgroup: which device nodes may be made, read
//! and written (OCI `linux.resources.devices`).
//!
//! cgroup v2 has no device files but a BPF program of the type cgroup_device. It is
//! asked with `struct bpf_cgroup_dev_ctx { u32 access_type, major, minor }`, where
//! access_type is `access << 16 | type`; 0 refuses, 1 allows.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Doing, Error, Result};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// enum of `<linux/bpf.h>`.
const DEVICE_BLOCK: i32 = 1;
const DEVICE_CHAR: i32 = 2;
const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const ACCESS_ALL: i32 = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;

/// Most rules of a container; each is at most nine instructions, and 4096 is the
/// kernel's bound for programs of old.
const MAX_RULES: usize = 256;

/// One instruction: `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Instruction codes, `<linux/bpf.h>` and `<linux/bpf_common.h>`.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const AND_IMMEDIATE_32: u8 = 0x54;
const SHIFT_RIGHT_32: u8 = 0x74;
const JUMP_NOT_EQUAL: u8 = 0x55;
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

const RETURN: u8 = 0;
const SCRATCH: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

/// What every container may use, numbers None for any: making nodes, and the devices
/// that the runtime puts into /dev (with terminals).
const ALWAYS: [(LinuxDeviceType, Option<i64>, Option<i64>, &str); 11] = [
    (LinuxDeviceType::C, None, None, "m"),
    (LinuxDeviceType::B, None, None, "m"),
    (LinuxDeviceType::C, Some(1), Some(3), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(5), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(7), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(8), "rwm"),
    (LinuxDeviceType::C, Some(1), Some(9), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(0), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(1), "rwm"),
    (LinuxDeviceType::C, Some(5), Some(2), "rwm"),
    (LinuxDeviceType::C, Some(136), None, "rwm"),
];

/// Loaded programs that are kept.
const KEPT: usize = 8;

/// The programs that containers have had lately.
#[derive(Debug, Default)]
pub struct Programs {
    loaded: Mutex<VecDeque<(Vec<LinuxDeviceCgroup>, Arc<OwnedFd>)>>,
}

impl Programs {
    /// Attaches the program for a container's rules to its cgroup: nothing is allowed but
    /// what the rules allow (the last that matches decides) and what every container may use.
    pub fn attach(&self, cgroup: impl AsFd, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        let program = self.get(rules)?;
        attach_program(cgroup, &program).doing(|| "attaching the device program".into())
    }

    fn get(&self, rules: &[LinuxDeviceCgroup]) -> Result<Arc<OwnedFd>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, program)) = loaded.iter().find(|(of, _)| of == rules) {
            return Ok(Arc::clone(program));
        }
        let program = load(&with_usual(rules)?).doing(|| "loading the device program".into())?;
        let program = Arc::new(program);
        if loaded.len() == KEPT {
            loaded.pop_front();
        }
        loaded.push_back((rules.to_vec(), Arc::clone(&program)));
        Ok(program)
    }
}

/// The program for rules and what every container may use.
fn with_usual(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Instruction>> {
    let mut rules = rules.to_vec();
    for (kind, major, minor, access) in ALWAYS {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true);
        rule.set_typ(Some(kind));
        rule.set_major(major);
        rule.set_minor(minor);
        rule.set_access(Some(access.to_owned()));
        rules.push(rule);
    }
    compile(&rules)
}

fn compile(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Instruction>> {
    if rules.len() > MAX_RULES {
        return Err(Error::TooMany {
            what: "device rules in a container",
            limit: MAX_RULES,
        });
    }
    let mut program = vec![
        instruction(LOAD_WORD, TYPE, SCRATCH, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, TYPE, 0, 0),
        instruction(AND_IMMEDIATE_32, TYPE, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_32, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, SCRATCH, 4, 0),
        instruction(LOAD_WORD, MINOR, SCRATCH, 8, 0),
    ];
    let mut decided = false;
    for rule in rules.iter().rev() {
        let (block, all) = rule_block(rule)?;
        program.extend(block);
        // What follows could not be reached, and the kernel refuses such programs.
        if all {
            decided = true;
            break;
        }
    }
    if !decided {
        program.extend(verdict(false));
    }
    Ok(program)
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [
        instruction(MOVE_IMMEDIATE, RETURN, 0, 0, i32::from(allow)),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// The instructions of one rule, and whether it matches everything.
fn rule_block(rule: &LinuxDeviceCgroup) -> Result<(Vec<Instruction>, bool)> {
    let access = access_bits(rule.access().as_deref())?;
    // Conditions that must hold, each a jump over the rest if it doesn't.
    let mut conditions: Vec<Vec<Instruction>> = Vec::new();
    let unequal = |register, value| vec![instruction(JUMP_NOT_EQUAL, register, 0, 0, value)];
    match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => {}
        LinuxDeviceType::B => conditions.push(unequal(TYPE, DEVICE_BLOCK)),
        LinuxDeviceType::C | LinuxDeviceType::U => conditions.push(unequal(TYPE, DEVICE_CHAR)),
        LinuxDeviceType::P => {
            return Err(Error::Invalid("a device rule can't be for a fifo".into()));
        }
    }
    if access != ACCESS_ALL {
        // All that is asked for must be in the rule: asked & rule == asked.
        conditions.push(vec![
            instruction(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0),
            instruction(AND_IMMEDIATE_32, SCRATCH, 0, 0, access),
            instruction(JUMP_NOT_EQUAL_REGISTER, SCRATCH, ACCESS, 0, 0),
        ]);
    }
    for (register, number) in [(MAJOR, rule.major()), (MINOR, rule.minor())] {
        // Negative numbers stand for any, as in old runtimes' specifications.
        if let Some(number) = number.filter(|number| *number >= 0) {
            let number = i32::try_from(number)
                .map_err(|_| Error::Invalid(format!("{number} is no device number")))?;
            conditions.push(unequal(register, number));
        }
    }
    let all = conditions.is_empty();
    let mut block: Vec<Instruction> = conditions.concat();
    block.extend(verdict(rule.allow()));
    let end = block.len();
    for (index, instruction) in block.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER) {
            instruction.offset = i16::try_from(end - index - 1)
                .map_err(|_| Error::Invalid("a device rule is too long".into()))?;
        }
    }
    Ok((block, all))
}

fn access_bits(access: Option<&str>) -> Result<i32> {
    let Some(access) = access.filter(|access| !access.is_empty()) else {
        return Ok(ACCESS_ALL);
    };
    access.chars().try_fold(0, |bits, letter| {
        Ok(bits
            | match letter {
                'm' => ACCESS_MKNOD,
                'r' => ACCESS_READ,
                'w' => ACCESS_WRITE,
                _ => {
                    return Err(Error::Invalid(format!("{access:?} is no device access")));
                }
            })
    })
}

/// The part of `union bpf_attr` for BPF_PROG_LOAD that is used.
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
}

/// The same for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: RawFd,
    program: RawFd,
    attach_type: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach_program(cgroup: impl AsFd, program: &OwnedFd) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: cgroup.as_fd().as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    /// Runs a program as the kernel would.
    fn allows(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i64; 6];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: names,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(names & 0xf), usize::from(names >> 4));
            at += 1;
            let skip = usize::try_from(offset).unwrap_or(0);
            match code {
                LOAD_WORD => registers[to] = i64::from(context[skip / 4]),
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE_IMMEDIATE => registers[to] = i64::from(immediate),
                AND_IMMEDIATE_32 => registers[to] &= i64::from(immediate),
                SHIFT_RIGHT_32 => registers[to] >>= immediate,
                JUMP_NOT_EQUAL if registers[to] != i64::from(immediate) => at += skip,
                JUMP_NOT_EQUAL_REGISTER if registers[to] != registers[from] => at += skip,
                JUMP_NOT_EQUAL | JUMP_NOT_EQUAL_REGISTER => {}
                EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const USUAL: &str = r#"[
        {"allow":false,"access":"rwm"},
        {"allow":true,"type":"c","access":"m"},
        {"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"},
        {"allow":true,"type":"c","major":136,"access":"rwm"},
        {"allow":false,"type":"c","major":136,"minor":9,"access":"w"}
    ]"#;

    #[test]
    fn the_last_matching_rule_decides() {
        let program = compile(&rules(USUAL)).unwrap();
        let rw = ACCESS_READ | ACCESS_WRITE;
        assert!(allows(&program, DEVICE_CHAR, rw, 1, 3));
        assert!(allows(&program, DEVICE_CHAR, ACCESS_MKNOD, 10, 200));
        assert!(!allows(&program, DEVICE_CHAR, ACCESS_READ, 10, 200));
        assert!(!allows(
            &program,
            DEVICE_CHAR,
            ACCESS_READ | ACCESS_MKNOD,
            10,
            200
        ));
        assert!(!allows(&program, DEVICE_BLOCK, ACCESS_MKNOD, 254, 0));
        assert!(allows(&program, DEVICE_CHAR, rw, 136, 7));
        assert!(!allows(&program, DEVICE_CHAR, ACCESS_WRITE, 136, 9));
    }

    #[test]
    fn without_rules_nothing_is_allowed() {
        let program = compile(&[]).unwrap();
        assert!(!allows(&program, DEVICE_CHAR, ACCESS_READ, 1, 3));
    }

    #[test]
    fn a_rule_for_everything_ends_the_program() {
        let program = compile(&rules(
            r#"[{"allow":false,"type":"b"},{"allow":true,"type":"a"}]"#,
        ))
        .unwrap();
        assert!(allows(&program, DEVICE_BLOCK, ACCESS_ALL, 8, 0));
        assert_eq!(program.len(), 8);
    }

    #[test]
    fn unknown_access_is_an_error() {
        assert!(compile(&rules(r#"[{"allow":true,"access":"x"}]"#)).is_err());
    }
}
