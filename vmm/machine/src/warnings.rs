//! What `hull-vmm` has to say that ends nothing: to its supervisor, whose log it goes to.

use std::sync::Arc;

use log::{Level, LevelFilter, Log, Metadata, Record, SetLoggerError};

use crate::channel::Channel;
use crate::control::Event;

/// Longest warning, in characters.
pub const WARNING_CHARS: usize = 500;

#[derive(Debug)]
struct ToSupervisor(Arc<Channel>);

/// Sends this process's warnings and errors, those of its libraries too, over `control`.
///
/// # Errors
/// When the process has a logger already.
pub fn send_to(control: Arc<Channel>) -> Result<(), SetLoggerError> {
    log::set_boxed_logger(Box::new(ToSupervisor(control)))?;
    log::set_max_level(LevelFilter::Warn);
    Ok(())
}

impl Log for ToSupervisor {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let text = record.args().to_string();
            let text = text.chars().take(WARNING_CHARS).collect();
            // A supervisor that has no room for it is busy with more important things.
            let _ = self.0.try_send(&Event::Warning(text), &[]);
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_arrive_cut_and_the_rest_does_not() {
        let (ours, theirs) = Channel::pair().unwrap();
        let logger = ToSupervisor(Arc::new(ours));
        let long = "x".repeat(WARNING_CHARS + 1);
        let say = |level| {
            let record = Record::builder();
            logger.log(
                &{ record }
                    .level(level)
                    .args(format_args!("{level} {long}"))
                    .build(),
            );
        };

        say(Level::Info);
        say(Level::Warn);

        let (event, _) = theirs.receive::<Event>().unwrap().unwrap();
        let Event::Warning(text) = event else {
            panic!("{event:?}");
        };
        assert_eq!(text.len(), WARNING_CHARS);
        assert!(text.starts_with("WARN xx"), "{text}");
    }
}
