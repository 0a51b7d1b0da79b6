//! How far something is: a live line on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// What is being done now, on standard error.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    last: String,
}

impl Progress {
    pub fn new() -> Self {
        let bar = if io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        } else {
            ProgressBar::hidden()
        };
        Self {
            bar,
            last: String::new(),
        }
    }

    /// For those who print while it is shown.
    pub fn bar(&self) -> ProgressBar {
        self.bar.clone()
    }

    /// Says what is being done, once.
    pub fn say(&mut self, text: &str) {
        if text == self.last {
            return;
        }
        self.last = text.into();
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.set_message(text.to_owned());
        }
    }

    /// Shows bytes out of `total`; only on a terminal.
    pub fn bytes(&mut self, text: &str, done: u64, total: u64) {
        if self.bar.is_hidden() {
            return self.say(text);
        }
        if text != self.last {
            self.last = text.into();
            let template = "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style.progress_chars("=> "));
            }
            self.bar.set_message(text.to_owned());
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// Leaves nothing on the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
