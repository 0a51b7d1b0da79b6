//! The streams of a process, each a connection of its own to the agent.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use hull_protocol::agent::Streams;
use hull_protocol::{STREAM_MAGIC, STREAM_PORT};
use tokio::io::AsyncWriteExt;

use super::{Agent, AgentError, within};
use crate::supervisor::api::Size;

/// The open streams of a process that is about to be made. What isn't there is not connected.
#[derive(Debug, Default)]
pub struct Stdio {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub(super) request: Streams,
}

impl Agent {
    /// Opens the streams of a process: standard input if wanted, standard output, and standard
    /// error unless it gets a terminal.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn open_stdio(&self, stdin: bool, tty: Option<Size>) -> Result<Stdio, AgentError> {
        let mut stdio = Stdio {
            request: Streams {
                tty: tty.is_some(),
                columns: tty.map_or(0, |size| size.columns.into()),
                rows: tty.map_or(0, |size| size.rows.into()),
                ..Default::default()
            },
            ..Default::default()
        };
        if stdin {
            let (number, stream) = self.open_stream().await?;
            (stdio.request.stdin, stdio.stdin) = (number, Some(stream));
        }
        let (number, stream) = self.open_stream().await?;
        (stdio.request.stdout, stdio.stdout) = (number, Some(stream));
        if tty.is_none() {
            let (number, stream) = self.open_stream().await?;
            (stdio.request.stderr, stdio.stderr) = (number, Some(stream));
        }
        Ok(stdio)
    }

    /// A stream of its own to the agent, in blocking mode, and its number.
    pub(super) async fn open_stream(&self) -> Result<(u64, OwnedFd), AgentError> {
        let number = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let _call = self.calls.read().await;
        within("a stream", self.limit, async {
            let mut stream = self
                .machine
                .connect(STREAM_PORT)
                .await
                .map_err(AgentError::Connect)?;
            let mut header = [0; STREAM_MAGIC.len() + 8];
            header[..STREAM_MAGIC.len()].copy_from_slice(&STREAM_MAGIC);
            header[STREAM_MAGIC.len()..].copy_from_slice(&number.to_le_bytes());
            stream
                .write_all(&header)
                .await
                .map_err(AgentError::Stream)?;
            let stream = stream.into_std().map_err(AgentError::Stream)?;
            stream.set_nonblocking(false).map_err(AgentError::Stream)?;
            Ok((number, stream.into()))
        })
        .await
    }
}
