//! A process is made with its stdio attached to the streams that its call names.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hull_protocol::agent::{AttachRequest, Streams as StreamNumbers};
use tokio::net::UnixListener;

use super::Pod;
use crate::container::seccomp::Filter;
use crate::container::user::User;
use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result};
use crate::helper::Request;
use crate::process::Process;
use crate::stdio::{self, Claimed, Replaceable, Terminal, Until};

/// How long a terminal may take to arrive after its process has been made.
const CONSOLE: Duration = Duration::from_secs(5);

/// Stdio of a process about to be made.
pub(super) struct Attached<'a> {
    pub claimed: Claimed,
    pub terminal: bool,
    /// Where a socket for the terminal may be made.
    pub console: PathBuf,
    pub user: &'a User,
    pub filter: Option<&'a Filter>,
    pub until: Until,
}

impl Pod {
    pub(super) async fn claim(&self, numbers: &StreamNumbers) -> Result<Claimed> {
        Ok(Claimed {
            stdin: self.streams.claim(numbers.stdin).await?,
            stdout: self.streams.claim(numbers.stdout).await?,
            stderr: if numbers.tty {
                None
            } else {
                self.streams.claim(numbers.stderr).await?
            },
        })
    }

    /// Gives a container's first process other streams than it had, in a machine that goes on elsewhere.
    pub async fn attach(&self, request: &AttachRequest) -> Result<()> {
        let container = self.container(&request.container_id)?;
        let numbers = request.streams.clone().unwrap_or_default();
        if numbers.tty != container.first.terminal.is_some() {
            return Err(Error::State(
                "the container has been created otherwise, with a terminal or without".into(),
            ));
        }
        let claimed = self.claim(&numbers).await?;
        container.first.streams.replace(claimed)?;
        container.abandon_execs();
        Ok(())
    }

    /// Runs a helper for a process, with its stdio attached.
    pub(super) async fn run_helper(
        &self,
        attached: Attached<'_>,
        request: impl FnOnce(Option<PathBuf>) -> Request,
    ) -> Result<(Process, Option<Arc<Terminal>>, Replaceable)> {
        let Attached {
            claimed,
            terminal,
            console,
            user,
            filter,
            until,
        } = attached;
        let filter = filter.map(Filter::descriptor).transpose()?;
        if !terminal {
            let (theirs, ours) = stdio::pipes(&claimed, user.uid, user.gid)?;
            let fds = theirs.into_iter().chain(filter).collect();
            let process = self.helpers.call(&request(None), fds).await?;
            let streams = stdio::copy_pipes(ours, claimed, &process, until);
            return Ok((process, None, streams));
        }
        let listener =
            UnixListener::bind(&console).doing(|| "making the terminal's socket".into())?;
        let fds = filter.into_iter().collect();
        let process = self.helpers.call(&request(Some(console)), fds).await?;
        let master = tokio::time::timeout(CONSOLE, receive_master(&listener))
            .await
            .map_err(|_| Error::State("the terminal did not arrive".into()))
            .and_then(|received| received.doing(|| "receiving the terminal".into()));
        let terminal = master.and_then(|master| Terminal::new(master, user.uid));
        let terminal = match terminal {
            Ok(terminal) => Arc::new(terminal),
            Err(error) => {
                // Nobody else knows of it.
                let _ = process.signal(libc::SIGKILL);
                return Err(error);
            }
        };
        let streams = stdio::copy_terminal(&terminal, claimed, &process, until);
        Ok((process, Some(terminal), streams))
    }
}

async fn receive_master(listener: &UnixListener) -> std::io::Result<std::os::fd::OwnedFd> {
    let (socket, _) = listener.accept().await?;
    let socket = Endpoint::new(socket.into_std()?.into())?;
    let (_, mut fds) = socket.receive(&mut [0; 64], 1).await?;
    fds.pop().ok_or(std::io::ErrorKind::InvalidData.into())
}
