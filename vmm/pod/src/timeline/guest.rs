//! The guest's clock, on the host's.

use hull_protocol::agent::HelloResponse;

use super::now_micros;

/// What the guest said of its clock (`CLOCK_BOOTTIME`, in microseconds), and when it had said it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestClock {
    /// On the host's clock.
    pub answered: u64,
    pub now: u64,
    pub agent_start: u64,
    pub agent_ready: u64,
}

/// What happened in the guest, on the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Boot {
    pub kernel: u64,
    pub agent_start: u64,
    pub agent_ready: u64,
}

impl GuestClock {
    /// An answer that has just come.
    #[must_use]
    pub fn of(answer: &HelloResponse) -> Self {
        Self {
            answered: now_micros(),
            now: answer.now_micros,
            agent_start: answer.agent_start_micros,
            agent_ready: answer.agent_ready_micros,
        }
    }

    /// None: it says nothing of this start. So does the guest of a clone, which booted before its machine ran, and one
    /// that lies. Times are late by what the answer took to come.
    pub(super) fn boot(&self, first_run: u64) -> Option<Boot> {
        if self.now == 0 || self.agent_start > self.agent_ready || self.agent_ready > self.now {
            return None;
        }
        let kernel = self.answered.checked_sub(self.now)?;
        (kernel >= first_run).then(|| Boot {
            kernel,
            // No more than `answered`, as what is added is no more than `now`.
            agent_start: kernel.saturating_add(self.agent_start),
            agent_ready: kernel.saturating_add(self.agent_ready),
        })
    }
}
