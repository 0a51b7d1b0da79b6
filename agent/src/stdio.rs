//! Copies between a process's stdio and the streams it was given.
//!
//! One bounded buffer per direction: a reader that does not keep up stops the
//! writer, and no byte is dropped.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Gid, Mode, OFlags, Uid, fchown};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result};
use crate::process::Process;

/// Copied at a time, and so a packet to the host. With what the kernel adds to a packet it fits into 32 KiB (order 3),
/// which is the most that Linux always finds; a write of more can fail for fragmented memory.
const BUFFER: usize = 28 * 1024;
/// What a process can write before it has to wait: much for one turn of the processor. The pages are only there
/// while they hold something, and are the process's.
const PIPE: usize = 256 * 1024;
/// What a terminal may still hold when an exec's process has ended.
const TERMINAL_REST: usize = 1024 * 1024;
/// A terminal's output passes a kernel work queue: it may lag behind the exit.
const TERMINAL_LAG: Duration = Duration::from_millis(100);

/// The streams of one process, claimed.
#[derive(Debug, Default)]
pub struct Claimed {
    pub stdin: Option<Endpoint>,
    pub stdout: Option<Endpoint>,
    pub stderr: Option<Endpoint>,
}

/// The agent's ends of a process's stdio.
#[derive(Debug, Default)]
pub struct Ours {
    stdin: Option<Endpoint>,
    stdout: Option<Endpoint>,
    stderr: Option<Endpoint>,
}

/// When copying output stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// All writers have closed: a container, whose processes end with its first.
    Closed,
    /// The process has ended and what it wrote is copied: an exec, whose
    /// background children must not hold it open.
    Ended,
}

/// Makes the stdio of a process without a terminal: the process's three ends, and ours.
/// What has no stream is /dev/null. The ends belong to the process's user, so that it
/// can open /dev/stdout.
pub fn pipes(claimed: &Claimed, uid: u32, gid: u32) -> Result<([OwnedFd; 3], Ours)> {
    let (stdin, our_stdin) = match claimed.stdin {
        Some(_) => {
            let (reader, writer) = pipe_of(uid, gid)?;
            (reader, Some(writer))
        }
        None => (null()?, None),
    };
    let output = |wanted: bool| -> Result<(OwnedFd, Option<OwnedFd>)> {
        if !wanted {
            return Ok((null()?, None));
        }
        let (reader, writer) = pipe_of(uid, gid)?;
        Ok((writer, Some(reader)))
    };
    let (stdout, our_stdout) = output(claimed.stdout.is_some())?;
    let (stderr, our_stderr) = output(claimed.stderr.is_some())?;
    let endpoint = |fd: Option<OwnedFd>| {
        fd.map(Endpoint::new)
            .transpose()
            .doing(|| "preparing a pipe".into())
    };
    Ok((
        [stdin, stdout, stderr],
        Ours {
            stdin: endpoint(our_stdin)?,
            stdout: endpoint(our_stdout)?,
            stderr: endpoint(our_stderr)?,
        },
    ))
}

fn pipe_of(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).doing(|| "making a pipe".into())?;
    fcntl_setpipe_size(&writer, PIPE).doing(|| "sizing a pipe".into())?;
    for end in [&reader, &writer] {
        fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .doing(|| "giving a pipe to its user".into())?;
    }
    Ok((reader, writer))
}

fn null() -> Result<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .doing(|| "opening /dev/null".into())
}

/// The terminal of a process; we hold its master.
#[derive(Debug)]
pub struct Terminal {
    master: Endpoint,
}

impl Terminal {
    /// Takes a master, and gives its slave to the process's user.
    pub fn new(master: OwnedFd, uid: u32) -> Result<Self> {
        let slave = ioctl_tiocgptpeer(
            &master,
            OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
        )
        .doing(|| "opening the terminal".into())?;
        fchown(&slave, Some(Uid::from_raw(uid)), None)
            .doing(|| "giving the terminal to its user".into())?;
        Ok(Self {
            master: Endpoint::new(master).doing(|| "preparing the terminal".into())?,
        })
    }

    pub fn resize(&self, size: Size) -> Result<()> {
        tcsetwinsize(&self.master, size.into()).doing(|| "resizing the terminal".into())
    }
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

impl Size {
    /// Zeros are the traditional 80 x 24.
    pub fn new(columns: u32, rows: u32) -> Result<Self> {
        let side = |value: u32, default: u16| match value {
            0 => Ok(default),
            _ => u16::try_from(value)
                .map_err(|_| Error::Invalid(format!("{value} is no size of a terminal"))),
        };
        Ok(Self {
            columns: side(columns, 80)?,
            rows: side(rows, 24)?,
        })
    }
}

impl From<Size> for Winsize {
    fn from(size: Size) -> Self {
        Winsize {
            ws_col: size.columns,
            ws_row: size.rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        }
    }
}

/// Where a process's output is read.
#[derive(Debug)]
enum Source {
    Pipe(Endpoint),
    Terminal(Arc<Terminal>),
}

impl Source {
    fn endpoint(&self) -> &Endpoint {
        match self {
            Self::Pipe(pipe) => pipe,
            Self::Terminal(terminal) => &terminal.master,
        }
    }
}

/// Starts copying between pipes and streams. It goes on until all is copied, also
/// when the process is forgotten before: a slow reader loses nothing.
pub fn copy_pipes(ours: Ours, claimed: Claimed, process: &Process, until: Until) {
    if let (Some(pipe), Some(stream)) = (ours.stdin, claimed.stdin) {
        let process = process.clone();
        // The pipe closes with its task: the process reads its end.
        tokio::spawn(async move { input(&stream, &pipe, &process).await });
    }
    for (pipe, stream) in [(ours.stdout, claimed.stdout), (ours.stderr, claimed.stderr)] {
        if let (Some(pipe), Some(stream)) = (pipe, stream) {
            tokio::spawn(output(Source::Pipe(pipe), stream, process.clone(), until));
        }
    }
}

/// Starts copying between a terminal and its streams.
pub fn copy_terminal(terminal: &Arc<Terminal>, claimed: Claimed, process: &Process, until: Until) {
    if let Some(stream) = claimed.stdin {
        let terminal = Arc::clone(terminal);
        let process = process.clone();
        tokio::spawn(async move { input(&stream, &terminal.master, &process).await });
    }
    if let Some(stream) = claimed.stdout {
        let source = Source::Terminal(Arc::clone(terminal));
        tokio::spawn(output(source, stream, process.clone(), until));
    }
}

async fn input(stream: &Endpoint, to: &Endpoint, process: &Process) {
    let copy = async {
        let mut buffer = vec![0; BUFFER];
        while let Ok(count @ 1..) = stream.read(&mut buffer).await {
            if to.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = process.ended() => {}
        () = copy => {}
    }
}

async fn output(source: Source, stream: Endpoint, process: Process, until: Until) {
    let copied = async {
        if copy(source.endpoint(), &stream, &process, until).await? {
            match &source {
                Source::Pipe(pipe) => pipe_rest(pipe, &stream).await?,
                Source::Terminal(terminal) => terminal_rest(&terminal.master, &stream).await?,
            }
        }
        stream.shutdown_write()
    };
    // Without a reader there, the process meets a closed pipe.
    if let Err(error) = copied.await {
        tracing::debug!("a stream's reader is gone: {error}");
    }
}

/// Copies to the end. Returns whether it stopped before, as the process ended.
async fn copy(from: &Endpoint, to: &Endpoint, process: &Process, until: Until) -> io::Result<bool> {
    let ended = async {
        match until {
            Until::Ended => drop(process.ended().await),
            Until::Closed => std::future::pending().await,
        }
    };
    tokio::pin!(ended);
    let mut buffer = vec![0; BUFFER];
    loop {
        // Only the wait for input is given up: what was read is always written.
        let count = tokio::select! {
            biased;
            () = &mut ended => return Ok(true),
            count = from.read(&mut buffer) => count?,
        };
        if count == 0 {
            return Ok(false);
        }
        to.write_all(&buffer[..count]).await?;
    }
}

/// Copies what the pipe holds now, and not what a background child goes on to write.
async fn pipe_rest(pipe: &Endpoint, stream: &Endpoint) -> io::Result<()> {
    let mut rest = usize::try_from(rustix::io::ioctl_fionread(pipe)?).unwrap_or(0);
    let mut buffer = vec![0; BUFFER];
    while rest > 0 {
        let limit = rest.min(BUFFER);
        match pipe.try_read(&mut buffer[..limit])? {
            0 => break,
            count => {
                stream.write_all(&buffer[..count]).await?;
                rest -= count;
            }
        }
    }
    Ok(())
}

async fn terminal_rest(master: &Endpoint, stream: &Endpoint) -> io::Result<()> {
    let mut rest = TERMINAL_REST;
    let mut buffer = vec![0; BUFFER];
    while rest > 0 {
        let limit = rest.min(BUFFER);
        match tokio::time::timeout(TERMINAL_LAG, master.read(&mut buffer[..limit])).await {
            Err(_) | Ok(Ok(0)) => break,
            Ok(count) => {
                let count = count?;
                stream.write_all(&buffer[..count]).await?;
                rest -= count;
            }
        }
    }
    Ok(())
}
