//! Writes one start of a container: lines as they come, from two streams into one file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SendFlags;

use super::{INSTANCES_KEPT, LINE_MAX, instance, instances};
use crate::state::{StateError, private_dir};

/// Read at once. With a line for each stream this is all that a writer holds.
const CHUNK: usize = 64 * 1024;
/// How soon a disk that was full is tried again.
const FULL_DISK_RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamName {
    Stdout,
    Stderr,
}

impl StreamName {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// The log of one start of a container.
#[derive(Debug)]
pub struct LogWriter {
    file: File,
    /// The incomplete last line of each stream.
    pending: [Vec<u8>; 2],
    out: Vec<u8>,
    /// Get what is written as it comes.
    copies: Vec<(StreamName, OwnedFd)>,
}

impl LogWriter {
    /// Opens the file of the `restart`-th restart in a container's log directory, which is made,
    /// and removes those that are too old.
    ///
    /// # Errors
    /// When the directory or the file can't be made.
    pub fn create(logs: &Path, restart: u32) -> Result<Self, StateError> {
        private_dir(logs)?;
        for old in instances(logs) {
            if old.saturating_add(INSTANCES_KEPT) < restart {
                let path = instance(logs, old);
                fs::remove_file(&path).map_err(|e| StateError::io("remove", path, e))?;
            }
        }
        let path = instance(logs, restart);
        let file = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|e| StateError::io("open", path, e))?;
        Ok(Self {
            file,
            pending: [Vec::new(), Vec::new()],
            out: Vec::new(),
            copies: Vec::new(),
        })
    }

    /// Writes each stream to these as well, for as long as they take it. One that is slow stops the
    /// reading, as a slow disk does.
    #[must_use]
    pub fn with_copies(mut self, copies: Vec<(StreamName, OwnedFd)>) -> Self {
        self.copies = copies;
        self
    }

    /// Copies until every stream has ended. Blocks; meant for a thread of its own. A disk that
    /// is slow stops the reading, and so in the end the container.
    ///
    /// A full disk is waited for. `progress` counts the bytes that have been read, `first` is called at the first.
    ///
    /// # Errors
    /// When the log can't be written. The streams are then closed, and the container gets EPIPE.
    pub fn copy(
        mut self,
        mut streams: Vec<(StreamName, OwnedFd)>,
        progress: &AtomicU64,
        first: impl FnOnce(),
    ) -> io::Result<()> {
        let mut first = Some(first);
        let mut chunk = vec![0u8; CHUNK];
        while !streams.is_empty() {
            let mut ready: Vec<PollFd<'_>> = streams
                .iter()
                .map(|(_, fd)| PollFd::new(fd, PollFlags::IN))
                .collect();
            match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            let ready: Vec<bool> = ready.iter().map(|p| !p.revents().is_empty()).collect();
            let mut ended = Vec::new();
            for (n, (name, fd)) in streams.iter().enumerate() {
                if !ready.get(n).copied().unwrap_or(false) {
                    continue;
                }
                match rustix::io::read(fd.as_fd(), &mut chunk[..]) {
                    Ok(0) => ended.push(n),
                    Ok(length) => {
                        progress.fetch_add(length as u64, Ordering::Relaxed);
                        if let Some(first) = first.take() {
                            first();
                        }
                        self.write(*name, &chunk[..length])?;
                        self.copy_on(*name, &chunk[..length]);
                    }
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                    // The machine is gone: what was read so far is all that there is.
                    Err(_) => ended.push(n),
                }
            }
            for n in ended.into_iter().rev() {
                streams.remove(n);
            }
        }
        self.finish()
    }

    /// Appends output of one stream. Whole lines reach the file before this returns.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write(&mut self, stream: StreamName, mut data: &[u8]) -> io::Result<()> {
        let now = Timestamp::now();
        self.out.clear();
        while !data.is_empty() {
            let pending = &mut self.pending[stream as usize];
            let room = LINE_MAX - pending.len();
            let window = &data[..data.len().min(room)];
            match window.iter().position(|b| *b == b'\n') {
                Some(end) => {
                    header(&mut self.out, now, stream, 'F');
                    self.out.append(pending);
                    self.out.extend_from_slice(&window[..=end]);
                    data = &data[end + 1..];
                }
                // Only a line that goes on past the limit is split, not one that just fills it.
                None if window.len() == room && data.get(room).is_some_and(|b| *b != b'\n') => {
                    header(&mut self.out, now, stream, 'P');
                    self.out.append(pending);
                    self.out.extend_from_slice(window);
                    self.out.push(b'\n');
                    data = &data[room..];
                }
                None if window.is_empty() => {
                    // Full since the last call, and its end comes first in this one, or more.
                    let tag = if data[0] == b'\n' { 'F' } else { 'P' };
                    header(&mut self.out, now, stream, tag);
                    self.out.append(pending);
                    self.out.push(b'\n');
                    data = &data[usize::from(tag == 'F')..];
                }
                None => {
                    pending.extend_from_slice(window);
                    data = &data[window.len()..];
                }
            }
        }
        self.flush()
    }

    /// Passes output on. Who doesn't take it any more gets nothing from then on.
    fn copy_on(&mut self, stream: StreamName, data: &[u8]) {
        self.copies.retain(|(name, copy)| {
            let mut left = if *name == stream { data } else { &[] };
            while !left.is_empty() {
                match rustix::net::send(copy, left, SendFlags::NOSIGNAL) {
                    Ok(length) => left = &left[length..],
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => return false,
                }
            }
            true
        });
    }

    /// Writes what had no line end.
    fn finish(mut self) -> io::Result<()> {
        let now = Timestamp::now();
        self.out.clear();
        for stream in [StreamName::Stdout, StreamName::Stderr] {
            let pending = &mut self.pending[stream as usize];
            if !pending.is_empty() {
                header(&mut self.out, now, stream, 'P');
                self.out.append(pending);
                self.out.push(b'\n');
            }
        }
        self.flush()
    }

    /// Writes what has been put together. A full disk blocks, as a slow one does.
    fn flush(&mut self) -> io::Result<()> {
        let mut left = &self.out[..];
        while !left.is_empty() {
            match self.file.write(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => left = &left[length..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                    ) =>
                {
                    std::thread::sleep(FULL_DISK_RETRY);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn header(out: &mut Vec<u8>, now: Timestamp, stream: StreamName, tag: char) {
    // Writing to a Vec can't fail.
    let _ = write!(out, "{now:.9} {} {tag} ", stream.as_str());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of the first start without their timestamps.
    fn lines(logs: &Path) -> Vec<String> {
        fs::read_to_string(instance(logs, 0))
            .unwrap()
            .lines()
            .map(|l| l.split_once(' ').unwrap().1.to_owned())
            .collect()
    }

    #[test]
    fn lines_of_two_streams_stay_apart() {
        let root = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(root.path(), 0).unwrap();

        log.write(StreamName::Stdout, b"one\ntw").unwrap();
        log.write(StreamName::Stderr, b"error\n").unwrap();
        log.write(StreamName::Stdout, b"o\nrest").unwrap();
        log.finish().unwrap();

        assert_eq!(
            lines(root.path()),
            [
                "stdout F one",
                "stderr F error",
                "stdout F two",
                "stdout P rest"
            ]
        );
    }

    #[test]
    fn a_long_line_is_split() {
        let root = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(root.path(), 0).unwrap();
        let long = "x".repeat(LINE_MAX + 3) + "\n";

        for byte in long.as_bytes().chunks(1000) {
            log.write(StreamName::Stdout, byte).unwrap();
        }

        let lines = lines(root.path());
        assert_eq!(lines[0].len(), "stdout P ".len() + LINE_MAX);
        assert_eq!(lines[1], "stdout F xxx");
    }

    #[test]
    fn a_line_that_just_fits_is_whole_however_it_comes() {
        for cut in [1, LINE_MAX - 1, LINE_MAX] {
            let root = tempfile::tempdir().unwrap();
            let mut log = LogWriter::create(root.path(), 0).unwrap();
            let line = "x".repeat(LINE_MAX) + "\n";

            log.write(StreamName::Stdout, &line.as_bytes()[..cut])
                .unwrap();
            log.write(StreamName::Stdout, &line.as_bytes()[cut..])
                .unwrap();

            let lines = lines(root.path());
            assert_eq!(lines.len(), 1, "cut at {cut}");
            assert!(lines[0].starts_with("stdout F x"));
        }
    }

    #[test]
    fn timestamps_have_nanoseconds() {
        let root = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(root.path(), 0).unwrap();

        log.write(StreamName::Stdout, b"\n").unwrap();

        let text = fs::read_to_string(instance(root.path(), 0)).unwrap();
        let (stamp, rest) = text.split_once(' ').unwrap();
        assert_eq!(stamp.len(), "2026-01-02T03:04:05.678901234Z".len());
        assert_eq!(rest, "stdout F \n");
    }

    #[test]
    fn copying_ends_with_the_last_stream() {
        let root = tempfile::tempdir().unwrap();
        let log = LogWriter::create(root.path(), 0).unwrap();
        let (out_read, out_write) = rustix::pipe::pipe().unwrap();
        let (err_read, err_write) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&out_write, b"out\n").unwrap();
        drop(out_write);
        rustix::io::write(&err_write, b"err\n").unwrap();
        drop(err_write);

        let progress = AtomicU64::new(0);
        let streams = vec![
            (StreamName::Stdout, out_read),
            (StreamName::Stderr, err_read),
        ];
        log.copy(streams, &progress, || ()).unwrap();

        assert_eq!(progress.into_inner(), 8);
        assert_eq!(lines(root.path()), ["stdout F out", "stderr F err"]);
    }

    #[test]
    fn old_starts_go() {
        let root = tempfile::tempdir().unwrap();

        for restart in 0..8 {
            LogWriter::create(root.path(), restart).unwrap();
        }

        assert_eq!(instances(root.path()), [3, 4, 5, 6, 7]);
    }
}
