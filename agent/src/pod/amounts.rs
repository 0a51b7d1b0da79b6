//! What containers use and may use, and containers that stand still.

use super::{Pod, blocking};
use crate::container::{cgroup, exited, resources, stats};
use crate::error::Result;
use hull_protocol::agent::StatsResponse;

impl Pod {
    /// What a container uses, or all together.
    pub fn stats(&self, container: &str) -> Result<StatsResponse> {
        if !container.is_empty() {
            return stats::read(self.container(container)?.cgroup.path());
        }
        let mut all = stats::read(&cgroup::all_containers())?;
        let total = stats::total_memory()?;
        let memory = all.memory.mut_or_insert_default();
        memory.limit = memory.limit.min(total);
        Ok(all)
    }

    /// Lets a container stand still.
    pub async fn freeze(&self, container: &str) -> Result<()> {
        self.container(container)?.freeze().await
    }

    /// Lets it go on.
    pub async fn thaw(&self, container: &str) -> Result<()> {
        self.container(container)?.thaw().await
    }

    /// Changes what a container may use.
    pub async fn update(&self, container: &str, given: &[u8]) -> Result<()> {
        let container = self.container(container)?;
        let wanted = resources::checked(resources::parse(given)?)?;
        // Less memory than is in use: the kernel looks for some first.
        blocking(move || resources::apply(&container.cgroup, &wanted)).await
    }

    /// Waits until the kernel has killed more than `kills` processes of a container for its memory limit, or the
    /// container has ended. Returns how many.
    pub async fn wait_oom(&self, container: &str, kills: u64) -> Result<u64> {
        let (exit, cgroup) = {
            let container = self.container(container)?;
            (container.first.exit(), container.cgroup.clone())
        };
        tokio::select! {
            biased;
            more = cgroup.more_oom_kills(kills) => more,
            _ = exited(exit) => Ok(cgroup.oom_kills()),
        }
    }
}
