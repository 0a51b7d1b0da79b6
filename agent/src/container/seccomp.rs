//! Seccomp profiles (OCI `linux.seccomp`): compiled in the agent, once each, and loaded in the process that becomes a
//! container's.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::error::{Doing, Error, Result};

/// Profiles that are kept compiled.
const KEPT: usize = 8;
/// The kernel's bound for a program (BPF_MAXINSNS).
const MAX_INSTRUCTIONS: usize = 4096;
const INSTRUCTION: usize = size_of::<libc::sock_filter>();

/// A compiled profile.
#[derive(Debug)]
pub struct Filter {
    /// A file in memory with the instructions.
    program: File,
    pub flags: u32,
}

impl Filter {
    /// For a process that will load it.
    pub fn descriptor(&self) -> Result<OwnedFd> {
        self.program
            .as_fd()
            .try_clone_to_owned()
            .doing(|| "passing a seccomp filter on".into())
    }
}

/// The profiles that containers have had lately.
#[derive(Debug, Default)]
pub struct Filters {
    compiled: Mutex<VecDeque<(Box<str>, Arc<Filter>)>>,
}

impl Filters {
    /// The filter of a profile in JSON.
    pub fn get(&self, profile: &str) -> Result<Arc<Filter>> {
        // Held while compiling: libseccomp has state of its own.
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, filter)) = compiled.iter().find(|(text, _)| **text == *profile) {
            return Ok(Arc::clone(filter));
        }
        let parsed: LinuxSeccomp = serde_json::from_str(profile)
            .map_err(|error| Error::Invalid(format!("reading the seccomp profile: {error}")))?;
        let filter = Arc::new(compile(&parsed)?);
        if compiled.len() == KEPT {
            compiled.pop_front();
        }
        compiled.push_back((profile.into(), Arc::clone(&filter)));
        Ok(filter)
    }
}

fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    let calls = profile.syscalls().as_deref().unwrap_or_default();
    let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
    if notifies(profile.default_action()) || calls.iter().any(|call| notifies(call.action())) {
        return Err(Error::Invalid(
            "a seccomp profile can't ask somebody else (SCMP_ACT_NOTIFY): nobody listens in the pod's machine".into(),
        ));
    }
    let flags = flags(profile)?;
    let failed = |error: libseccomp::error::SeccompError| {
        Error::Invalid(format!("compiling the seccomp profile: {error}"))
    };
    let otherwise = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(otherwise).map_err(failed)?;
    for &arch in profile.architectures().iter().flatten() {
        context.add_arch(architecture(arch)).map_err(failed)?;
    }
    for call in calls {
        let action = action(call.action(), call.errno_ret())?;
        if action == otherwise {
            continue;
        }
        let conditions = conditions(call);
        // Those that this processor or libseccomp doesn't know can't be made either.
        let known = call
            .names()
            .iter()
            .filter_map(|name| ScmpSyscall::from_name(name).ok());
        for number in known {
            for condition in &conditions {
                context
                    .add_rule_conditional(action, number, condition)
                    .map_err(failed)?;
            }
        }
    }
    let doing = || "keeping a compiled seccomp profile".into();
    let mut program = File::from(memfd_create("seccomp", MemfdFlags::CLOEXEC).doing(doing)?);
    context.export_bpf(&program).map_err(failed)?;
    program.rewind().doing(doing)?;
    Ok(Filter { program, flags })
}

/// The conditions of a rule, of which one must hold, each with all of its parts. Parts on the same argument don't go
/// together for libseccomp: they are alternatives then, as in other runtimes.
fn conditions(call: &LinuxSyscall) -> Vec<Vec<ScmpArgCompare>> {
    let parts = call.args().as_deref().unwrap_or_default();
    let arguments: BTreeSet<usize> = parts.iter().map(LinuxSeccompArg::index).collect();
    let compared: Vec<ScmpArgCompare> = parts.iter().map(compare).collect();
    if arguments.len() == parts.len() {
        return vec![compared];
    }
    compared.into_iter().map(|part| vec![part]).collect()
}

fn compare(part: &LinuxSeccompArg) -> ScmpArgCompare {
    let (value, second) = (part.value(), part.value_two().unwrap_or(0));
    let (operator, value) = match part.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // The first value is the mask, the second what must be left.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    // One that is too large is refused as no argument.
    let index = u32::try_from(part.index()).unwrap_or(u32::MAX);
    ScmpArgCompare::new(index, operator, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let too_large = |_| Error::Invalid(format!("seccomp: {errno} is no error number"));
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
        LinuxSeccompAction::ScmpActErrno => {
            ScmpAction::Errno(i32::try_from(errno).map_err(too_large)?)
        }
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(errno).map_err(too_large)?)
        }
    })
}

/// As seccomp(2) has them.
fn flags(profile: &LinuxSeccomp) -> Result<u32> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(Error::Invalid(
                    "seccomp: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is for SCMP_ACT_NOTIFY, which there is not".into(),
                ));
            }
        };
    }
    u32::try_from(flags).map_err(|_| Error::Invalid("seccomp: flags out of range".into()))
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// The instructions of a filter, in a process that is to load it.
#[derive(Clone, Debug)]
pub struct Program {
    instructions: Vec<libc::sock_filter>,
    flags: u32,
}

impl Program {
    /// Reads what [`Filter::descriptor`] gave.
    pub fn read(descriptor: &OwnedFd, flags: u32) -> io::Result<Self> {
        let file = File::from(descriptor.try_clone()?);
        let mut bytes = vec![0; MAX_INSTRUCTIONS * INSTRUCTION];
        let mut length = 0;
        loop {
            let at = u64::try_from(length).map_err(io::Error::other)?;
            match file.read_at(&mut bytes[length..], at)? {
                0 => break,
                count => length += count,
            }
        }
        let instructions = bytes[..length]
            .chunks_exact(INSTRUCTION)
            .map(|bytes| libc::sock_filter {
                code: u16::from_ne_bytes([bytes[0], bytes[1]]),
                jt: bytes[2],
                jf: bytes[3],
                k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            })
            .collect();
        Ok(Self {
            instructions,
            flags,
        })
    }

    /// Confines the calling thread, which has CAP_SYS_ADMIN or no_new_privs.
    pub fn load(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.instructions.len()).map_err(io::Error::other)?,
            filter: self.instructions.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel only reads the program, which outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        match result {
            0 => Ok(()),
            -1 => Err(io::Error::last_os_error()),
            // The number of a thread that has another filter: there is none but this one.
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would.
    fn verdict(program: &Program, number: u32, arguments: [u64; 6]) -> u32 {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
        let mut data = vec![number, 0xc000_003e, 0, 0];
        for argument in arguments {
            data.extend([low(argument), low(argument >> 32)]);
        }
        let (mut accumulator, mut at) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program.instructions[at];
            at += 1;
            let branch = |holds| usize::from(if holds { jt } else { jf });
            match code {
                0x20 => accumulator = data[usize::try_from(k).unwrap() / 4],
                0x54 => accumulator &= k,
                0x05 => at += usize::try_from(k).unwrap(),
                0x15 => at += branch(accumulator == k),
                0x25 => at += branch(accumulator > k),
                0x35 => at += branch(accumulator >= k),
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    const MKDIR: u32 = 83;
    const SOCKET: u32 = 41;
    const CLONE: u32 = 56;
    const CHMOD: u32 = 90;

    const PROFILE: &str = r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,
        "architectures":["SCMP_ARCH_X86_64"],"flags":["SECCOMP_FILTER_FLAG_LOG"],"syscalls":[
        {"names":["mkdir","no_such_call"],"action":"SCMP_ACT_ALLOW"},
        {"names":["clone"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":38,"op":"SCMP_CMP_LT"},{"index":0,"value":40,"op":"SCMP_CMP_GT"}]},
        {"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#;

    fn program(profile: &str) -> Program {
        let filter = Filters::default().get(profile).unwrap();
        Program::read(&filter.descriptor().unwrap(), filter.flags).unwrap()
    }

    fn first(argument: u64) -> [u64; 6] {
        [argument, 0, 0, 0, 0, 0]
    }

    #[test]
    fn rules_conditions_and_numbers_of_errors_are_the_profiles() {
        let program = program(PROFILE);
        assert_eq!(verdict(&program, MKDIR, [0; 6]), ALLOW);
        assert_eq!(verdict(&program, 999, [0; 6]), ERRNO | 38);
        // Without a number of its own.
        assert_eq!(verdict(&program, CHMOD, [0; 6]), ERRNO | 1);
        for (family, verdict_of) in [(2, ALLOW), (38, ERRNO | 38), (40, ERRNO | 38), (41, ALLOW)] {
            assert_eq!(verdict(&program, SOCKET, first(family)), verdict_of);
        }
        assert_eq!(program.flags, 2);
    }

    #[test]
    fn a_mask_is_the_first_value() {
        let program = program(PROFILE);
        // SIGCHLD, and the same in a user namespace of its own.
        assert_eq!(verdict(&program, CLONE, first(17)), ALLOW);
        assert_eq!(verdict(&program, CLONE, first(0x1000_0011)), ERRNO | 38);
    }

    #[test]
    fn a_profile_is_compiled_once_and_few_are_kept() {
        let filters = Filters::default();
        let profile = |errno: u32| {
            format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":{errno}}}"#)
        };
        let of_first = filters.get(&profile(1)).unwrap();
        assert!(Arc::ptr_eq(&of_first, &filters.get(&profile(1)).unwrap()));
        for errno in 2..20 {
            filters.get(&profile(errno)).unwrap();
        }
        assert_eq!(filters.compiled.lock().unwrap().len(), KEPT);
        assert!(!Arc::ptr_eq(&of_first, &filters.get(&profile(1)).unwrap()));
    }

    #[test]
    fn what_nobody_would_answer_is_refused() {
        for profile in [
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
            "{}",
        ] {
            assert!(
                matches!(Filters::default().get(profile), Err(Error::Invalid(_))),
                "{profile}"
            );
        }
    }
}
