//! How long things may take.

use std::env;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::configuration::Configuration;

/// Long enough never to fire where nothing is wrong, on slow machines by a factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// From the machine's start to the agent's word that it is ready.
    pub agent_ready: Duration,
    /// One call of the agent.
    pub call: Duration,
    /// For the last output of a container that has ended, without any byte coming.
    pub drain: Duration,
    /// From SIGKILL, or the agent's Shutdown, to the end.
    pub end: Duration,
}

impl Limits {
    /// By `HULL_TIMEOUT_SCALE` (a factor) and `HULL_AGENT_TIMEOUT` (seconds for the agent to come up, taken as it
    /// is). Without the former by the configuration, and without that 1, or 4 inside a virtual machine, where another
    /// one is slow.
    #[must_use]
    pub fn of(configuration: &Configuration) -> Self {
        let number = |name| env::var(name).ok().and_then(|text| text.parse().ok());
        let scale = number("HULL_TIMEOUT_SCALE")
            .or(configuration.timeout_scale)
            .unwrap_or_else(|| if in_virtual_machine() { 4 } else { 1 });
        Self::new(scale, number("HULL_AGENT_TIMEOUT"))
    }

    fn new(scale: u32, agent_seconds: Option<u32>) -> Self {
        let scaled = |seconds| Duration::from_secs(seconds) * scale.clamp(1, 1000);
        Self {
            agent_ready: agent_seconds.map_or(scaled(30), |s| Duration::from_secs(s.into())),
            call: scaled(30),
            drain: scaled(5),
            end: scaled(5),
        }
    }
}

fn in_virtual_machine() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        text.lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_scales() {
        let slow = Limits::new(10, None);

        assert_eq!(slow.call, Limits::new(1, None).call * 10);
        assert_eq!(Limits::new(0, None), Limits::new(1, None));
    }

    #[test]
    fn the_agents_own_limit_is_taken_as_it_is() {
        assert_eq!(Limits::new(10, Some(7)).agent_ready.as_secs(), 7);
    }
}
