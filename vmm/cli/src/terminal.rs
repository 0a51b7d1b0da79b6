//! The user's terminal, handed to a process in a container.

use std::io;

use hull_pod::supervisor::api::Size;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal that passes every key on. As it was before when dropped.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Standard input, if it is a terminal.
    ///
    /// # Errors
    /// When its settings can't be changed.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that has gone has no settings to restore.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

const DEFAULT_SIZE: Size = Size {
    columns: 80,
    rows: 24,
};

/// The terminal's size, or that of the oldest ones where there is none.
pub fn size_or_default() -> Size {
    size().unwrap_or(DEFAULT_SIZE)
}

/// The terminal's size, by whichever standard stream is one.
pub fn size() -> Option<Size> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(Size {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}
