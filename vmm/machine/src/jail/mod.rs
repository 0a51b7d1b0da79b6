//! What `hull-vmm` gives up before the guest runs.
//!
//! ```text
//! hull-vmm (root, the supervisor's namespaces)
//!    opens a detached copy of each share's mounts
//!    clone3: user, mount, PID, IPC, UTS, network and cgroup namespaces
//!    ├─ launcher: tells the supervisor the child, writes its id maps, exits
//!    └─ jailed, a child of the supervisor, PID 1:
//!       a read-only root that holds nothing but shares/N
//!       resource limits; no descriptor but its own; no capability but the file
//!       server's; no new privileges; not dumpable
//! ```
//!
//! The user namespace maps every id to itself, so that files in the shares keep their
//! owners. Root in the jail is therefore root as files see it, and what keeps it from
//! the host's files is that none can be named: no host mount is reachable, not even
//! through the one descriptor on procfs, whose mount ends at this process's `fd`.
//!
//! The last step, system calls and capabilities by thread, is [`crate::threads`].

mod launch;
mod privileges;
mod root;
pub mod seccomp;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use crate::channel::{Channel, ChannelError};

pub(crate) use privileges::set_capabilities;
pub use privileges::{FILE_SERVER_CAPABILITIES, MAX_OPEN_FILES};

/// How the process that serves the shares reaches them.
#[derive(Debug)]
pub struct Shares {
    /// The directory of each share, in the configuration's order, by an absolute path.
    pub roots: Vec<PathBuf>,
    /// This process's `/proc/self/fd`, an `O_PATH` descriptor on a mount of that
    /// directory alone: `..` leads nowhere.
    pub proc_self_fd: OwnedFd,
}

/// A step on the way into the jail, and what stops it on hosts that are set up in unusual ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Step {
    #[error("checking for root: hull-vmm must be started as root")]
    Root,
    #[error("counting threads: the process has more than one")]
    Threads,
    #[error("copying the mounts of share {0} (open_tree needs CAP_SYS_ADMIN)")]
    CopyShare(usize),
    #[error("making a pipe between the launcher and the jail")]
    Pipe,
    #[error(
        "making namespaces (CAP_SYS_ADMIN; sysctl user.max_user_namespaces and its like; \
         a container's own seccomp profile may forbid it)"
    )]
    Namespaces,
    #[error("reading /proc/self/uid_map or gid_map")]
    ReadIdMap,
    #[error("writing the jail's uid_map or gid_map (CAP_SETUID, CAP_SETGID, CAP_SETFCAP)")]
    WriteIdMap,
    #[error("setting user, groups, session or host name in the jail")]
    Identity,
    #[error("opening /proc/self/fd (is /proc mounted?)")]
    ProcSelfFd,
    #[error("opening /dev/null")]
    DevNull,
    #[error("making the jail's root (a tmpfs in a user namespace)")]
    MakeRoot,
    #[error("mounting share {0} in the jail")]
    MountShare(usize),
    #[error(
        "entering the jail's root (pivot_root fails when the host's root is the initial ramfs)"
    )]
    EnterRoot,
    #[error("closing the descriptors that aren't the machine's")]
    CloseOthers,
    #[error("limiting resources")]
    Limits,
    #[error("dropping capabilities")]
    Capabilities,
    #[error("giving up new privileges and dumps")]
    NoNewPrivileges,
}

/// Why the process could not be jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("entering the jail: {step}")]
    Step {
        step: Step,
        #[source]
        source: io::Error,
    },
    #[error("entering the jail: telling the supervisor of the jailed process")]
    Tell(#[source] ChannelError),
}

/// Names the step that an operation belongs to.
trait AtStep<T> {
    fn at(self, step: Step) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> AtStep<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, JailError> {
        self.map_err(|error| JailError::Step {
            step,
            source: error.into(),
        })
    }
}

/// Jails this process. Returns in the jailed child only: the calling process, when all
/// went well, exits here with status 0.
///
/// `shares` are directories of the supervisor's mount namespace. Mounts that appear
/// there later appear in the jail. `keep` are the machine's other descriptors; all that
/// are neither in it nor made here are closed, but for `control` and standard input,
/// output and error, which become `/dev/null`.
///
/// # Errors
/// In either process, with the step that failed. Both must exit then.
pub fn enter(
    control: &Channel,
    shares: Vec<OwnedFd>,
    keep: &[BorrowedFd<'_>],
) -> Result<Shares, JailError> {
    let trees = root::copy_mounts(&shares)?;
    drop(shares);
    privileges::raise_open_files();
    launch::into_namespaces(control)?;

    // Only the jailed process comes here.
    launch::identify()?;
    let proc_self_fd = root::proc_self_fd()?;
    let null = root::dev_null()?;
    let roots = root::enter(trees)?;
    for standard in [
        rustix::stdio::dup2_stdin(&null),
        rustix::stdio::dup2_stdout(&null),
        rustix::stdio::dup2_stderr(&null),
    ] {
        standard.at(Step::DevNull)?;
    }
    drop(null);

    let mut kept = vec![control.as_fd(), proc_self_fd.as_fd()];
    kept.extend_from_slice(keep);
    privileges::close_others(&kept)?;
    privileges::limit()?;
    privileges::drop_all_but_file_server()?;
    Ok(Shares {
        roots,
        proc_self_fd,
    })
}
