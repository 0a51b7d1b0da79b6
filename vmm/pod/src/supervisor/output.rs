//! What a container prints, on its way to its log and to who is attached.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::agent::Stdio;
use crate::logs::{LogWriter, StreamName};
use crate::supervisor::api::Size;
use crate::timeline::{Mark, Recorder};

/// Somebody who is there from a container's first start to its end.
#[derive(Debug)]
pub struct Attachment {
    /// Gets what the container prints. Who doesn't read it holds the container up.
    pub copies: Vec<(StreamName, OwnedFd)>,
    /// Is sent the container's standard input, if it has one.
    pub stdin: oneshot::Sender<OwnedFd>,
    /// Of the terminal.
    pub size: Option<Size>,
}

/// A container's output on its way to the log.
#[derive(Debug)]
pub struct Output {
    done: oneshot::Receiver<()>,
    progress: Arc<AtomicU64>,
    /// The same streams as the thread's, to end it.
    streams: Vec<OwnedFd>,
    /// Held open as long as the container runs, so that it never reads the end of file.
    _stdin: Option<OwnedFd>,
}

impl Output {
    /// Copies on a thread of its own, and notes the first byte.
    ///
    /// # Errors
    /// When there are no more threads or descriptors.
    pub fn copy(
        stdio: Stdio,
        log: LogWriter,
        container: &str,
        attachment: Option<Attachment>,
        timeline: Recorder,
    ) -> std::io::Result<Self> {
        let named: Vec<(StreamName, OwnedFd)> = [
            (StreamName::Stdout, stdio.stdout),
            (StreamName::Stderr, stdio.stderr),
        ]
        .into_iter()
        .filter_map(|(name, fd)| Some((name, fd?)))
        .collect();
        let (mut copies, mut stdin) = (Vec::new(), None);
        if let Some(attachment) = attachment {
            copies = attachment.copies;
            stdin = Some(attachment.stdin);
        }
        // A copy that nobody reads must not hold up the end either.
        let streams = named
            .iter()
            .chain(&copies)
            .map(|(_, fd)| fd.try_clone())
            .collect::<std::io::Result<_>>()?;
        if let (Some(tell), Some(stream)) = (stdin, &stdio.stdin) {
            // Who has gone meanwhile needs none.
            let _ = tell.send(stream.try_clone()?);
        }
        let log = log.with_copies(copies);
        let progress = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&progress);
        let (tell, done) = oneshot::channel();
        let container = container.to_owned();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || {
                let first = || timeline.mark(Mark::Output);
                if let Err(error) = log.copy(named, &counter, first) {
                    tracing::error!(container, %error, "writing the container's log");
                }
                // Nobody waits any more when the pod has ended.
                let _ = tell.send(());
            })?;
        Ok(Self {
            done,
            progress,
            streams,
            _stdin: stdio.stdin,
        })
    }

    /// Waits until everything is in the log, as long as something still comes. Then cuts off: a
    /// process that outlives its container's first one may hold a stream for ever.
    pub async fn drain(mut self, idle: Duration) {
        let mut seen = self.progress.load(Ordering::Relaxed);
        while timeout(idle, &mut self.done).await.is_err() {
            let now = self.progress.load(Ordering::Relaxed);
            if now == seen {
                for stream in &self.streams {
                    // It may have ended by itself meanwhile.
                    let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
                }
                return;
            }
            seen = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(attachment: Option<Attachment>) -> (Output, OwnedFd, tempfile::TempDir) {
        let root = tempfile::tempdir().unwrap();
        let log = LogWriter::create(root.path(), 0).unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut stdio = Stdio::default();
        stdio.stdout = Some(ours.into());
        (
            Output::copy(stdio, log, "web", attachment, Recorder::begin(None)).unwrap(),
            theirs.into(),
            root,
        )
    }

    #[tokio::test]
    async fn draining_waits_for_what_comes() {
        let (output, theirs, root) = output(None);
        let writer = std::thread::spawn(move || {
            for _ in 0..10 {
                rustix::io::write(&theirs, b"line\n").unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
        });

        output.drain(Duration::from_millis(300)).await;
        writer.join().unwrap();

        let log = std::fs::read_to_string(root.path().join("0.log")).unwrap();
        assert_eq!(log.lines().count(), 10);
    }

    #[tokio::test]
    async fn draining_does_not_wait_for_ever() {
        let (output, _held_open, _root) = output(None);

        timeout(
            Duration::from_secs(10),
            output.drain(Duration::from_millis(50)),
        )
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn who_is_attached_sees_what_is_logged() {
        let (copy, mut seen) = std::os::unix::net::UnixStream::pair().unwrap();
        let attachment = Attachment {
            copies: vec![(StreamName::Stdout, copy.into())],
            stdin: oneshot::channel().0,
            size: None,
        };
        let (output, theirs, root) = output(Some(attachment));

        rustix::io::write(&theirs, b"no end yet").unwrap();
        let mut text = [0; 10];
        std::io::Read::read_exact(&mut seen, &mut text).unwrap();
        drop(theirs);
        output.drain(Duration::from_secs(5)).await;

        assert_eq!(&text, b"no end yet");
        assert_eq!(std::io::Read::read(&mut seen, &mut text).unwrap(), 0);
        let log = std::fs::read_to_string(root.path().join("0.log")).unwrap();
        assert!(log.ends_with("stdout P no end yet\n"), "{log}");
    }

    #[tokio::test]
    async fn an_attached_one_that_does_not_read_does_not_hold_up_the_end() {
        let (copy, _unread) = std::os::unix::net::UnixStream::pair().unwrap();
        let attachment = Attachment {
            copies: vec![(StreamName::Stdout, copy.into())],
            stdin: oneshot::channel().0,
            size: None,
        };
        let (output, theirs, _root) = output(Some(attachment));
        let writer = std::thread::spawn(move || {
            let chunk = [b'x'; 64 * 1024];
            while rustix::io::write(&theirs, &chunk).is_ok() {}
        });

        timeout(
            Duration::from_secs(10),
            output.drain(Duration::from_millis(50)),
        )
        .await
        .unwrap();

        writer.join().unwrap();
    }
}
