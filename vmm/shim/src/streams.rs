//! The streams of a process: between the guest, and the FIFOs or files that containerd names.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_pod::agent::Stdio;
use rustix::fs::{CWD, Mode, OFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::logger::Logger;

/// What is copied at once.
const CHUNK: usize = 64 << 10;
/// More than pipes, sockets and rings can hold of what a process has printed before its end.
const LAST_BYTES: u64 = 16 << 20;
/// The last output may take as many times as long as a moment without any.
const LAST_IDLES: u32 = 60;

/// Where the streams of a process are on the host, as containerd names them. Empty: nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("opening {place}")]
    Open {
        place: String,
        #[source]
        source: io::Error,
    },
    #[error("{0:?}: only FIFOs, file:// and (for output) binary:// are known")]
    Unknown(String),
    #[error("taking the guest's stream")]
    Guest(#[source] io::Error),
}

/// Streams that are copied until their process has ended.
#[derive(Debug)]
pub struct Streams {
    stdin: Mutex<Stdin>,
    /// Held so that a client that goes doesn't end the process's input: `CloseIO` does.
    stdin_writer: Mutex<Option<OwnedFd>>,
    outputs: Vec<JoinHandle<()>>,
    /// Bytes that have been written.
    progress: Arc<AtomicU64>,
    /// How many outputs have not ended.
    open: watch::Sender<usize>,
    logger: Mutex<Option<Child>>,
}

/// A process's input. Its FIFO is opened when the process starts: `ctr` can say that there is no more only when
/// the creation has been answered, and forgets to say what it has seen before.
#[derive(Debug, Default)]
enum Stdin {
    #[default]
    None,
    Waiting {
        stream: OwnedFd,
        place: String,
        closed: bool,
    },
    Copied(JoinHandle<()>),
}

enum Sink {
    Fifo(pipe::Sender),
    File(tokio::fs::File),
    /// Read and thrown away, so that the process never waits.
    Nothing,
}

impl Streams {
    /// Opens what `places` names, and copies from now on; the outputs go to a logger, if there is one. `printed` is called
    /// at the first byte of each.
    ///
    /// # Errors
    /// When something can't be opened.
    pub fn connect(
        stdio: Stdio,
        places: &Places,
        logger: Option<Logger>,
        printed: impl Fn() + Clone + Send + 'static,
    ) -> Result<Self, StreamError> {
        let (mut logged, mut child) = ([None, None], None::<Child>);
        if let Some(logger) = logger {
            logged = [Some(logger.stdout), Some(logger.stderr)];
            child = Some(logger.child);
        }
        let mut streams = Self {
            stdin: Mutex::default(),
            stdin_writer: Mutex::default(),
            outputs: Vec::new(),
            progress: Arc::default(),
            open: watch::Sender::new(0),
            logger: Mutex::new(child.take()),
        };
        let outputs = [
            (stdio.stdout, &places.stdout),
            (stdio.stderr, &places.stderr),
        ];
        for ((stream, place), logged) in outputs.into_iter().zip(logged) {
            let Some(stream) = stream else { continue };
            let sink = match logged {
                Some(pipe) => Sink::Fifo(pipe),
                None => sink(place)?,
            };
            let progress = Arc::clone(&streams.progress);
            let copy = copy_out(guests(stream)?, sink, progress, printed.clone());
            streams.open.send_modify(|open| *open += 1);
            let open = streams.open.clone();
            streams.outputs.push(tokio::spawn(async move {
                copy.await;
                open.send_modify(|open| *open -= 1);
            }));
        }
        if let Some(stream) = stdio.stdin {
            *lock(&streams.stdin) = Stdin::Waiting {
                stream,
                place: places.stdin.clone(),
                closed: false,
            };
        }
        Ok(streams)
    }

    /// Copies the input, too: the process is about to start.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open_stdin(&self) -> Result<(), StreamError> {
        let mut stdin = lock(&self.stdin);
        match std::mem::take(&mut *stdin) {
            Stdin::Waiting {
                stream,
                place,
                closed,
            } => {
                let (reader, writer) = source(&place)?;
                if !closed {
                    *lock(&self.stdin_writer) = Some(writer);
                }
                *stdin = Stdin::Copied(tokio::spawn(copy_in(reader, guests(stream)?)));
            }
            other => *stdin = other,
        }
        Ok(())
    }

    /// The process reads the end of file when it has read what there is, and nobody else has the FIFO open.
    pub fn close_stdin(&self) {
        if let Stdin::Waiting { closed, .. } = &mut *lock(&self.stdin) {
            *closed = true;
        }
        lock(&self.stdin_writer).take();
    }

    /// When the process has ended: waits until everything has been written, as long as something still comes. A
    /// process that outlives its container's first one may hold a stream for ever, a FIFO may have no reader, and a
    /// guest may print without end: what was printed before the end is bounded, and so is the time for it.
    pub async fn drain(&self, idle: Duration) {
        self.end_stdin();
        self.close_stdin();
        let written = || self.progress.load(Ordering::Relaxed);
        let last = written().saturating_add(LAST_BYTES);
        let mut open = self.open.subscribe();
        let all = async {
            let mut seen = written();
            while timeout(idle, open.wait_for(|open| *open == 0))
                .await
                .is_err()
            {
                let now = written();
                if now == seen || now > last {
                    break;
                }
                seen = now;
            }
        };
        if timeout(idle * LAST_IDLES, all).await.is_err() {
            tracing::warn!("the last output of a process takes too long, and is cut");
        }
        self.outputs.iter().for_each(JoinHandle::abort);
        let logger = lock(&self.logger).take();
        if let Some(mut logger) = logger
            && timeout(idle, logger.wait()).await.is_err()
        {
            tracing::warn!("a logger does not end, and is left alone");
        }
    }
}

impl Streams {
    fn end_stdin(&self) {
        if let Stdin::Copied(copy) = std::mem::take(&mut *lock(&self.stdin)) {
            copy.abort();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.end_stdin();
        self.outputs.iter().for_each(JoinHandle::abort);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn guests(stream: OwnedFd) -> Result<UnixStream, StreamError> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(StreamError::Guest)
}

fn open_error(place: &str) -> impl FnOnce(io::Error) -> StreamError {
    move |source| StreamError::Open {
        place: place.to_owned(),
        source,
    }
}

/// A FIFO's or file's path.
fn path(place: &str) -> Result<(PathBuf, bool), StreamError> {
    match place.split_once("://") {
        None | Some(("fifo", _)) => {
            let path = place.strip_prefix("fifo://").unwrap_or(place);
            Ok((path.into(), true))
        }
        Some(("file", path)) => Ok((path.into(), false)),
        Some(_) => Err(StreamError::Unknown(place.to_owned())),
    }
}

fn sink(place: &str) -> Result<Sink, StreamError> {
    if place.is_empty() {
        return Ok(Sink::Nothing);
    }
    let (path, fifo) = path(place)?;
    if !fifo {
        let file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .map_err(open_error(place))?;
        return Ok(Sink::File(tokio::fs::File::from_std(file)));
    }
    // For reading, too: then opening needs no reader, and a containerd that is restarted finds it as it was.
    pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(path)
        .map(Sink::Fifo)
        .map_err(open_error(place))
}

/// The reading end of a FIFO, and a writing one that keeps it from its end.
fn source(place: &str) -> Result<(pipe::Receiver, OwnedFd), StreamError> {
    let (path, _) = path(place)?;
    let reader = pipe::OpenOptions::new()
        .open_receiver(&path)
        .map_err(open_error(place))?;
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let writer = rustix::fs::openat(CWD, &path, flags, Mode::empty())
        .map_err(|error| open_error(place)(error.into()))?;
    Ok((reader, writer))
}

async fn copy_in(mut reader: pipe::Receiver, mut stream: UnixStream) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = reader.read(&mut chunk).await {
        if stream.write_all(&chunk[..length]).await.is_err() {
            // The process has closed its input.
            return;
        }
    }
    // It may be gone already.
    let _ = rustix::net::shutdown(stream.as_fd(), rustix::net::Shutdown::Write);
}

async fn copy_out(
    mut stream: UnixStream,
    mut sink: Sink,
    progress: Arc<AtomicU64>,
    printed: impl FnOnce(),
) {
    let mut chunk = vec![0; CHUNK];
    let mut printed = Some(printed);
    while let Ok(length @ 1..) = stream.read(&mut chunk).await {
        if let Some(printed) = printed.take() {
            printed();
        }
        let written = match &mut sink {
            Sink::Fifo(fifo) => fifo.write_all(&chunk[..length]).await,
            Sink::File(file) => file.write_all(&chunk[..length]).await,
            Sink::Nothing => Ok(()),
        };
        if let Err(error) = written {
            tracing::warn!(%error, "a stream of a process can't be written any more");
            sink = Sink::Nothing;
        }
        progress.fetch_add(length as u64, Ordering::Relaxed);
    }
    if let Sink::File(file) = &mut sink
        && let Err(error) = file.flush().await
    {
        tracing::warn!(%error, "a stream of a process can't be written any more");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    const IDLE: Duration = Duration::from_millis(200);

    fn fifo(root: &tempfile::TempDir, name: &str) -> String {
        let path = root.path().join(name);
        rustix::fs::mknodat(
            CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn pair() -> (OwnedFd, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        (ours.into(), theirs)
    }

    #[tokio::test]
    async fn what_a_process_prints_comes_whole() {
        let root = tempfile::tempdir().unwrap();
        let (ours, mut guest) = pair();
        let mut stdio = Stdio::default();
        stdio.stdout = Some(ours);
        let places = Places {
            stdout: fifo(&root, "stdout"),
            ..Places::default()
        };
        let streams = Streams::connect(stdio, &places, None, || ()).unwrap();
        let path = places.stdout.clone();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            File::open(path).unwrap().read_to_end(&mut all).unwrap();
            all
        });
        let sent = vec![b'x'; 3 << 20];
        let sending = sent.clone();
        let writer = std::thread::spawn(move || guest.write_all(&sending).unwrap());

        streams.drain(Duration::from_secs(20)).await;
        drop(streams);

        tokio::task::spawn_blocking(|| writer.join().unwrap())
            .await
            .unwrap();
        let read = tokio::task::spawn_blocking(|| reader.join().unwrap())
            .await
            .unwrap();
        assert_eq!(read.len(), sent.len());
    }

    #[tokio::test]
    async fn input_ends_when_it_is_closed_and_drained() {
        let root = tempfile::tempdir().unwrap();
        let (ours, mut guest) = pair();
        let mut stdio = Stdio::default();
        stdio.stdin = Some(ours);
        let places = Places {
            stdin: fifo(&root, "stdin"),
            ..Places::default()
        };
        let streams = Streams::connect(stdio, &places, None, || ()).unwrap();
        streams.open_stdin().unwrap();
        for word in ["one ", "two "] {
            // Each time another client.
            let mut client = File::options().write(true).open(&places.stdin).unwrap();
            client.write_all(word.as_bytes()).unwrap();
        }

        streams.close_stdin();

        let read = tokio::task::spawn_blocking(move || {
            let mut all = String::new();
            guest.read_to_string(&mut all).unwrap();
            all
        });
        assert_eq!(read.await.unwrap(), "one two ");
    }

    #[tokio::test]
    async fn a_fifo_without_a_reader_does_not_hold_up_the_end() {
        let root = tempfile::tempdir().unwrap();
        let (ours, mut guest) = pair();
        let mut stdio = Stdio::default();
        stdio.stdout = Some(ours);
        let places = Places {
            stdout: fifo(&root, "stdout"),
            ..Places::default()
        };
        let streams = Streams::connect(stdio, &places, None, || ()).unwrap();
        let writer = std::thread::spawn(move || {
            let chunk = [b'x'; CHUNK];
            while guest.write_all(&chunk).is_ok() {}
        });

        timeout(Duration::from_secs(10), streams.drain(IDLE))
            .await
            .unwrap();

        tokio::task::spawn_blocking(|| writer.join().unwrap())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn output_without_end_does_not_hold_up_the_end() {
        let (ours, mut guest) = pair();
        let mut stdio = Stdio::default();
        stdio.stdout = Some(ours);
        let streams = Streams::connect(stdio, &Places::default(), None, || ()).unwrap();
        let writer = std::thread::spawn(move || while guest.write_all(&[b'x'; CHUNK]).is_ok() {});

        timeout(Duration::from_secs(10), streams.drain(IDLE))
            .await
            .unwrap();

        tokio::task::spawn_blocking(|| writer.join().unwrap())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn output_that_drips_does_not_hold_up_the_end() {
        let (ours, mut guest) = pair();
        let mut stdio = Stdio::default();
        stdio.stdout = Some(ours);
        let streams = Streams::connect(stdio, &Places::default(), None, || ()).unwrap();
        let idle = Duration::from_millis(20);
        let writer = std::thread::spawn(move || {
            while guest.write_all(b"x").is_ok() {
                std::thread::sleep(idle / 4);
            }
        });

        timeout(Duration::from_secs(10), streams.drain(idle))
            .await
            .unwrap();

        tokio::task::spawn_blocking(|| writer.join().unwrap())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_file_gets_what_is_appended() {
        let root = tempfile::tempdir().unwrap();
        let (ours, mut guest) = pair();
        let mut stdio = Stdio::default();
        stdio.stderr = Some(ours);
        let log = root.path().join("log");
        let places = Places {
            stderr: format!("file://{}", log.display()),
            ..Places::default()
        };
        let streams = Streams::connect(stdio, &places, None, || ()).unwrap();
        guest.write_all(b"line\n").unwrap();
        drop(guest);

        streams.drain(Duration::from_secs(10)).await;

        assert_eq!(std::fs::read_to_string(log).unwrap(), "line\n");
    }

    #[test]
    fn other_places_are_refused() {
        assert!(matches!(path("npipe:///a"), Err(StreamError::Unknown(_))));
        assert_eq!(path("fifo:///run/x").unwrap(), ("/run/x".into(), true));
    }
}
