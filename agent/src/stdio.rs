//! Copies between a process's stdio and the streams it was given.
//!
//! One bounded buffer per direction: a reader that does not keep up stops the
//! writer, and no byte is dropped.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Gid, Mode, OFlags, Uid, fchown};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::mpsc;

use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result};
use crate::process::Process;

const BUFFER: usize = 32 * 1024;
/// Streams in place of one that nobody has begun to use yet.
const REPLACEMENTS: usize = 4;
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
    /// All writers have closed: a container, whose processes end with its first. When its
    /// streams are reset, as in a machine that goes on elsewhere, it waits for others.
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

/// Where a process's streams can be replaced, as long as somebody copies.
#[derive(Debug, Default)]
pub struct Replaceable {
    stdin: Option<mpsc::Sender<Endpoint>>,
    stdout: Option<mpsc::Sender<Endpoint>>,
    stderr: Option<mpsc::Sender<Endpoint>>,
}

impl Replaceable {
    /// Has each go on with another stream. One whose end is closed gets none: who holds the other
    /// end of it reads its end.
    pub fn replace(&self, claimed: Claimed) -> Result<()> {
        let pairs = [
            (&self.stdin, claimed.stdin),
            (&self.stdout, claimed.stdout),
            (&self.stderr, claimed.stderr),
        ];
        for (sender, stream) in pairs {
            if let (Some(sender), Some(stream)) = (sender, stream)
                && let Err(mpsc::error::TrySendError::Full(_)) = sender.try_send(stream)
            {
                return Err(Error::TooMany {
                    what: "streams for one end that is not read",
                    limit: REPLACEMENTS,
                });
            }
        }
        Ok(())
    }
}

/// A stream, and those that come in its place.
#[derive(Debug)]
struct Line {
    stream: Endpoint,
    others: mpsc::Receiver<Endpoint>,
}

impl Line {
    /// With a sender for others, if it may be given some.
    fn new(stream: Endpoint, until: Until) -> (Self, Option<mpsc::Sender<Endpoint>>) {
        let (sender, others) = mpsc::channel(REPLACEMENTS);
        (
            Self { stream, others },
            (until == Until::Closed).then_some(sender),
        )
    }

    /// Waits for another in its place, for ever if there can be none.
    async fn replaced(&mut self) {
        match self.others.recv().await {
            Some(other) => self.stream = other,
            None => std::future::pending().await,
        }
    }

    /// Waits for another if this one was reset, which it is when the machine goes on elsewhere. Otherwise, or if
    /// none can come, that is its end.
    async fn recover(&mut self, error: io::Error) -> io::Result<()> {
        let reset = matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
        );
        match reset.then_some(self.others.recv()) {
            Some(other) => self.stream = other.await.ok_or(error)?,
            None => return Err(error),
        }
        Ok(())
    }

    /// What is lost of a stream that is reset is what was written to it.
    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = tokio::select! {
                biased;
                other = self.others.recv(), if !self.others.is_closed() => {
                    if let Some(other) = other {
                        self.stream = other;
                    }
                    continue;
                }
                written = self.stream.write(bytes) => written,
            };
            match written {
                Ok(count) => bytes = &bytes[count..],
                Err(error) => self.recover(error).await?,
            }
        }
        Ok(())
    }

    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = tokio::select! {
                biased;
                other = self.others.recv(), if !self.others.is_closed() => {
                    if let Some(other) = other {
                        self.stream = other;
                    }
                    continue;
                }
                count = self.stream.read(buffer) => count,
            };
            match count {
                Err(error) => self.recover(error).await?,
                count => return count,
            }
        }
    }
}

/// Starts copying between pipes and streams. It goes on until all is copied, also
/// when the process is forgotten before: a slow reader loses nothing.
pub fn copy_pipes(ours: Ours, claimed: Claimed, process: &Process, until: Until) -> Replaceable {
    let mut replaceable = Replaceable::default();
    if let (Some(pipe), Some(stream)) = (ours.stdin, claimed.stdin) {
        let process = process.clone();
        let (line, sender) = Line::new(stream, until);
        replaceable.stdin = sender;
        // The pipe closes with its task: the process reads its end.
        tokio::spawn(async move { input(line, &pipe, &process).await });
    }
    let outputs = [
        (ours.stdout, claimed.stdout, &mut replaceable.stdout),
        (ours.stderr, claimed.stderr, &mut replaceable.stderr),
    ];
    for (pipe, stream, replace) in outputs {
        if let (Some(pipe), Some(stream)) = (pipe, stream) {
            let (line, sender) = Line::new(stream, until);
            *replace = sender;
            tokio::spawn(output(Source::Pipe(pipe), line, process.clone(), until));
        }
    }
    replaceable
}

/// Starts copying between a terminal and its streams.
pub fn copy_terminal(
    terminal: &Arc<Terminal>,
    claimed: Claimed,
    process: &Process,
    until: Until,
) -> Replaceable {
    let mut replaceable = Replaceable::default();
    if let Some(stream) = claimed.stdin {
        let terminal = Arc::clone(terminal);
        let process = process.clone();
        let (line, sender) = Line::new(stream, until);
        replaceable.stdin = sender;
        tokio::spawn(async move { input(line, &terminal.master, &process).await });
    }
    if let Some(stream) = claimed.stdout {
        let source = Source::Terminal(Arc::clone(terminal));
        let (line, sender) = Line::new(stream, until);
        replaceable.stdout = sender;
        tokio::spawn(output(source, line, process.clone(), until));
    }
    replaceable
}

async fn input(mut stream: Line, to: &Endpoint, process: &Process) {
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

async fn output(source: Source, mut stream: Line, process: Process, until: Until) {
    let copied = async {
        if copy(source.endpoint(), &mut stream, &process, until).await? {
            match &source {
                Source::Pipe(pipe) => pipe_rest(pipe, &mut stream).await?,
                Source::Terminal(terminal) => terminal_rest(&terminal.master, &mut stream).await?,
            }
        }
        stream.stream.shutdown_write()
    };
    // Without a reader there, the process meets a closed pipe.
    if let Err(error) = copied.await {
        tracing::debug!("a stream's reader is gone: {error}");
    }
}

/// Copies to the end. Returns whether it stopped before, as the process ended.
async fn copy(from: &Endpoint, to: &mut Line, process: &Process, until: Until) -> io::Result<bool> {
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
            () = to.replaced() => continue,
            count = from.read(&mut buffer) => count?,
        };
        if count == 0 {
            return Ok(false);
        }
        to.write_all(&buffer[..count]).await?;
    }
}

/// Copies what the pipe holds now, and not what a background child goes on to write.
async fn pipe_rest(pipe: &Endpoint, stream: &mut Line) -> io::Result<()> {
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

async fn terminal_rest(master: &Endpoint, stream: &mut Line) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Endpoint, Endpoint) {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (Endpoint::new(a).unwrap(), Endpoint::new(b).unwrap())
    }

    fn stdout(stream: Endpoint) -> Claimed {
        Claimed {
            stdout: Some(stream),
            ..Claimed::default()
        }
    }

    async fn read_exactly(from: &Endpoint, length: usize) -> usize {
        let mut buffer = vec![0; BUFFER];
        let mut total = 0;
        while total < length {
            total += from.read(&mut buffer).await.unwrap();
        }
        total
    }

    #[tokio::test]
    async fn what_a_full_stream_has_not_taken_goes_to_the_next() {
        let (ours, full) = pair();
        let (mut line, sender) = Line::new(ours, Until::Closed);
        let replaceable = Replaceable {
            stdout: sender,
            ..Replaceable::default()
        };
        let bytes = vec![b'x'; 4 << 20];
        let writer = tokio::spawn(async move { line.write_all(&bytes).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (next, theirs) = pair();

        replaceable.replace(stdout(next)).unwrap();
        let taken = usize::try_from(rustix::io::ioctl_fionread(&full).unwrap()).unwrap();
        let rest = read_exactly(&theirs, (4 << 20) - taken).await;

        assert!(taken > 0);
        assert_eq!(taken + rest, 4 << 20);
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_stream_that_is_reset_waits_for_the_next() {
        let (ours, theirs) = pair();
        ours.write_all(b"unread").await.unwrap();
        let (mut line, sender) = Line::new(ours, Until::Closed);
        // Unread bytes make the close a reset.
        drop(theirs);
        let (next, theirs) = pair();
        theirs.write_all(b"hello").await.unwrap();
        sender.unwrap().try_send(next).unwrap();

        let mut buffer = [0; 16];
        let count = line.read(&mut buffer).await.unwrap();

        assert_eq!(&buffer[..count], b"hello");
    }

    #[tokio::test]
    async fn the_end_of_an_execs_stream_is_its_end() {
        let (ours, theirs) = pair();
        ours.write_all(b"unread").await.unwrap();
        let (mut line, sender) = Line::new(ours, Until::Ended);
        drop(theirs);

        assert!(sender.is_none());
        assert!(line.read(&mut [0; 16]).await.is_err());
    }

    #[tokio::test]
    async fn streams_for_an_end_that_is_closed_are_closed() {
        let (ours, _theirs) = pair();
        let (line, sender) = Line::new(ours, Until::Closed);
        let replaceable = Replaceable {
            stdout: sender,
            ..Replaceable::default()
        };
        drop(line);
        let (next, theirs) = pair();

        replaceable.replace(stdout(next)).unwrap();

        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn streams_that_nobody_uses_are_bounded() {
        let (ours, _theirs) = pair();
        let (_line, sender) = Line::new(ours, Until::Closed);
        let replaceable = Replaceable {
            stdout: sender,
            ..Replaceable::default()
        };
        let results = (0..=REPLACEMENTS).map(|_| replaceable.replace(stdout(pair().0)));

        assert_eq!(results.filter(|result| result.is_err()).count(), 1);
    }
}
