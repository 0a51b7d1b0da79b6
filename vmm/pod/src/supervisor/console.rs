//! The end of the guest's console: in memory, and on disk for those who come later.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use crate::state::{StateError, replace_file};
use crate::text::printable;

/// What is remembered.
const RING: usize = 64 * 1024;
/// `console.log` is cut back to the ring when it gets longer than this.
const FILE_MAX: usize = 4 * RING;

/// Takes what the guest's console prints.
#[derive(Debug)]
pub struct Console {
    ring: Arc<Mutex<VecDeque<u8>>>,
    reader: JoinHandle<()>,
}

impl Console {
    /// Starts reading, into memory and `path`. Returns the pipe's end for the machine.
    ///
    /// # Errors
    /// When the file or the pipe can't be made.
    pub fn open(path: &Path) -> Result<(Self, OwnedFd), StateError> {
        let io_error = |e: io::Error| StateError::io("open", path, e);
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(io_error)?;
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|e| io_error(e.into()))?;
        rustix::io::ioctl_fionbio(&read, true).map_err(|e| io_error(e.into()))?;
        let pipe = pipe::Receiver::from_owned_fd(read).map_err(io_error)?;
        let ring = Arc::new(Mutex::new(VecDeque::new()));
        let mirror = Mirror {
            path: path.into(),
            file,
            written: 0,
        };
        let reader = tokio::spawn(copy(pipe, Arc::clone(&ring), mirror));
        Ok((Self { ring, reader }, write))
    }

    /// Waits until all that the machine has printed is here; call it when the machine has ended.
    pub async fn drain(&mut self, limit: std::time::Duration) {
        if tokio::time::timeout(limit, &mut self.reader).await.is_err() {
            self.reader.abort();
        }
    }

    /// The last lines, fit for a terminal.
    #[must_use]
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = ring.as_slices();
        last_lines(&[front, back].concat(), lines)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn last_lines(content: &[u8], lines: usize) -> Vec<String> {
    let all: Vec<String> = content
        .split(|b| *b == b'\n')
        .map(|line| printable(line.trim_ascii_end()))
        .filter(|line| !line.is_empty())
        .collect();
    all[all.len().saturating_sub(lines)..].to_vec()
}

async fn copy(mut pipe: pipe::Receiver, ring: Arc<Mutex<VecDeque<u8>>>, mut mirror: Mirror) {
    let mut chunk = vec![0u8; 8 * 1024];
    while let Ok(length @ 1..) = pipe.read(&mut chunk).await {
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        remember(&mut ring, &chunk[..length]);
        // The file is a convenience: when its disk is full, the ring is still there.
        if let Err(error) = mirror.write(&chunk[..length], &ring) {
            tracing::debug!(%error, "console.log");
        }
    }
}

fn remember(ring: &mut VecDeque<u8>, data: &[u8]) {
    let data = &data[data.len().saturating_sub(RING)..];
    let excess = (ring.len() + data.len()).saturating_sub(RING);
    ring.drain(..excess);
    ring.extend(data);
}

/// `console.log`.
struct Mirror {
    path: PathBuf,
    file: File,
    written: usize,
}

impl Mirror {
    fn write(&mut self, data: &[u8], ring: &VecDeque<u8>) -> Result<(), StateError> {
        let error = |e| StateError::io("write", &self.path, e);
        if self.written + data.len() <= FILE_MAX {
            self.written += data.len();
            return self.file.write_all(data).map_err(error);
        }
        let (front, back) = ring.as_slices();
        replace_file(&self.path, &[front, back].concat())?;
        self.file = File::options()
            .append(true)
            .open(&self.path)
            .map_err(error)?;
        self.written = ring.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_end() {
        let mut ring = VecDeque::new();

        for n in 0..100_000u32 {
            remember(&mut ring, format!("{n}\n").as_bytes());
        }
        remember(&mut ring, &vec![b'x'; 2 * RING]);
        remember(&mut ring, b"end");

        assert_eq!(ring.len(), RING);
        let content: Vec<u8> = ring.into_iter().collect();
        assert!(content.ends_with(b"xend"));
    }

    #[test]
    fn a_tail_is_whole_printable_lines() {
        let lines = last_lines(b"one\r\n\x1b[31mtwo\r\n\nthree\n", 2);

        assert_eq!(lines, ["\\u{1b}[31mtwo", "three"]);
    }

    #[tokio::test]
    async fn the_file_stays_bounded() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("console.log");
        let (mut console, pipe) = Console::open(&path).unwrap();
        let writer = std::thread::spawn(move || {
            let mut pipe = File::from(pipe);
            for n in 0..60_000 {
                writeln!(pipe, "line {n}").unwrap();
            }
        });

        console.drain(std::time::Duration::from_secs(20)).await;
        writer.join().unwrap();

        assert_eq!(console.tail(1), ["line 59999"]);
        assert!(std::fs::metadata(&path).unwrap().len() <= FILE_MAX as u64);
        assert!(
            std::fs::read_to_string(&path)
                .unwrap()
                .ends_with("line 59999\n")
        );
    }
}
