//! From one process to two: the launcher, which ends, and the jailed child.

use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::fs::Mode;
use rustix::thread::{Gid, Uid};

use super::{AtStep, JailError, Step};
use crate::channel::Channel;
use crate::control::Event;

/// The host name in the jail: the host's own is none of the guest's business.
const HOST_NAME: &[u8] = b"hull";

/// All that there are, but for time, which has nothing to hide.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// Continues in a child of the caller's parent, in namespaces of its own, with all
/// capabilities in them and ids mapped. The calling process exits.
pub(super) fn into_namespaces(control: &Channel) -> Result<(), JailError> {
    if !rustix::process::geteuid().is_root() {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied)).at(Step::Root);
    }
    // The child starts as a copy of this thread alone: locks that others hold would stay locked.
    let threads = fs::read_dir("/proc/self/task").at(Step::Threads)?.count();
    if threads != 1 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).at(Step::Threads);
    }
    let (go, mapped) = io::pipe().at(Step::Pipe)?;
    match clone_into_namespaces()? {
        Clone::Launcher { pid, process } => {
            drop(go);
            let finished = finish(control, pid, &process, &mapped);
            // The child ends when this is closed: not before this process has told why, and ended.
            std::mem::forget(mapped);
            finished.map(|()| std::process::exit(0))
        }
        Clone::Jailed => {
            drop(mapped);
            wait_for_maps(go);
            Ok(())
        }
    }
}

enum Clone {
    Launcher { pid: i32, process: OwnedFd },
    Jailed,
}

fn clone_into_namespaces() -> Result<Clone, JailError> {
    let mut pidfd: libc::c_int = -1;
    // CLONE_PARENT: the supervisor, not this launcher, is told of the child's end and reaps it.
    let flags = NAMESPACES | libc::CLONE_PARENT | libc::CLONE_PIDFD;
    // SAFETY: an all-zero `clone_args` is valid: no stack (the child goes on with a copy
    // of ours), no TLS, no exit signal (with CLONE_PARENT it is the caller's own).
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.cast_unsigned());
    arguments.pidfd = std::ptr::from_mut(&mut pidfd).expose_provenance() as u64;
    // SAFETY: like fork(2), without CLONE_VM; the process has one thread, so the child finds no
    // lock of another. `arguments` and `pidfd` outlive the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut arguments),
            size_of::<libc::clone_args>(),
        )
    };
    match i32::try_from(pid) {
        Ok(0) => Ok(Clone::Jailed),
        Ok(pid) if pid > 0 => Ok(Clone::Launcher {
            pid,
            // SAFETY: the kernel has just made this descriptor for us.
            process: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        _ => Err(io::Error::last_os_error()).at(Step::Namespaces),
    }
}

/// The launcher's rest.
fn finish(
    control: &Channel,
    pid: i32,
    process: &OwnedFd,
    mut mapped: &PipeWriter,
) -> Result<(), JailError> {
    // The supervisor must know the child before anything else can fail: nobody else reaps it.
    let event = Event::Jailed { pid };
    control
        .send(&event, &[process.as_fd()])
        .map_err(JailError::Tell)?;
    for map in ["uid_map", "gid_map"] {
        let own = fs::read_to_string(format!("/proc/self/{map}")).at(Step::ReadIdMap)?;
        let identity = identity_map(&own);
        fs::write(format!("/proc/{pid}/{map}"), identity).at(Step::WriteIdMap)?;
    }
    mapped.write_all(&[1]).at(Step::Pipe)
}

/// Every id that exists in our user namespace, mapped to itself: from lines of
/// "inside outside count" as user_namespaces(7) has them.
fn identity_map(own: &str) -> String {
    own.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (inside, _, count) = (fields.next()?, fields.next()?, fields.next()?);
            Some(format!("{inside} {inside} {count}\n"))
        })
        .collect()
}

fn wait_for_maps(mut go: PipeReader) {
    let mut byte = [0];
    if go.read_exact(&mut byte).is_err() {
        // The launcher has failed, and says so itself.
        std::process::exit(1);
    }
}

/// Becomes root of the jail and nothing else.
pub(super) fn identify() -> Result<(), JailError> {
    rustix::thread::set_thread_groups(&[]).at(Step::Identity)?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).at(Step::Identity)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).at(Step::Identity)?;
    rustix::system::sethostname(HOST_NAME).at(Step::Identity)?;
    rustix::process::setsid().at(Step::Identity)?;
    // The guest's modes are the files' modes.
    rustix::process::umask(Mode::empty());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_mapped_to_itself() {
        let host = "         0          0 4294967295\n";
        let rootless = "0 1000 1\n1 100000 65536\n";

        let maps = [identity_map(host), identity_map(rootless)];

        assert_eq!(maps, ["0 0 4294967295\n", "0 0 1\n1 1 65536\n"]);
    }
}
