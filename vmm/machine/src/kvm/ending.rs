//! The end of a machine: the first reason wins, and everybody hears of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;

use crate::control::ExitReason;

/// Shared by all threads that can see the machine end.
#[derive(Debug, Clone)]
pub struct Ending(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    reason: OnceLock<ExitReason>,
    event: OwnedFd,
}

impl Ending {
    /// A machine that has not ended.
    ///
    /// # Errors
    /// When there is no event descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared {
            reason: OnceLock::new(),
            event,
        })))
    }

    /// Ends the machine. Only the first reason counts: a panic is followed by a reset.
    pub fn end(&self, reason: ExitReason) {
        if self.0.reason.set(reason).is_ok() {
            // An eventfd that nobody reads has room for more than one.
            let written = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
            debug_assert!(written.is_ok());
        }
    }

    /// Whether the machine has ended.
    pub fn is_over(&self) -> bool {
        self.0.reason.get().is_some()
    }

    /// Waits for the end.
    pub fn wait(&self) -> ExitReason {
        loop {
            if let Some(reason) = self.0.reason.get() {
                return reason.clone();
            }
            let mut event = [PollFd::new(&self.0.event, PollFlags::IN)];
            // Interrupted or not, the reason tells.
            let _ = poll(&mut event, None);
        }
    }
}

impl AsFd for Ending {
    /// Readable from the end on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let ending = Ending::new().unwrap();
        let other = ending.clone();

        other.end(ExitReason::Panic);
        ending.end(ExitReason::Reset);

        assert_eq!(ending.wait(), ExitReason::Panic);
    }

    #[test]
    fn the_descriptor_becomes_readable_at_the_end_only() {
        let ending = Ending::new().unwrap();
        let readable = |ending: &Ending| {
            let mut event = [PollFd::new(ending, PollFlags::IN)];
            poll(&mut event, Some(&rustix::event::Timespec::default())).unwrap()
        };

        let before = readable(&ending);
        ending.end(ExitReason::PowerOff);
        let after = readable(&ending);

        assert_eq!((before, after), (0, 1));
    }
}
