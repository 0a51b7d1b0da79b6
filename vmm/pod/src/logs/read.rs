//! Reads log files: the last lines, or those since a time, and new ones as they come.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use jiff::Timestamp;

use super::{StreamName, instance, instances};
use crate::state::StateError;

/// A line of a log file with its header is never longer; what is, isn't ours.
const RECORD_MAX: u64 = 64 * 1024;
/// How much is read at once when looking for the last lines.
const BLOCK: u64 = 64 * 1024;

/// From when on lines are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Since(pub Timestamp);

/// Which lines are wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct LogOptions {
    /// So many of the last lines; none: all.
    pub tail: Option<usize>,
    pub since: Option<Since>,
    /// The start before the current one.
    pub previous: bool,
    /// When following: from the first start that there is, not from the current one.
    pub from_first: bool,
}

/// One record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub time: Timestamp,
    pub stream: StreamName,
    /// With its line end, if the container has printed one here.
    pub text: Vec<u8>,
}

/// Calls `each` with the wanted lines of a container, oldest first, until it returns false.
///
/// # Errors
/// When a log is there but can't be read.
pub fn read(
    logs: &Path,
    options: LogOptions,
    mut each: impl FnMut(LogLine) -> bool,
) -> Result<(), StateError> {
    let found = instances(logs);
    let wanted = if options.previous {
        found.len().checked_sub(2)
    } else {
        found.len().checked_sub(1)
    };
    let Some(restart) = wanted.and_then(|n| found.get(n)) else {
        return Ok(());
    };
    let mut reader = LogReader::open(logs, *restart)?;
    reader.start_at(&options)?;
    while let Some(line) = reader.next()? {
        if !each(line) {
            break;
        }
    }
    Ok(())
}

/// One log file, read from some place on.
#[derive(Debug)]
pub(super) struct LogReader {
    path: std::path::PathBuf,
    file: BufReader<File>,
    since: Option<Timestamp>,
    /// The start of a record whose end isn't written yet.
    partial: Vec<u8>,
}

impl LogReader {
    pub(super) fn open(logs: &Path, restart: u32) -> Result<Self, StateError> {
        let path = instance(logs, restart);
        let file = File::open(&path).map_err(|e| StateError::io("open", &path, e))?;
        Ok(Self {
            path,
            file: BufReader::with_capacity(64 * 1024, file),
            since: None,
            partial: Vec::new(),
        })
    }

    /// Goes to the first line that `options` ask for.
    pub(super) fn start_at(&mut self, options: &LogOptions) -> Result<(), StateError> {
        self.since = options.since.map(|s| s.0);
        if let Some(lines) = options.tail {
            let place = tail(self.file.get_mut(), lines)
                .and_then(|place| self.file.seek(SeekFrom::Start(place)));
            place.map_err(|e| StateError::io("read", &self.path, e))?;
        }
        Ok(())
    }

    /// The next whole line; none when there is none yet.
    pub(super) fn next(&mut self) -> Result<Option<LogLine>, StateError> {
        loop {
            let room = RECORD_MAX.saturating_sub(self.partial.len() as u64);
            (&mut self.file)
                .take(room)
                .read_until(b'\n', &mut self.partial)
                .map_err(|e| StateError::io("read", &self.path, e))?;
            let whole = self.partial.last() == Some(&b'\n');
            if !whole && (self.partial.len() as u64) < RECORD_MAX {
                return Ok(None);
            }
            let record = std::mem::take(&mut self.partial);
            match parse(&record) {
                Some(line) if self.since.is_none_or(|since| line.time >= since) => {
                    return Ok(Some(line));
                }
                _ => {}
            }
        }
    }
}

fn parse(record: &[u8]) -> Option<LogLine> {
    let mut fields = record.splitn(4, |b| *b == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let stream = match fields.next()? {
        b"stdout" => StreamName::Stdout,
        b"stderr" => StreamName::Stderr,
        _ => return None,
    };
    let tag = fields.next()?;
    let mut text = fields.next()?.to_vec();
    if tag != b"F" {
        text.pop();
    }
    Some(LogLine { time, stream, text })
}

/// Where the last `lines` records of a file begin.
fn tail(file: &mut File, lines: usize) -> io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    let mut left = lines;
    let mut place = end;
    let mut block = Vec::new();
    while place > 0 {
        let start = place.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        file.take(place - start).read_to_end(&mut block)?;
        for (n, _) in block.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            let after = start + n as u64 + 1;
            // The end of the last line is not the start of another.
            if after == end {
                continue;
            }
            left = match left.checked_sub(1) {
                Some(left) if left > 0 => left,
                _ => return Ok(after),
            };
        }
        place = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::{LINE_MAX, LogWriter};

    fn written(parts: &[&[u8]]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(root.path(), 0).unwrap();
        for part in parts {
            log.write(StreamName::Stdout, part).unwrap();
        }
        root
    }

    fn texts(root: &Path, options: LogOptions) -> Vec<String> {
        let mut out = Vec::new();
        read(root, options, |line| {
            out.push(String::from_utf8(line.text).unwrap());
            true
        })
        .unwrap();
        out
    }

    fn last(lines: usize) -> LogOptions {
        LogOptions {
            tail: Some(lines),
            ..LogOptions::default()
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let root = written(&[b"a b c\n\n", b"d\n"]);

        assert_eq!(
            texts(root.path(), LogOptions::default()),
            ["a b c\n", "\n", "d\n"]
        );
    }

    #[test]
    fn split_lines_come_together_again() {
        let long = "x".repeat(3 * LINE_MAX + 1) + "\n";
        let root = written(&[long.as_bytes()]);

        assert_eq!(texts(root.path(), LogOptions::default()).concat(), long);
    }

    #[test]
    fn the_last_lines() {
        let many: String = (0..10_000).map(|n| format!("{n}\n")).collect();
        let root = written(&[many.as_bytes()]);

        assert_eq!(texts(root.path(), last(2)), ["9998\n", "9999\n"]);
        assert_eq!(texts(root.path(), last(9000)).len(), 9000);
        assert_eq!(texts(root.path(), last(20_000)).len(), 10_000);
        assert!(texts(root.path(), last(0)).is_empty());
    }

    #[test]
    fn lines_since_a_time() {
        let root = written(&[b"old\n"]);
        let since = LogOptions {
            since: Some(Since(Timestamp::now())),
            ..LogOptions::default()
        };
        let options = since;

        assert!(texts(root.path(), options).is_empty());
        assert_eq!(texts(root.path(), LogOptions::default()), ["old\n"]);
    }

    #[test]
    fn the_start_before() {
        let root = written(&[b"first\n"]);
        LogWriter::create(root.path(), 1)
            .unwrap()
            .write(StreamName::Stdout, b"second\n")
            .unwrap();
        let previous = LogOptions {
            previous: true,
            ..LogOptions::default()
        };

        assert_eq!(texts(root.path(), previous), ["first\n"]);
        assert_eq!(texts(root.path(), LogOptions::default()), ["second\n"]);
    }

    #[test]
    fn no_log_is_no_lines() {
        let root = tempfile::tempdir().unwrap();

        assert!(texts(&root.path().join("none"), LogOptions::default()).is_empty());
    }
}
