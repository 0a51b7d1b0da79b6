//! `hull exec`: a further process in a container, with our standard streams.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_pod::client::{Client, ClientError, Session};
use hull_pod::state::Liveness;
use hull_pod::supervisor::Limits;
use hull_pod::supervisor::api::{Exec, Refusal, Size};
use tokio::signal::unix::{SignalKind, signal};

use crate::Host;
use crate::failure::{Failure, exit};
use crate::pods;
use crate::terminal::{self, RawTerminal};

/// hull itself failed, as docker has it.
const HULL_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
const DEFAULT_SIZE: Size = Size {
    columns: 80,
    rows: 24,
};

/// Run a command in a running container. It ends with this one: a client that is killed takes it along
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pass standard input on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the command a terminal
    #[arg(short = 't', long)]
    tty: bool,
    /// The container [default: the first]
    #[arg(short, long, value_name = "NAME")]
    pub container: Option<String>,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<String>,
    /// Another directory than the container's
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Another user than the container's: uid, uid:gid, name or name:group
    #[arg(short, long)]
    user: Option<String>,
    /// Name or id
    pod: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

fn parse_env(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("not NAME=VALUE".to_owned()),
    }
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let code = session(host, args).map_err(|failure| failure.with_code(HULL_FAILED))?;
    exit(code)
}

fn session(host: &Host, args: Args) -> Result<i32, Failure> {
    let record = host.registry()?.find(&args.pod)?;
    if record.liveness == Liveness::Dead {
        return Err(Failure::Failed(format!(
            "pod {} is not running",
            record.status.name
        )));
    }
    let container = pods::container(&record.status, args.container.as_deref())?;
    let exec = Exec {
        container: container.name.clone(),
        args: args.command,
        env: args.env,
        cwd: args.workdir,
        user: args.user,
        stdin: args.stdin,
        tty: args.tty.then(|| terminal::size().unwrap_or(DEFAULT_SIZE)),
    };
    let tty = args.tty;
    let program = exec.args.first().cloned().unwrap_or_default();
    let runtime = pods::runtime()?;
    let code = runtime.block_on(async {
        let session = Client::connect(&record.dir)?
            .exec(exec)
            .await
            .map_err(|error| refused(error, &program))?;
        let raw = if tty {
            RawTerminal::enter().map_err(|e| Failure::io("changing the terminal", e))?
        } else {
            None
        };
        let code = attend(session, tty).await;
        drop(raw);
        code
    });
    // The thread that reads our standard input may wait for ever.
    runtime.shutdown_background();
    code
}

fn refused(error: ClientError, program: &str) -> Failure {
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
    Failure::Failed(format!("running {program:?}: {message}")).with_code(code)
}

/// Copies the streams until the process has ended and its output is here.
async fn attend(mut session: Session, tty: bool) -> Result<i32, Failure> {
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
    drain(outputs, &progress).await;
    Ok(code)
}

/// Waits for the end of the output as long as some comes: a process that was left in the
/// background may hold it open for ever.
async fn drain(outputs: Vec<tokio::task::JoinHandle<()>>, progress: &AtomicU64) {
    let idle = Limits::from_environment().drain;
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
