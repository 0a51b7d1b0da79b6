//! Prints log lines of many containers, each behind its name.
//!
//! Standard output is written in large pieces: whoever prints says with [`Printer::flush`] that
//! there is nothing more for now.

use std::collections::HashMap;
use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hull_pod::logs::{LogLine, StreamName};
use indicatif::ProgressBar;

/// A line that doesn't end is printed in parts of this size.
const PART: usize = 64 * 1024;
/// Printed lines that wait to be written, at most.
const WAITING: usize = 64 * 1024;
/// ANSI colours that can be read on light and dark terminals: cyan, yellow, green, magenta, blue.
const COLOURS: [u8; 5] = [36, 33, 32, 35, 34];

/// What stands before each line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    pub prefix: bool,
    pub timestamps: bool,
}

/// Standard output and standard error, shared by all who print log lines.
#[derive(Debug)]
pub struct Printer {
    style: Style,
    /// Taken off the screen while a line is printed.
    progress: ProgressBar,
    out_is_terminal: bool,
    err_is_terminal: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    out: BufWriter<Stdout>,
    /// Lines whose end hasn't come yet.
    partial: HashMap<(String, StreamKey), Vec<u8>>,
    /// The names' colours, in the order in which they came.
    names: Vec<String>,
    width: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum StreamKey {
    Out,
    Err,
}

impl From<StreamName> for StreamKey {
    fn from(name: StreamName) -> Self {
        match name {
            StreamName::Stdout => Self::Out,
            StreamName::Stderr => Self::Err,
        }
    }
}

impl Printer {
    /// For containers with these names.
    pub fn new(style: Style, names: &[String], progress: ProgressBar) -> Self {
        Self {
            style,
            progress,
            out_is_terminal: io::stdout().is_terminal(),
            err_is_terminal: io::stderr().is_terminal(),
            state: Mutex::new(State {
                out: BufWriter::with_capacity(WAITING, io::stdout()),
                partial: HashMap::new(),
                names: names.to_vec(),
                width: names.iter().map(String::len).max().unwrap_or(0),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints a line, or keeps a part until the rest has come. It may not be seen before
    /// [`Printer::flush`].
    pub fn print(&self, name: &str, line: LogLine) -> io::Result<()> {
        let mut state = self.state();
        let stream = StreamKey::from(line.stream);
        if !self.style.prefix && !self.style.timestamps {
            return self.write(&mut state, stream, &line.text);
        }
        let key = (name.to_owned(), stream);
        let partial = state.partial.entry(key.clone()).or_default();
        if partial.is_empty() && self.style.timestamps {
            partial.extend_from_slice(format!("{:.9} ", line.time).as_bytes());
        }
        partial.extend_from_slice(&line.text);
        if !partial.ends_with(b"\n") && partial.len() < PART {
            return Ok(());
        }
        let text = state.partial.remove(&key).unwrap_or_default();
        let whole = self.assemble(&state, name, stream, &text);
        self.write(&mut state, stream, &whole)
    }

    /// Prints what has no end. Call it when a container's log is at its own.
    pub fn finish(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        for stream in [StreamKey::Out, StreamKey::Err] {
            if let Some(text) = state.partial.remove(&(name.to_owned(), stream)) {
                let whole = self.assemble(&state, name, stream, &text);
                self.write(&mut state, stream, &whole)?;
            }
        }
        self.progress.suspend(|| state.out.flush())
    }

    /// Writes what has been printed. Call it when there is nothing to print for now.
    pub fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.out.buffer().is_empty() {
            return Ok(());
        }
        self.progress.suspend(|| state.out.flush())
    }

    fn assemble(&self, state: &State, name: &str, stream: StreamKey, text: &[u8]) -> Vec<u8> {
        let mut whole = Vec::with_capacity(text.len() + name.len() + 16);
        if self.style.prefix {
            let terminal = match stream {
                StreamKey::Out => self.out_is_terminal,
                StreamKey::Err => self.err_is_terminal,
            };
            let place = state.names.iter().position(|n| n == name).unwrap_or(0);
            let width = state.width;
            let prefix = if terminal {
                let colour = COLOURS[place % COLOURS.len()];
                format!("\x1b[{colour}m{name:width$} |\x1b[0m ")
            } else {
                format!("{name:width$} | ")
            };
            whole.extend_from_slice(prefix.as_bytes());
        }
        whole.extend_from_slice(text);
        if !whole.ends_with(b"\n") && self.style.prefix {
            whole.push(b'\n');
        }
        whole
    }

    fn write(&self, state: &mut State, stream: StreamKey, text: &[u8]) -> io::Result<()> {
        match stream {
            StreamKey::Out if state.out.buffer().len() + text.len() < WAITING => {
                state.out.write_all(text)
            }
            StreamKey::Out => self.progress.suspend(|| state.out.write_all(text)),
            // On a terminal the two stay in their order.
            StreamKey::Err => self.progress.suspend(|| {
                state.out.flush()?;
                io::stderr().lock().write_all(text)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printer(prefix: bool) -> Printer {
        let style = Style {
            prefix,
            timestamps: false,
        };
        let names = ["web/a".to_owned(), "web/long".to_owned()];
        Printer::new(style, &names, ProgressBar::hidden())
    }

    #[test]
    fn prefixes_line_up() {
        let printer = printer(true);
        let state = printer.state.lock().unwrap();

        let line = printer.assemble(&state, "web/a", StreamKey::Out, b"x\n");

        assert!(
            line.ends_with(b"x\n")
                && line
                    .windows(11)
                    .any(|w| w == b"web/a    | " || w == b"web/a    |\x1b"),
            "{line:?}"
        );
    }

    #[test]
    fn a_prefixed_line_always_ends() {
        let printer = printer(true);
        let state = printer.state.lock().unwrap();

        let line = printer.assemble(&state, "web/a", StreamKey::Out, b"prompt");

        assert!(line.ends_with(b"prompt\n"));
    }

    #[test]
    fn parts_wait_for_their_line() {
        let printer = printer(true);
        let part = LogLine {
            time: jiff::Timestamp::UNIX_EPOCH,
            stream: StreamName::Stdout,
            text: b"half".to_vec(),
        };

        printer.print("web/a", part).unwrap();

        let state = printer.state.lock().unwrap();
        assert_eq!(
            state.partial[&("web/a".to_owned(), StreamKey::Out)],
            b"half"
        );
    }
}
