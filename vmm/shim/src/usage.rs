//! What a task uses, as containerd reads it: the message of its cgroup v2 library.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageFull};
use hull_pod::agent::{MemoryStats, Stats};

use crate::failure::TaskError;

/// # Errors
/// When it can't be written.
pub fn any(stats: Stats) -> Result<Any, TaskError> {
    let value = metrics(stats).write_to_bytes();
    Ok(Any {
        type_url: Metrics::descriptor().full_name().to_owned(),
        value: value.map_err(|error| TaskError::Io {
            doing: "writing metrics".into(),
            source: error.into(),
        })?,
        ..Default::default()
    })
}

fn metrics(stats: Stats) -> Metrics {
    let io = stats.io.iter().map(|device| IOEntry {
        major: device.major.into(),
        minor: device.minor.into(),
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    });
    Metrics {
        pids: Some(PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: stats.cpu.usage,
            user_usec: stats.cpu.user,
            system_usec: stats.cpu.system,
            nr_periods: stats.cpu.periods,
            nr_throttled: stats.cpu.throttled_periods,
            throttled_usec: stats.cpu.throttled,
            ..Default::default()
        })
        .into(),
        memory: Some(memory(&stats.memory)).into(),
        memory_events: Some(events(&stats.memory.events)).into(),
        io: Some(IOStat {
            usage: io.collect(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn memory(memory: &MemoryStats) -> MemoryStat {
    let number = |name: &str| memory.detail.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: number("anon"),
        file: number("file"),
        kernel_stack: number("kernel_stack"),
        slab: number("slab"),
        sock: number("sock"),
        shmem: number("shmem"),
        file_mapped: number("file_mapped"),
        file_dirty: number("file_dirty"),
        file_writeback: number("file_writeback"),
        anon_thp: number("anon_thp"),
        inactive_anon: number("inactive_anon"),
        active_anon: number("active_anon"),
        inactive_file: number("inactive_file"),
        active_file: number("active_file"),
        unevictable: number("unevictable"),
        slab_reclaimable: number("slab_reclaimable"),
        slab_unreclaimable: number("slab_unreclaimable"),
        pgfault: number("pgfault"),
        pgmajfault: number("pgmajfault"),
        // The kernel has split both since Linux 5.9.
        workingset_refault: number("workingset_refault_anon")
            .saturating_add(number("workingset_refault_file")),
        workingset_activate: number("workingset_activate_anon")
            .saturating_add(number("workingset_activate_file")),
        workingset_nodereclaim: number("workingset_nodereclaim"),
        pgrefill: number("pgrefill"),
        pgscan: number("pgscan"),
        pgsteal: number("pgsteal"),
        pgactivate: number("pgactivate"),
        pgdeactivate: number("pgdeactivate"),
        pglazyfree: number("pglazyfree"),
        pglazyfreed: number("pglazyfreed"),
        thp_fault_alloc: number("thp_fault_alloc"),
        thp_collapse_alloc: number("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.limit,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        max_usage: memory.peak,
        swap_max_usage: memory.swap_peak,
        ..Default::default()
    }
}

fn events(events: &HashMap<String, u64>) -> MemoryEvents {
    let number = |name: &str| events.get(name).copied().unwrap_or(0);
    MemoryEvents {
        low: number("low"),
        high: number("high"),
        max: number("max"),
        oom: number("oom"),
        oom_kill: number("oom_kill"),
        oom_group_kill: number("oom_group_kill"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_finds_the_type_and_the_numbers() {
        let mut stats = Stats::default();
        stats.cpu.throttled_periods = 3;
        stats.memory.limit = u64::MAX;
        stats.memory.detail.insert("inactive_file".into(), 4);
        for (name, number) in [
            ("workingset_refault_anon", u64::MAX),
            ("workingset_refault_file", 1),
        ] {
            stats.memory.detail.insert(name.into(), number);
        }
        stats.memory.events.insert("oom_kill".into(), 5);
        stats.pids.current = 6;

        let any = any(stats).unwrap();

        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.nr_throttled, 3);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.memory.inactive_file, 4);
        assert_eq!(metrics.memory.workingset_refault, u64::MAX);
        assert_eq!(metrics.memory_events.oom_kill, 5);
        assert_eq!(metrics.pids.current, 6);
    }
}
