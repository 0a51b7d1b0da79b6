//! How large a pod's machine is.

use serde::{Deserialize, Serialize};

use super::resources::Amounts;
use crate::manifest::PodManifest;

const MIB: u64 = 1 << 20;
/// A distribution's kernel with its initramfs doesn't start with less.
const MIN_MIB: u64 = 256;
const MAX_MIB: u64 = 1 << 20;
/// Large pages of the host fit.
const ROUND_MIB: u64 = 2;
const MAX_VCPUS: u64 = 64;

/// What a machine has that its containers' limits don't say. The host's operator decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// For all containers without a CPU limit together.
    pub unlimited_vcpus: u8,
    /// For all containers without a memory limit together.
    pub unlimited_mib: u64,
    /// What kernel and agent need beside the containers.
    pub guest_mib: u64,
}

impl Default for Sizing {
    fn default() -> Self {
        Self {
            unlimited_vcpus: 2,
            unlimited_mib: 1024,
            guest_mib: 128,
        }
    }
}

/// The machine for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSize {
    pub vcpus: u8,
    pub memory_mib: u64,
}

/// The machine's size, from what the pod's containers may use (in numbers of [`Sizing::default`]):
///
/// - memory: the sum of their limits and 128 MiB for the guest itself. Where a
///   container has no limit, its request instead, and 1024 MiB on top for all such
///   containers and the guest together; so a pod without any limit has 1024 MiB.
///   At least 256 MiB.
/// - processors: the sum of their limits, rounded up. Where a container has no limit,
///   at least 2. Never more than the host has.
///
/// An init container runs alone: it counts where it needs more than all others.
#[must_use]
pub fn machine_size(manifest: &PodManifest, sizing: Sizing) -> MachineSize {
    size(manifest, sizing, host_cpus())
}

/// The machine for containers that may use so much each, by the same rules.
#[must_use]
pub fn machine_size_for(containers: &[Amounts], sizing: Sizing) -> MachineSize {
    Need::of(containers, sizing).size(host_cpus())
}

fn host_cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u64)
}

fn size(manifest: &PodManifest, sizing: Sizing, host_cpus: u64) -> MachineSize {
    let amounts: Vec<Amounts> = manifest.containers().iter().map(Amounts::of).collect();
    let mut need = Need::of(&amounts, sizing);
    for container in manifest.init_containers() {
        let alone = Need::of(&[Amounts::of(container)], sizing);
        need.memory_mib = need.memory_mib.max(alone.memory_mib);
        need.vcpus = need.vcpus.max(alone.vcpus);
    }
    need.size(host_cpus)
}

struct Need {
    memory_mib: u64,
    vcpus: u64,
}

impl Need {
    fn size(&self, host_cpus: u64) -> MachineSize {
        let vcpus = self.vcpus.clamp(1, host_cpus.clamp(1, MAX_VCPUS));
        MachineSize {
            vcpus: u8::try_from(vcpus).unwrap_or(1),
            memory_mib: self
                .memory_mib
                .next_multiple_of(ROUND_MIB)
                .clamp(MIN_MIB, MAX_MIB),
        }
    }

    fn of(amounts: &[Amounts], sizing: Sizing) -> Self {
        let bytes = amounts.iter().fold(0_u64, |sum, one| {
            sum.saturating_add(one.memory_limit.or(one.memory_request).unwrap_or(0))
        });
        let unlimited = amounts.iter().any(|one| one.memory_limit.is_none());
        let extra = if unlimited {
            sizing.unlimited_mib
        } else {
            sizing.guest_mib
        };
        let millis = amounts.iter().fold(0_u64, |sum, one| {
            sum.saturating_add(one.cpu_limit.or(one.cpu_request).unwrap_or(0))
        });
        let unlimited = amounts.iter().any(|one| one.cpu_limit.is_none());
        let least = if unlimited {
            sizing.unlimited_vcpus.into()
        } else {
            1
        };
        Self {
            // Below any overflow, and above what any machine has.
            memory_mib: bytes.div_ceil(MIB).min(MAX_MIB) + extra,
            vcpus: millis.div_ceil(1000).max(least),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn sized(init: &[&str], containers: &[&str]) -> (u8, u64) {
        let list = |prefix: &str, all: &[&str]| {
            all.iter()
                .enumerate()
                .map(|(number, resources)| {
                    format!("{{name: {prefix}{number}, image: x, resources: {{{resources}}}}}")
                })
                .collect::<Vec<_>>()
                .join(",")
        };
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {{initContainers: [{}], containers: [{}]}}}}",
            list("i", init),
            list("c", containers)
        );
        let manifest = manifest::parse("f", &text).unwrap().remove(0);
        let size = size(&manifest, Sizing::default(), 8);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn the_operator_decides_what_limits_dont_say() {
        let sizing = Sizing {
            unlimited_vcpus: 1,
            unlimited_mib: 512,
            guest_mib: 256,
        };
        let limited = Amounts {
            cpu_limit: Some(1000),
            memory_limit: Some(512 << 20),
            ..Amounts::default()
        };

        let unlimited = Need::of(&[Amounts::default()], sizing).size(8);
        let limited = Need::of(&[limited], sizing).size(8);

        assert_eq!((unlimited.vcpus, unlimited.memory_mib), (1, 512));
        assert_eq!((limited.vcpus, limited.memory_mib), (1, 768));
    }

    #[test]
    fn limits_decide() {
        assert_eq!(
            sized(
                &[],
                &[
                    "limits: {cpu: 500m, memory: 256Mi}",
                    "limits: {cpu: 700m, memory: 129Mi}"
                ]
            ),
            (2, 514)
        );
        assert_eq!(sized(&[], &["limits: {cpu: 100m, memory: 16Mi}"]), (1, 256));
    }

    #[test]
    fn without_limits_there_are_defaults() {
        assert_eq!(sized(&[], &["", ""]), (2, 1024));
        assert_eq!(
            sized(&[], &["limits: {memory: 512Mi, cpu: 3}", ""]),
            (3, 1536)
        );
        assert_eq!(sized(&[], &["requests: {memory: 2Gi, cpu: 4}"]), (4, 3072));
    }

    #[test]
    fn init_containers_count_where_they_need_more() {
        assert_eq!(
            sized(
                &["limits: {cpu: 4, memory: 1Gi}"],
                &["limits: {cpu: 1, memory: 256Mi}"]
            ),
            (4, 1152)
        );
        assert_eq!(
            sized(
                &["limits: {cpu: 1, memory: 16Mi}"],
                &["limits: {cpu: 1, memory: 256Mi}"]
            ),
            (1, 384)
        );
    }

    #[test]
    fn a_machine_has_bounds() {
        assert_eq!(
            sized(&[], &["limits: {cpu: 1000, memory: 8Ei}"]),
            (8, MAX_MIB)
        );
    }
}
