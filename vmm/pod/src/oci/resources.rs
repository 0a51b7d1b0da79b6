//! A container's share of the machine, and who goes first when memory runs out.

use k8s_openapi::api::core::v1::Container;
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxPidsBuilder,
    LinuxResources, LinuxResourcesBuilder,
};

use super::sizing::{Sizing, machine_size};
use crate::manifest::{PodManifest, Quantity};

/// CFS period in microseconds.
const PERIOD: u64 = 100_000;
/// The kernel takes no smaller quota.
const MIN_QUOTA: u64 = 1000;
const MIN_SHARES: u64 = 2;
const MAX_SHARES: u64 = 262_144;
/// Processes and threads of a container: enough for any sane one, and too few to take
/// the guest's last.
const MAX_PIDS: i64 = 4096;

/// What a container asks for and may have at most, in thousandths of a CPU and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    pub cpu_limit: Option<u64>,
    pub cpu_request: Option<u64>,
    pub memory_limit: Option<u64>,
    pub memory_request: Option<u64>,
}

impl Amounts {
    /// A limit without a request asks for all of it; a limit of 0 is none.
    pub fn of(container: &Container) -> Self {
        let Some(resources) = &container.resources else {
            return Self::default();
        };
        let read = |list: &Option<std::collections::BTreeMap<String, _>>, name: &str| {
            let quantity: Option<&k8s_openapi::apimachinery::pkg::api::resource::Quantity> =
                list.as_ref().and_then(|list| list.get(name));
            quantity.and_then(|quantity| Quantity::parse(&quantity.0).ok())
        };
        let positive = |amount: &u64| *amount > 0;
        let cpu_limit = read(&resources.limits, "cpu")
            .map(Quantity::millis)
            .filter(positive);
        let memory_limit = read(&resources.limits, "memory")
            .map(Quantity::units)
            .filter(positive);
        Self {
            cpu_limit,
            cpu_request: read(&resources.requests, "cpu")
                .map(Quantity::millis)
                .or(cpu_limit),
            memory_limit,
            memory_request: read(&resources.requests, "memory")
                .map(Quantity::units)
                .or(memory_limit),
        }
    }
}

pub fn of(container: &Container) -> Result<LinuxResources, OciSpecError> {
    let amounts = Amounts::of(container);
    let mut cpu = LinuxCpuBuilder::default().shares(shares(amounts.cpu_request.unwrap_or(0)));
    if let Some(limit) = amounts.cpu_limit {
        let quota = (limit.saturating_mul(PERIOD) / 1000).max(MIN_QUOTA);
        cpu = cpu
            .period(PERIOD)
            .quota(i64::try_from(quota).unwrap_or(i64::MAX));
    }
    let mut resources = LinuxResourcesBuilder::default()
        .cpu(cpu.build()?)
        .pids(LinuxPidsBuilder::default().limit(MAX_PIDS).build()?)
        // Nothing but what a runtime always allows (null, zero, full, random, tty, ...).
        .devices(vec![
            LinuxDeviceCgroupBuilder::default()
                .allow(false)
                .access("rwm")
                .build()?,
        ]);
    if let Some(limit) = amounts.memory_limit {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        resources = resources.memory(LinuxMemoryBuilder::default().limit(limit).build()?);
    }
    resources.build()
}

/// As the kubelet converts them.
fn shares(millis: u64) -> u64 {
    (millis.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

/// By quality of service, as the kubelet has it: what has all it asks for goes last,
/// what asks for nothing first, the rest by how much of the machine it asks for.
pub fn oom_score_adj(manifest: &PodManifest, container: &Container) -> i32 {
    let containers = || {
        manifest
            .init_containers()
            .iter()
            .chain(manifest.containers())
    };
    let all: Vec<Amounts> = containers().map(Amounts::of).collect();
    let guaranteed = |amounts: &Amounts| {
        amounts.cpu_limit.is_some()
            && amounts.cpu_limit == amounts.cpu_request
            && amounts.memory_limit.is_some()
            && amounts.memory_limit == amounts.memory_request
    };
    if all.iter().all(guaranteed) {
        return -997;
    }
    if all.iter().all(|amounts| *amounts == Amounts::default()) {
        return 1000;
    }
    // Only the order of the scores counts.
    let capacity = machine_size(manifest, Sizing::default())
        .memory_mib
        .saturating_mul(1 << 20)
        .max(1);
    let request = Amounts::of(container)
        .memory_request
        .unwrap_or(0)
        .min(capacity);
    let part = u128::from(request) * 1000 / u128::from(capacity);
    i32::try_from(part)
        .map_or(2, |part| 1000 - part)
        .clamp(2, 999)
}
