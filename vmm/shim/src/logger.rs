//! A program that takes what a container prints, as `binary://PATH?KEY=VALUE` names it: nerdctl keeps its logs so.
//!
//! It reads standard output from descriptor 3 and standard error from 4, and closes 5 when it is ready.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::host::Host;

const SCHEME: &str = "binary://";
/// Until it is ready.
const LIMIT: Duration = Duration::from_secs(20);
/// Above all that it is given.
const ABOVE: RawFd = 10;

#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    #[error("running logger {program}")]
    Io {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("logger {program} was not ready after {} s", LIMIT.as_secs())]
    NotReady { program: String },
}

/// A logger that is ready.
#[derive(Debug)]
pub struct Logger {
    pub child: Child,
    pub stdout: pipe::Sender,
    pub stderr: pipe::Sender,
}

/// Whether a place is a logger.
#[must_use]
pub fn is_logger(place: &str) -> bool {
    place.starts_with(SCHEME)
}

impl Logger {
    /// Starts it on the host, for a container of containerd's namespace.
    ///
    /// # Errors
    /// When it can't be started, or is not ready in time.
    pub async fn start(
        host: &Host,
        place: &str,
        namespace: &str,
        id: &str,
    ) -> Result<Self, LoggerError> {
        let (program, arguments) = parse(place);
        let failed = |source| LoggerError::Io {
            program: program.clone(),
            source,
        };
        let started = || -> io::Result<_> {
            let pipe = || pipe_with(PipeFlags::CLOEXEC);
            let ((out, stdout), (err, stderr), (ready, tell)) = (pipe()?, pipe()?, pipe()?);
            let mut command = std::process::Command::new(&program);
            command
                .args(&arguments)
                .env("CONTAINER_ID", id)
                .env("CONTAINER_NAMESPACE", namespace)
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            host.enter_with(&mut command)?;
            give(&mut command, [out, err, tell]);
            let child = Command::from(command).spawn()?;
            for end in [&stdout, &stderr, &ready] {
                rustix::io::ioctl_fionbio(end, true)?;
            }
            let ready = pipe::Receiver::from_owned_fd(ready)?;
            let logger = Self {
                child,
                stdout: pipe::Sender::from_owned_fd(stdout)?,
                stderr: pipe::Sender::from_owned_fd(stderr)?,
            };
            Ok((logger, ready))
        };
        let (logger, mut ready) = started().map_err(failed)?;
        match timeout(LIMIT, ready.read(&mut [0; 1])).await {
            Ok(_) => Ok(logger),
            Err(_) => Err(LoggerError::NotReady { program }),
        }
    }
}

/// Lets a program have descriptors as its 3, 4 and 5.
fn give(command: &mut std::process::Command, descriptors: [OwnedFd; 3]) {
    let place = move || {
        // First out of the way: any of them may have another's number.
        let mut moved = [0; 3];
        for (descriptor, moved) in descriptors.iter().zip(&mut moved) {
            // SAFETY: the descriptor is open, and this takes no pointer.
            *moved = unsafe { libc::fcntl(descriptor.as_fd().as_raw_fd(), libc::F_DUPFD, ABOVE) };
            if *moved < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (number, moved) in (3..).zip(moved) {
            // SAFETY: both are numbers; what was there, in the child, is of no use there.
            if unsafe { libc::dup2(moved, number) } < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: it was opened above, and nothing else owns it.
            unsafe { libc::close(moved) };
        }
        Ok(())
    };
    // SAFETY: fcntl, dup2 and close are async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(place);
    }
}

/// The program, and its arguments: keys and values in turn.
fn parse(place: &str) -> (String, Vec<String>) {
    let rest = place.strip_prefix(SCHEME).unwrap_or(place);
    let (program, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decoded(key, true));
        if !value.is_empty() {
            arguments.push(decoded(value, true));
        }
    }
    (decoded(program, false), arguments)
}

/// Percent-encoding (RFC 3986 section 2.1), and in a query a plus for a blank.
fn decoded(text: &str, query: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
                continue;
            }
            (b'+', _) if query => bytes.push(b' '),
            _ => bytes.push(*first),
        }
        rest = tail;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn keys_and_values_are_arguments() {
        let (program, arguments) = parse("binary:///usr/bin/log%20it?_A=/var/lib/x%2Fy&b&c=d+e");

        assert_eq!(program, "/usr/bin/log it");
        assert_eq!(arguments, ["_A", "/var/lib/x/y", "b", "c", "d e"]);
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("logger");
        let script =
            "#!/bin/sh\ncd $2\nexec 5>&-\ncat <&3 >out\ncat <&4 >err\necho $CONTAINER_ID >id\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let place = format!(
            "binary://{}?dir={}",
            program.display(),
            root.path().display()
        );

        let host = Host::here().unwrap();
        let mut logger = Logger::start(&host, &place, "default", "web")
            .await
            .unwrap();
        logger.stdout.write_all(b"one").await.unwrap();
        logger.stderr.write_all(b"two").await.unwrap();
        drop((logger.stdout, logger.stderr));
        assert!(logger.child.wait().await.unwrap().success());

        let read = |name| std::fs::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(
            (read("out"), read("err"), read("id")),
            ("one".into(), "two".into(), "web\n".into())
        );
    }

    #[tokio::test]
    async fn a_logger_that_is_not_there_is_an_error() {
        let host = Host::here().unwrap();

        let missing = Logger::start(&host, "binary:///nowhere/logger", "default", "web").await;

        assert!(matches!(missing, Err(LoggerError::Io { .. })));
    }
}
