//! What containers use and may use, and containers that stand still.

use std::collections::HashMap;

use hull_protocol::agent::{
    self, FreezeRequest, StatsRequest, ThawRequest, UpdateRequest, WaitOomRequest,
};
use oci_spec::runtime::LinuxResources;
use ttrpc::context::Context;

use super::{Agent, AgentError, failure};

/// As many as the agent says at most.
const DETAIL_MAX: usize = 128;
const DEVICES_MAX: usize = 64;
/// Longest name of a number, in bytes.
const NAME_MAX: usize = 64;

/// What a container, or the whole pod, uses and has used. What the guest's kernel does not tell is 0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu: CpuStats,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    /// At most 64.
    pub io: Vec<IoStats>,
}

/// Times in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuStats {
    pub usage: u64,
    pub user: u64,
    pub system: u64,
    /// Periods of the limit in which it ran, and was held back.
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled: u64,
}

/// In bytes. A limit of [`u64::MAX`] is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryStats {
    pub usage: u64,
    pub limit: u64,
    pub peak: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub swap_peak: u64,
    /// memory.stat, by its own names. At most 128.
    pub detail: HashMap<String, u64>,
    /// memory.events, by its own names. At most 128.
    pub events: HashMap<String, u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PidsStats {
    pub current: u64,
    /// [`u64::MAX`]: none.
    pub limit: u64,
}

/// A block device of the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoStats {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

impl Agent {
    /// What a container uses; None: all of the pod together.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn stats(&self, container: Option<&str>) -> Result<Stats, AgentError> {
        let request = StatsRequest {
            container_id: container.unwrap_or_default().into(),
            ..Default::default()
        };
        self.call("Stats", self.client.stats(self.context(), &request))
            .await
            .map(Stats::from)
    }

    /// Lets a container stand still, until [`Self::thaw`] or its end.
    ///
    /// # Errors
    /// See [`AgentError`]. It goes on then.
    pub async fn freeze(&self, container: &str) -> Result<(), AgentError> {
        let request = FreezeRequest {
            container_id: container.into(),
            ..Default::default()
        };
        self.call("Freeze", self.client.freeze(self.context(), &request))
            .await
            .map(drop)
    }

    /// # Errors
    /// See [`AgentError`].
    pub async fn thaw(&self, container: &str) -> Result<(), AgentError> {
        let request = ThawRequest {
            container_id: container.into(),
            ..Default::default()
        };
        self.call("Thaw", self.client.thaw(self.context(), &request))
            .await
            .map(drop)
    }

    /// Changes what a container may use. What `resources` does not name stays.
    ///
    /// # Errors
    /// See [`AgentError`]. The agent refuses more than its machine has.
    pub async fn update(
        &self,
        container: &str,
        resources: &LinuxResources,
    ) -> Result<(), AgentError> {
        let json = serde_json::to_vec(resources).map_err(|error| AgentError::Protocol {
            call: "Update",
            message: error.to_string(),
        })?;
        let request = UpdateRequest {
            container_id: container.into(),
            resources: json,
            ..Default::default()
        };
        self.call("Update", self.client.update(self.context(), &request))
            .await
            .map(drop)
    }

    /// Waits until the guest's kernel has killed more than `kills` processes of a container for its memory limit, or
    /// the container has ended, as long as it takes. Returns how many.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn wait_oom(&self, container: &str, kills: u64) -> Result<u64, AgentError> {
        let request = WaitOomRequest {
            container_id: container.into(),
            kills,
            ..Default::default()
        };
        self.client
            .wait_oom(Context::default(), &request)
            .await
            .map(|answer| answer.kills)
            .map_err(|error| failure("WaitOom", error))
    }
}

impl From<agent::StatsResponse> for Stats {
    fn from(answer: agent::StatsResponse) -> Self {
        let cpu = answer.cpu.unwrap_or_default();
        let memory = answer.memory.unwrap_or_default();
        let pids = answer.pids.unwrap_or_default();
        Self {
            cpu: CpuStats {
                usage: cpu.usage_micros,
                user: cpu.user_micros,
                system: cpu.system_micros,
                periods: cpu.periods,
                throttled_periods: cpu.throttled_periods,
                throttled: cpu.throttled_micros,
            },
            memory: MemoryStats {
                usage: memory.usage,
                limit: memory.limit,
                peak: memory.peak,
                swap_usage: memory.swap_usage,
                swap_limit: memory.swap_limit,
                swap_peak: memory.swap_peak,
                detail: bounded(memory.detail),
                events: bounded(memory.events),
            },
            pids: PidsStats {
                current: pids.current,
                limit: pids.limit,
            },
            io: answer
                .io
                .into_iter()
                .take(DEVICES_MAX)
                .map(|device| IoStats {
                    major: device.major,
                    minor: device.minor,
                    read_bytes: device.read_bytes,
                    written_bytes: device.written_bytes,
                    reads: device.reads,
                    writes: device.writes,
                })
                .collect(),
        }
    }
}

fn bounded(numbers: HashMap<String, u64>) -> HashMap<String, u64> {
    numbers
        .into_iter()
        .filter(|(name, _)| name.len() <= NAME_MAX)
        .take(DETAIL_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_cut_to_what_can_be() {
        let mut answer = agent::StatsResponse::default();
        let memory = answer.memory.mut_or_insert_default();
        memory.usage = u64::MAX;
        memory.detail = (0..10_000).map(|n| (format!("name{n}"), n)).collect();
        memory.events.insert("x".repeat(1 << 20), 1);
        answer.io = vec![agent::IoStats::default(); 10_000];

        let stats = Stats::from(answer);

        assert_eq!(stats.memory.usage, u64::MAX);
        assert_eq!(stats.memory.detail.len(), DETAIL_MAX);
        assert!(stats.memory.events.is_empty());
        assert_eq!(stats.io.len(), DEVICES_MAX);
        assert_eq!(stats.cpu, CpuStats::default());
    }
}
