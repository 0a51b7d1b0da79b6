//! The default seccomp profile: what containers may ask of the guest's kernel.
//!
//! Which system calls are allowed is what Docker and containerd allow. As in podman,
//! a call that the profile doesn't know is answered with ENOSYS, so that programs
//! fall back to an older one, and one that it knows and refuses with EPERM.
//!
//! On unless the manifest says `Unconfined`. (Kubernetes' own default is off.)

use k8s_openapi::api::core::v1::Container;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator, LinuxSyscall,
    LinuxSyscallBuilder,
};

use crate::manifest::PodManifest;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Allowed to all. The 32-bit forms are for i386 programs.
const ALLOWED: &[&str] = &[
    // Files and directories.
    "access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat \
     faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 \
     fchownat fcntl fcntl64 fdatasync flock fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate \
     ftruncate64 futimesat getcwd getdents getdents64 ioctl lchown lchown32 link linkat listmount \
     _llseek lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open openat \
     openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv \
     rename renameat renameat2 rmdir sendfile sendfile64 splice stat stat64 statfs statfs64 statmount \
     statx symlink symlinkat sync sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat \
     utime utimensat utimensat_time64 utimes vmsplice write writev",
    // Extended attributes.
    "fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat \
     llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat",
    // Waiting for events.
    "epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait \
     epoll_wait_old eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 \
     inotify_rm_watch _newselect pause pipe pipe2 poll ppoll ppoll_time64 pselect6 pselect6_time64 \
     select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime \
     timerfd_settime64",
    // Asynchronous input and output, but for io_uring, which has had too many holes.
    "io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioprio_get \
     ioprio_set",
    // Sockets; making them is below.
    "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg \
     recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    // Memory.
    "brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 \
     mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free \
     pkey_mprotect process_mrelease remap_file_pages",
    // Processes and threads.
    "arch_prctl capget capset execve execveat exit exit_group fork get_robust_list get_thread_area \
     getcpu getpgid getpgrp getpid getppid getpriority getrlimit getrusage getsid gettid kill \
     modify_ldt pidfd_open pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev ptrace \
     restart_syscall rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr \
     sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 \
     sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield set_robust_list \
     set_thread_area set_tid_address setpgid setpriority setrlimit setsid sysinfo tgkill times tkill \
     ugetrlimit uname uretprobe vfork wait4 waitid waitpid",
    // Users and groups.
    "getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32 \
     getresuid getresuid32 getuid getuid32 setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
     setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid \
     setreuid32 setuid setuid32",
    // Signals.
    "rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend \
     rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn",
    // Time. Setting the clock needs a capability, which adjtimex asks for itself.
    "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime \
     clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer \
     time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime \
     timer_settime64",
    // Between processes.
    "futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake ipc mq_getsetattr mq_notify \
     mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl \
     msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget",
    // Randomness, and confining oneself further.
    "getrandom landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp",
];

/// Allowed with a capability, refused without.
const WITH_CAPABILITY: &[(Capability, &str)] = &[
    (Capability::Bpf, "bpf"),
    (Capability::DacReadSearch, "open_by_handle_at"),
    (Capability::Perfmon, "perf_event_open"),
    (
        Capability::SysAdmin,
        "bpf fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount \
         open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount \
         umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (
        Capability::SysModule,
        "delete_module finit_module init_module",
    ),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (Capability::SysPacct, "acct"),
    (Capability::SysPtrace, "kcmp pidfd_getfd process_madvise"),
    (Capability::SysRawio, "ioperm iopl"),
    (
        Capability::SysTime,
        "clock_settime clock_settime64 settimeofday stime",
    ),
    (Capability::SysTtyConfig, "vhangup"),
    (Capability::Syslog, "syslog"),
];

/// Known, and refused to all.
const REFUSED: &str = "_sysctl add_key create_module get_kernel_syms kexec_file_load kexec_load keyctl \
    migrate_pages move_pages nfsservctl pivot_root query_module request_key swapoff swapon sysfs uselib \
    userfaultfd ustat vm86 vm86old";

/// clone(2) flags that make namespaces.
const NAMESPACES: u64 = 0x7e02_0000;
/// personality(2): Linux, Linux with 16-bit user ids, the same without address
/// randomisation, and asking.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// Socket families that reach past the container: the kernel's crypto (attack
/// surface) and the machine's host (vsock, where Hull's agent listens).
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// The profile for a container; None where the manifest says `Unconfined`.
pub fn profile(
    manifest: &PodManifest,
    container: &Container,
    capabilities: &Capabilities,
) -> Result<Option<LinuxSeccomp>, OciSpecError> {
    let own = container
        .security_context
        .as_ref()
        .and_then(|c| c.seccomp_profile.as_ref());
    let pod = manifest
        .spec()
        .security_context
        .as_ref()
        .and_then(|c| c.seccomp_profile.as_ref());
    if own
        .or(pod)
        .is_some_and(|profile| profile.type_ == "Unconfined")
    {
        return Ok(None);
    }
    default_profile(capabilities).map(Some)
}

fn default_profile(capabilities: &Capabilities) -> Result<LinuxSeccomp, OciSpecError> {
    let mut syscalls = vec![allow(ALLOWED.iter().flat_map(|group| words(group)), &[])?];
    let is_allowed = |syscall: &str| {
        let mut needed = WITH_CAPABILITY
            .iter()
            .filter(|(_, calls)| words(calls).any(|call| call == syscall));
        needed.any(|(capability, _)| capabilities.contains(capability))
    };
    let mut guarded: Vec<&str> = WITH_CAPABILITY
        .iter()
        .flat_map(|(_, calls)| words(calls))
        .collect();
    guarded.sort_unstable();
    guarded.dedup();
    let (granted, denied): (Vec<&str>, Vec<&str>) =
        guarded.into_iter().partition(|call| is_allowed(call));
    if !granted.is_empty() {
        syscalls.push(allow(granted.into_iter(), &[])?);
    }
    syscalls.push(
        LinuxSyscallBuilder::default()
            .names(
                denied
                    .into_iter()
                    .chain(words(REFUSED))
                    .map(ToOwned::to_owned)
                    .collect::<Vec<_>>(),
            )
            .action(LinuxSeccompAction::ScmpActErrno)
            .errno_ret(EPERM)
            .build()?,
    );
    if capabilities.contains(&Capability::SysAdmin) {
        syscalls.push(allow(["clone", "clone3"].into_iter(), &[])?);
    } else {
        // clone3's flags are in memory, where a filter can't see them: the default
        // answer, ENOSYS, makes libraries take clone.
        let no_namespace = argument(LinuxSeccompOperator::ScmpCmpMaskedEq, NAMESPACES, Some(0))?;
        syscalls.push(allow(["clone"].into_iter(), &[no_namespace])?);
    }
    for personality in PERSONALITIES {
        let equal = argument(LinuxSeccompOperator::ScmpCmpEq, personality, None)?;
        syscalls.push(allow(["personality"].into_iter(), &[equal])?);
    }
    let families = [
        argument(LinuxSeccompOperator::ScmpCmpLt, AF_ALG, None)?,
        argument(LinuxSeccompOperator::ScmpCmpEq, AF_ALG + 1, None)?,
        argument(LinuxSeccompOperator::ScmpCmpGt, AF_VSOCK, None)?,
    ];
    for family in families {
        syscalls.push(allow(["socket"].into_iter(), &[family])?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(ENOSYS)
        .architectures(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86])
        .syscalls(syscalls)
        .build()
}

fn words(list: &'static str) -> impl Iterator<Item = &'static str> {
    list.split_ascii_whitespace()
}

fn allow<'a>(
    names: impl Iterator<Item = &'a str>,
    arguments: &[LinuxSeccompArg],
) -> Result<LinuxSyscall, OciSpecError> {
    let rule = LinuxSyscallBuilder::default()
        .names(names.map(ToOwned::to_owned).collect::<Vec<_>>())
        .action(LinuxSeccompAction::ScmpActAllow);
    if arguments.is_empty() {
        rule.build()
    } else {
        rule.args(arguments.to_vec()).build()
    }
}

/// A condition on the first argument. For `ScmpCmpMaskedEq` the first value is the
/// mask and the second what must be left.
fn argument(
    operator: LinuxSeccompOperator,
    value: u64,
    second: Option<u64>,
) -> Result<LinuxSeccompArg, OciSpecError> {
    let rule = LinuxSeccompArgBuilder::default()
        .index(0_usize)
        .op(operator)
        .value(value);
    match second {
        Some(second) => rule.value_two(second).build(),
        None => rule.build(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names(profile: &LinuxSeccomp, action: LinuxSeccompAction) -> BTreeSet<String> {
        let rules = profile.syscalls().iter().flatten();
        rules
            .filter(|rule| rule.action() == action && rule.args().is_none())
            .flat_map(|rule| rule.names().clone())
            .collect()
    }

    fn with(capabilities: &[Capability]) -> LinuxSeccomp {
        default_profile(&capabilities.iter().copied().collect()).unwrap()
    }

    #[test]
    fn capabilities_open_their_calls_and_no_others() {
        let plain = with(&[]);
        let refused = names(&plain, LinuxSeccompAction::ScmpActErrno);
        for call in [
            "mount",
            "setns",
            "unshare",
            "bpf",
            "kexec_load",
            "keyctl",
            "chroot",
            "userfaultfd",
        ] {
            assert!(refused.contains(call), "{call}");
        }
        let allowed = names(
            &with(&[Capability::SysChroot, Capability::Syslog]),
            LinuxSeccompAction::ScmpActAllow,
        );
        assert!(allowed.contains("chroot") && allowed.contains("syslog"));
        assert!(!allowed.contains("mount") && !allowed.contains("clone3"));
        let admin = names(
            &with(&[Capability::SysAdmin]),
            LinuxSeccompAction::ScmpActAllow,
        );
        assert!(admin.contains("mount") && admin.contains("clone3") && admin.contains("bpf"));
    }

    #[test]
    fn no_call_is_both_allowed_and_refused() {
        for capabilities in [
            &[][..],
            &[Capability::SysAdmin],
            &[Capability::Syslog, Capability::Bpf],
        ] {
            let profile = with(capabilities);
            let allowed = names(&profile, LinuxSeccompAction::ScmpActAllow);
            let refused = names(&profile, LinuxSeccompAction::ScmpActErrno);
            assert_eq!(
                allowed.intersection(&refused).collect::<Vec<_>>(),
                Vec::<&String>::new()
            );
        }
    }

    #[test]
    fn what_is_not_known_is_not_there() {
        let profile = with(&[]);
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActErrno);
        assert_eq!(profile.default_errno_ret(), Some(ENOSYS));
        let known = names(&profile, LinuxSeccompAction::ScmpActAllow);
        assert!(!known.contains("io_uring_setup") && !known.contains("socket"));
    }

    #[test]
    fn containers_do_not_reach_the_agent_by_vsock() {
        let profile = with(&[]);
        let rules: Vec<_> = profile
            .syscalls()
            .iter()
            .flatten()
            .filter(|rule| rule.names().iter().any(|name| name == "socket"))
            .map(|rule| rule.args().as_ref().unwrap()[0])
            .collect();
        let passes = |family: u64| {
            rules.iter().any(|rule| match rule.op() {
                LinuxSeccompOperator::ScmpCmpLt => family < rule.value(),
                LinuxSeccompOperator::ScmpCmpEq => family == rule.value(),
                LinuxSeccompOperator::ScmpCmpGt => family > rule.value(),
                _ => true,
            })
        };
        let passing: Vec<u64> = (0..46).filter(|family| passes(*family)).collect();
        assert_eq!(passing.len(), 44);
        assert!(!passes(AF_ALG) && !passes(AF_VSOCK));
    }
}
