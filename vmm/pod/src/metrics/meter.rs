//! Measures a machine that runs.

use std::sync::Arc;
use std::time::Duration;

use super::process::{ProcessMetrics, touched};
use super::{Calls, MachineMetrics};
use crate::network::{self, Namespace};
use crate::oci::MachineSize;

/// What there is to look at of a machine.
#[derive(Debug)]
pub struct Meter {
    /// `hull-vmm`, a child of this process's: its number is not another's before it has been waited for.
    pub(crate) vmm: Option<u32>,
    pub(crate) size: MachineSize,
    pub(crate) boot: Duration,
    pub(crate) calls: Arc<Calls>,
    /// With the taps. None: the pod has no network.
    pub(crate) namespace: Option<Namespace>,
}

impl Meter {
    /// Looks, which takes a moment of blocking work. What can't be seen, since the machine is ending, is left out.
    #[must_use]
    pub fn read(&self) -> MachineMetrics {
        let pieces = hull_machine::memory::ranges(self.size.memory_mib).unwrap_or_default();
        let sizes: Vec<u64> = pieces.iter().map(|(_, size)| *size as u64).collect();
        let interfaces = self.namespace.as_ref().map(network::traffic);
        MachineMetrics {
            boot_seconds: self.boot.as_secs_f64(),
            vcpus: self.size.vcpus,
            vmm: self.vmm.and_then(|pid| ProcessMetrics::of(pid).ok()),
            memory_bytes: self.size.memory_mib.saturating_mul(1 << 20),
            touched_bytes: self
                .vmm
                .and_then(|pid| touched(pid, &sizes).ok())
                .unwrap_or_default(),
            calls: self.calls.read(),
            interfaces: interfaces.and_then(Result::ok).unwrap_or_default(),
        }
    }
}
