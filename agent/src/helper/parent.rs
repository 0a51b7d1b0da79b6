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

/// What a helper will be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To make infra: it makes the namespaces at once.
    Infra,
    /// To make a process in a container.
    Container,
}

const INFRA: u8 = b'i';
const CONTAINER: u8 = b'c';

/// Asks the parent for a helper that is at the other end of `socket`.
pub fn ask(parent: impl AsFd, kind: Kind, socket: BorrowedFd<'_>) -> io::Result<()> {
    let kind = match kind {
        Kind::Infra => INFRA,
        Kind::Container => CONTAINER,
    };
    message::send(parent, &[kind], &[socket])
}

/// Runs the parent, and each helper. Its socket is descriptor 0.
pub fn main() -> ExitCode {
    match wait() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hull-agent: the helpers' parent failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns in the parent when the agent has gone, and in each helper when it has done its work.
fn wait() -> io::Result<ExitCode> {
    // Descriptor 0 becomes a container's stdin, so the socket moves away from it.
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    drop(null);
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    reap_children_unseen(true);
    loop {
        let Some((kind, helper)) = next(&socket)? else {
            return Ok(ExitCode::SUCCESS);
        };
        // SAFETY: this process has one thread, so the child may go on as it likes.
        match unsafe { nix::unistd::fork() } {
            Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => {
                drop(socket);
                reap_children_unseen(false);
                return Ok(run::main(&helper, kind));
            }
            // The agent sees that the helper's end is closed.
            Err(error) => eprintln!("hull-agent: no helper can be started: {error}"),
        }
    }
}

fn next(socket: &OwnedFd) -> io::Result<Option<(Kind, OwnedFd)>> {
    let mut kind = [0];
    let (count, fds) = message::receive(socket, &mut kind, 1)?;
    if count == 0 {
        return Ok(None);
    }
    let helper = fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
    let kind = if kind == [INFRA] {
        Kind::Infra
    } else {
        Kind::Container
    };
    Ok(Some((kind, helper)))
}

fn reap_children_unseen(unseen: bool) {
    let action = if unseen { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: neither action runs code of ours.
    unsafe { libc::signal(libc::SIGCHLD, action) };
}
