//! When the steps of a machine's start end, for who looks for what takes its time.
//!
//! Times are microseconds of the host's `CLOCK_MONOTONIC`, which all of its processes have in common.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Microseconds of `CLOCK_MONOTONIC`.
#[must_use]
pub fn now_micros() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec)
        .saturating_mul(1_000_000)
        .saturating_add(part(now.tv_nsec) / 1000)
}

/// How `hull-vmm` came to its guest's first instruction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// When the process began.
    pub begun: u64,
    /// One after another: each begins where the one before it ends.
    pub steps: Vec<Step>,
    /// When its processors were let into the guest.
    pub first_run: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub ended: u64,
}

/// Notes the steps of the process that it is in.
#[derive(Debug)]
pub struct Steps(Started);

impl Steps {
    /// The process begins.
    #[must_use]
    pub fn begin() -> Self {
        Self(Started {
            begun: now_micros(),
            ..Started::default()
        })
    }

    /// What began with the end of the step before, or with the process, has ended.
    pub fn end(&mut self, name: &str) {
        self.0.steps.push(Step {
            name: name.to_owned(),
            ended: now_micros(),
        });
    }

    /// The guest is about to run.
    #[must_use]
    pub fn started(mut self) -> Started {
        self.0.first_run = now_micros();
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_each_other() {
        let mut steps = Steps::begin();
        steps.end("one");
        steps.end("two");
        let started = steps.started();

        let names: Vec<_> = started.steps.iter().map(|step| &*step.name).collect();
        let mut times = vec![started.begun];
        times.extend(started.steps.iter().map(|step| step.ended));
        times.push(started.first_run);
        assert_eq!(names, ["one", "two"]);
        assert!(times.is_sorted() && times[0] > 0, "{times:?}");
    }
}
