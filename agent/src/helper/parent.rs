//! The process that helpers are forked from. It waits for nothing but that, and has one thread and a socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use nix::unistd::ForkResult;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use super::run;
use crate::message;

/// Its name in the process list, by which the agent's program knows its role.
pub const NAME: &str = "helpers";

/// Asks the parent for a helper that is at the other end of `socket`.
pub fn ask(parent: impl AsFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    message::send(parent, &[0], &[socket])
}

/// Runs the parent, and each helper. Returns in the parent when the agent has gone, and in each helper when it has done
/// its work.
pub fn run(socket: OwnedFd) -> io::Result<ExitCode> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    reap_children_unseen(true);
    while let Some(helper) = next(&socket)? {
        // SAFETY: this process has one thread, so the child may go on as it likes.
        match unsafe { nix::unistd::fork() } {
            Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => {
                drop(socket);
                reap_children_unseen(false);
                return run::main(&helper);
            }
            // The agent sees that the helper's end is closed.
            Err(error) => eprintln!("hull-agent: no helper can be started: {error}"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn next(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let (count, fds) = message::receive(socket, &mut [0], 1)?;
    if count == 0 {
        return Ok(None);
    }
    let helper = fds.into_iter().next();
    helper.map(Some).ok_or(io::ErrorKind::InvalidData.into())
}

fn reap_children_unseen(unseen: bool) {
    let action = if unseen { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: neither action runs code of ours.
    unsafe { libc::signal(libc::SIGCHLD, action) };
}
