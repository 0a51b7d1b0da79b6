//! The system calls that each class of `hull-vmm`'s threads may make. Any other kills the process.
//!
//! To find a call that is missing: the process dies of signal 31 (SIGSYS), and the kernel
//! writes `audit: type=1326 … comm="vcpu0" … syscall=N` to its log (`dmesg`, or auditd's
//! log where that runs) with the thread's name and the call's number. `strace -f -p PID`
//! shows it with its arguments. Add it where it belongs, with what it is needed for.

/// A system call with what its arguments must be.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub number: libc::c_long,
    pub arguments: Arguments,
}

/// Which arguments are allowed.
#[derive(Debug, Clone, Copy)]
pub enum Arguments {
    Any,
    /// One 32-bit argument, by its place, is one of these.
    OneOf(u8, &'static [u32]),
    /// Bits that one 32-bit argument must not have, and bits that it must have.
    Bits {
        place: u8,
        without: u32,
        with: u32,
    },
}

const fn any(number: libc::c_long) -> Call {
    Call {
        number,
        arguments: Arguments::Any,
    }
}

const fn one_of(number: libc::c_long, place: u8, values: &'static [u32]) -> Call {
    Call {
        number,
        arguments: Arguments::OneOf(place, values),
    }
}

const fn never_executable(number: libc::c_long) -> Call {
    Call {
        number,
        arguments: Arguments::Bits {
            place: 2,
            without: libc::PROT_EXEC.cast_unsigned(),
            with: 0,
        },
    }
}

/// What every thread needs: memory, locks, time, its end, and to say why it panicked.
const EVERY: &[Call] = &[
    // malloc, and the stacks of threads
    any(libc::SYS_brk),
    any(libc::SYS_madvise),
    never_executable(libc::SYS_mmap),
    never_executable(libc::SYS_mprotect),
    any(libc::SYS_mremap),
    any(libc::SYS_munmap),
    any(libc::SYS_sched_getaffinity),
    // locks, channels, joining
    any(libc::SYS_futex),
    any(libc::SYS_sched_yield),
    // glibc falls back to it where the vDSO has no usable clock
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_restart_syscall),
    // HashMap's keys, and malloc's
    any(libc::SYS_getrandom),
    // signals: the handlers of kicks, and the stack of std's overflow handler
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_sigaltstack),
    // where that handler finds another fault it leaves it to the kernel, so that the process ends by the signal
    one_of(
        libc::SYS_rt_sigaction,
        0,
        &[libc::SIGSEGV.cast_unsigned(), libc::SIGBUS.cast_unsigned()],
    ),
    any(libc::SYS_getpid),
    any(libc::SYS_gettid),
    any(libc::SYS_tgkill),
    // descriptors that it has
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_close),
    // std, built with checks, looks whether a descriptor is open before it closes it
    one_of(libc::SYS_fcntl, 1, &[libc::F_GETFD.cast_unsigned()]),
    // the panic hook tells the supervisor
    any(libc::SYS_sendmsg),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

/// `_IOC(direction, kind, number, size)`; direction 1 writes to the kernel, 2 reads.
const fn ioctl(direction: u32, kind: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | kind << 8 | number
}

/// Of `KVMIO`.
const fn kvm_ioctl(direction: u32, number: u32, size: u32) -> u32 {
    ioctl(direction, 0xAE, number, size)
}

const KVM_RUN: u32 = kvm_ioctl(0, 0x80, 0);
const KVM_GET_REGS: u32 = kvm_ioctl(2, 0x81, 144);
const KVM_SET_USER_MEMORY_REGION: u32 = kvm_ioctl(1, 0x46, 32);
const KVM_SET_GSI_ROUTING: u32 = kvm_ioctl(1, 0x6A, 8);
const KVM_KVMCLOCK_CTRL: u32 = kvm_ioctl(0, 0xAD, 0);
const KVM_IRQFD: u32 = kvm_ioctl(1, 0x76, 32);
const KVM_IOEVENTFD: u32 = kvm_ioctl(1, 0x79, 64);
const KVM_GET_MP_STATE: u32 = kvm_ioctl(2, 0x98, 4);
const KVM_GET_SREGS: u32 = kvm_ioctl(2, 0x83, 312);
const KVM_GET_XSAVE: u32 = kvm_ioctl(2, 0xA4, 4096);
const KVM_GET_XCRS: u32 = kvm_ioctl(2, 0xA6, 392);
const KVM_GET_DEBUGREGS: u32 = kvm_ioctl(2, 0xA1, 128);
const KVM_GET_LAPIC: u32 = kvm_ioctl(2, 0x8E, 1024);
const KVM_GET_MSRS: u32 = kvm_ioctl(3, 0x88, 8);
const KVM_GET_VCPU_EVENTS: u32 = kvm_ioctl(2, 0x9F, 64);
const KVM_GET_CLOCK: u32 = kvm_ioctl(2, 0x7C, 48);

/// Configuration accesses of the guest are done here, too: routes of MSI-X vectors,
/// notifications of queues, and what a device makes before its threads start.
const VCPU: &[Call] = &[
    one_of(
        libc::SYS_ioctl,
        1,
        &[
            KVM_RUN,
            // where the guest was when KVM could not go on; and, with the others, a snapshot
            KVM_GET_REGS,
            KVM_GET_MP_STATE,
            KVM_GET_SREGS,
            KVM_GET_XSAVE,
            KVM_GET_XCRS,
            KVM_GET_DEBUGREGS,
            KVM_GET_LAPIC,
            KVM_GET_MSRS,
            KVM_GET_VCPU_EVENTS,
            // after a pause
            KVM_KVMCLOCK_CTRL,
            KVM_SET_GSI_ROUTING,
            KVM_IRQFD,
            KVM_IOEVENTFD,
        ],
    ),
    any(libc::SYS_eventfd2),
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    one_of(libc::SYS_fcntl, 1, DUPLICATE),
];

/// `F_DUPFD_CLOEXEC`, as `try_clone` does it.
const DUPLICATE: &[u32] = &[libc::F_DUPFD_CLOEXEC.cast_unsigned()];

/// `F_DUPFD_CLOEXEC`, and what makes a descriptor non-blocking.
const DESCRIPTOR_FLAGS: &[u32] = &[
    libc::F_DUPFD_CLOEXEC.cast_unsigned(),
    libc::F_GETFL.cast_unsigned(),
    libc::F_SETFL.cast_unsigned(),
];

const FIONBIO: u32 = 0x5421;

/// What is asked of a tap while it is in use (linux/if_tun.h).
const TUNSETOFFLOAD: u32 = 0x4004_54D0;
const TUNSETQUEUE: u32 = 0x4004_54D9;
/// What is asked of a descriptor that is to become one.
const TUNSETVNETHDRSZ: u32 = 0x4004_54D8;

/// Of `VHOST_VIRTIO` (linux/vhost.h).
const fn vhost_ioctl(direction: u32, number: u32, size: u32) -> u32 {
    ioctl(direction, 0xAF, number, size)
}

const VHOST_GET_FEATURES: u32 = vhost_ioctl(2, 0x00, 8);
const VHOST_SET_FEATURES: u32 = vhost_ioctl(1, 0x00, 8);
const VHOST_SET_OWNER: u32 = vhost_ioctl(0, 0x01, 0);
const VHOST_SET_MEM_TABLE: u32 = vhost_ioctl(1, 0x03, 8);
const VHOST_SET_VRING_NUM: u32 = vhost_ioctl(1, 0x10, 8);
const VHOST_SET_VRING_ADDR: u32 = vhost_ioctl(1, 0x11, 40);
const VHOST_SET_VRING_BASE: u32 = vhost_ioctl(1, 0x12, 8);
const VHOST_SET_VRING_KICK: u32 = vhost_ioctl(1, 0x20, 8);
const VHOST_SET_VRING_CALL: u32 = vhost_ioctl(1, 0x21, 8);
const VHOST_NET_SET_BACKEND: u32 = vhost_ioctl(1, 0x30, 8);

const EVENTS: &[Call] = &[
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_poll),
    any(libc::SYS_ppoll),
    any(libc::SYS_eventfd2),
];

/// Reads and writes on descriptors that it has, the sockets of vsock, in pairs only, and what is asked of
/// taps and vhost-net: it reaches nobody that the supervisor didn't hand it.
const DEVICE: &[Call] = &[
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_preadv2),
    any(libc::SYS_pwritev2),
    any(libc::SYS_lseek),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fallocate),
    one_of(libc::SYS_socketpair, 0, &[libc::AF_UNIX.cast_unsigned()]),
    any(libc::SYS_sendto),
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_shutdown),
    one_of(libc::SYS_fcntl, 1, DESCRIPTOR_FLAGS),
    one_of(
        libc::SYS_ioctl,
        1,
        &[
            FIONBIO,
            TUNSETOFFLOAD,
            TUNSETQUEUE,
            VHOST_GET_FEATURES,
            VHOST_SET_FEATURES,
            VHOST_SET_OWNER,
            VHOST_SET_MEM_TABLE,
            VHOST_SET_VRING_NUM,
            VHOST_SET_VRING_ADDR,
            VHOST_SET_VRING_BASE,
            VHOST_SET_VRING_KICK,
            VHOST_SET_VRING_CALL,
            VHOST_NET_SET_BACKEND,
        ],
    ),
    // rate limits
    any(libc::SYS_timerfd_create),
    any(libc::SYS_timerfd_settime),
];

/// Memory that comes: a piece of this process's for the guest.
const MEMORY: &[Call] = &[one_of(libc::SYS_ioctl, 1, &[KVM_SET_USER_MEMORY_REGION])];

/// What the file server does to files, with the credentials of those who ask.
const FILE_SYSTEM: &[Call] = &[
    any(libc::SYS_openat),
    any(libc::SYS_openat2),
    any(libc::SYS_dup),
    any(libc::SYS_fcntl),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_preadv2),
    any(libc::SYS_pwritev2),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_lseek),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_syncfs),
    any(libc::SYS_flock),
    any(libc::SYS_fstat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    any(libc::SYS_getdents64),
    any(libc::SYS_linkat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_readlinkat),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat),
    any(libc::SYS_renameat2),
    any(libc::SYS_utimensat),
    any(libc::SYS_fchmod),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchownat),
    any(libc::SYS_fgetxattr),
    any(libc::SYS_fsetxattr),
    any(libc::SYS_flistxattr),
    any(libc::SYS_fremovexattr),
    any(libc::SYS_getxattr),
    any(libc::SYS_setxattr),
    any(libc::SYS_listxattr),
    any(libc::SYS_removexattr),
    // what a guest knows of its files, in a snapshot: whether a name still stands for the same file
    any(libc::SYS_pipe2),
    any(libc::SYS_name_to_handle_at),
    // attributes of symbolic links and special files, by /proc/self/fd
    any(libc::SYS_fchdir),
    // a working directory and umask of its own
    one_of(libc::SYS_unshare, 0, &[libc::CLONE_FS.cast_unsigned()]),
    any(libc::SYS_umask),
    // the credentials of a request, and back
    any(libc::SYS_geteuid),
    any(libc::SYS_getegid),
    any(libc::SYS_setresuid),
    any(libc::SYS_setresgid),
    any(libc::SYS_setgroups),
    any(libc::SYS_capget),
    any(libc::SYS_capset),
    // libcap-ng looks at what there is
    one_of(
        libc::SYS_prctl,
        0,
        &[
            libc::PR_CAPBSET_READ.cast_unsigned(),
            libc::PR_CAP_AMBIENT.cast_unsigned(),
            libc::PR_GET_NO_NEW_PRIVS.cast_unsigned(),
        ],
    ),
];

/// The control channel, and what a connection of the supervisor's needs.
const CONTROL: &[Call] = &[
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_shutdown),
    // the handler of kicks
    any(libc::SYS_rt_sigaction),
    one_of(libc::SYS_fcntl, 1, DESCRIPTOR_FLAGS),
    one_of(
        libc::SYS_ioctl,
        1,
        &[FIONBIO, TUNSETOFFLOAD, TUNSETVNETHDRSZ, KVM_GET_CLOCK],
    ),
    // devices that go on after a snapshot
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_eventfd2),
    // what a disk is that is put in, and how large
    any(libc::SYS_fstat),
    any(libc::SYS_lseek),
];

/// Making threads, and what a thread does until its own filter stands.
const NURSERY: &[Call] = &[
    // glibc tries the new call first
    any(libc::SYS_clone3),
    Call {
        number: libc::SYS_clone,
        arguments: Arguments::Bits {
            place: 0,
            without: 0,
            with: libc::CLONE_THREAD.cast_unsigned(),
        },
    },
    any(libc::SYS_rseq),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_prlimit64),
    any(libc::SYS_capset),
    one_of(
        libc::SYS_prctl,
        0,
        &[
            libc::PR_SET_NAME.cast_unsigned(),
            libc::PR_SET_NO_NEW_PRIVS.cast_unsigned(),
        ],
    ),
    one_of(libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER]),
];

/// The filters by their names, each with the lists that it allows. `nursery` is for the thread that makes threads: all that
/// any thread may do, and what making one takes.
pub const FILTERS: [(&str, &[&[Call]]); 6] = [
    (
        "nursery",
        &[
            EVERY,
            VCPU,
            EVENTS,
            DEVICE,
            MEMORY,
            FILE_SYSTEM,
            CONTROL,
            NURSERY,
        ],
    ),
    ("vcpu", &[EVERY, VCPU]),
    ("device", &[EVERY, EVENTS, DEVICE]),
    ("memory", &[EVERY, EVENTS, MEMORY]),
    ("file-system", &[EVERY, EVENTS, FILE_SYSTEM]),
    ("control", &[EVERY, EVENTS, CONTROL]),
];
