//! A process of a pod, with our standard streams.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_pod::client::{ClientError, Session};
use hull_pod::supervisor::Limits;
use hull_pod::supervisor::api::Refusal;
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;
use crate::terminal::{self, RawTerminal};

/// hull itself failed, as docker has it.
pub const HULL_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// `NAME=VALUE`, as `--env` takes it.
pub fn parse_env(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("not NAME=VALUE".to_owned()),
    }
}

/// What is told of a refusal, behind `doing`, with the code for it.
pub fn refused(error: ClientError, doing: &str) -> Failure {
    let (code, message) = match &error {
        ClientError::Refused { kind, message } => {
            let code = match kind {
                Refusal::ProgramNotFound => NOT_FOUND,
                Refusal::ProgramNotExecutable => NOT_EXECUTABLE,
                Refusal::NotRunning | Refusal::Failed => HULL_FAILED,
            };
            (code, message.clone())
        }
        _ => return Failure::from(error),
    };
    Failure::Failed(format!("{doing}{message}")).with_code(code)
}

/// Copies the streams until the process has ended and its output is here. Returns its exit code.
pub async fn attend(session: Session, tty: bool, limits: Limits) -> Result<i32, Failure> {
    let raw = if tty {
        RawTerminal::enter().map_err(|e| Failure::io("changing the terminal", e))?
    } else {
        None
    };
    let code = copy_all(session, tty, limits).await;
    drop(raw);
    code
}

async fn copy_all(mut session: Session, tty: bool, limits: Limits) -> Result<i32, Failure> {
    let progress = Arc::new(AtomicU64::new(0));
    let mut outputs = Vec::new();
    let wanted = [
        (
            session.stdout.take(),
            io::stdout().as_fd().try_clone_to_owned(),
        ),
        (
            session.stderr.take(),
            io::stderr().as_fd().try_clone_to_owned(),
        ),
    ];
    for (stream, ours) in wanted {
        if let Some(stream) = stream {
            let ours = ours.map_err(|e| Failure::io("taking standard output", e))?;
            let progress = Arc::clone(&progress);
            outputs.push(tokio::task::spawn_blocking(move || {
                copy(stream, &ours, &progress)
            }));
        }
    }
    if let Some(stream) = session.stdin.take() {
        tokio::task::spawn_blocking(move || feed(stream));
    }

    let mut resized =
        signal(SignalKind::window_change()).map_err(|e| Failure::io("watching signals", e))?;
    let code = loop {
        tokio::select! {
            ended = session.ended() => break ended?,
            Some(()) = resized.recv(), if tty => {
                if let Some(size) = terminal::size() {
                    session.resize(size).await?;
                }
            }
        }
    };
    drain(outputs, &progress, limits.drain).await;
    Ok(code)
}

/// Waits for the end of the output as long as some comes: a process that was left in the
/// background may hold it open for ever.
async fn drain(outputs: Vec<tokio::task::JoinHandle<()>>, progress: &AtomicU64, idle: Duration) {
    for mut output in outputs {
        let mut seen = progress.load(Ordering::Relaxed);
        while tokio::time::timeout(idle, &mut output).await.is_err() {
            let now = progress.load(Ordering::Relaxed);
            if now == seen {
                return;
            }
            seen = now;
        }
    }
}

/// From the process to us.
fn copy(from: OwnedFd, to: &OwnedFd, progress: &AtomicU64) {
    let mut chunk = vec![0u8; 64 * 1024];
    loop {
        let length = match rustix::io::read(&from, &mut chunk[..]) {
            Ok(0) => return,
            Ok(length) => length,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        };
        let mut left = &chunk[..length];
        while !left.is_empty() {
            match rustix::io::write(to, left) {
                Ok(written) => {
                    left = &left[written..];
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                Err(rustix::io::Errno::INTR) => {}
                // Our terminal or pipe is set so by somebody who shares it.
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(Duration::from_millis(1)),
                // Our reader is gone: the process hears of it by SIGPIPE, as in a pipe.
                Err(_) => {
                    let _ = UnixStream::from(from).shutdown(Shutdown::Both);
                    return;
                }
            }
        }
    }
}

/// From us to the process, and then the end of file.
fn feed(to: OwnedFd) {
    let to = UnixStream::from(to);
    let mut chunk = vec![0u8; 64 * 1024];
    while let Ok(length @ 1..) =
        rustix::io::retry_on_intr(|| rustix::io::read(io::stdin(), &mut chunk[..]))
    {
        if io::Write::write_all(&mut &to, &chunk[..length]).is_err() {
            return;
        }
    }
    // It has closed its end already.
    let _ = to.shutdown(Shutdown::Write);
}
