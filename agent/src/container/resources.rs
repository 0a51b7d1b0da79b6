//! What a container may use: checked, and written to its cgroup by the code that does so at its creation.

use std::fs;
use std::num::NonZero;
use std::path::Path;

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::cgroup::{Cgroup, MOUNT};
use super::stats;
use crate::error::{Error, Result, shorten};

/// Longest resources, in bytes.
const MAX_RESOURCES: usize = 64 * 1024;
/// The files of a cgroup that `unified` may name: amounts, and nothing that moves or stops processes.
const UNIFIED: [&str; 14] = [
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.zswap.writeback",
    "pids.max",
];
/// In microseconds: cpu.max has it where nobody says another.
const CPU_PERIOD: u64 = 100_000;

/// Reads resources from the supervisor.
pub fn parse(bytes: &[u8]) -> Result<LinuxResources> {
    if bytes.len() > MAX_RESOURCES {
        return Err(Error::Invalid(format!(
            "the resources are larger than {MAX_RESOURCES} bytes"
        )));
    }
    serde_json::from_slice(bytes)
        .map_err(|error| Error::Invalid(format!("reading the resources: {error}")))
}

/// Takes out what says nothing (0 stands for "as it is"), and refuses what no container may name.
pub fn checked(mut given: LinuxResources) -> Result<LinuxResources> {
    for file in given.unified().iter().flat_map(|files| files.keys()) {
        if !UNIFIED.contains(&file.as_str()) {
            return Err(Error::Invalid(format!(
                "resources can't name the cgroup's file {:?}",
                shorten(file, 64)
            )));
        }
    }
    let cpu = given.cpu().clone().map(|mut cpu| {
        cpu.set_quota(cpu.quota().filter(|quota| *quota != 0));
        cpu.set_period(cpu.period().filter(|period| *period != 0));
        cpu
    });
    let pids = given.pids().filter(|pids| pids.limit() != 0);
    given.set_cpu(cpu).set_pids(pids);
    Ok(given)
}

/// Writes what resources that were [`checked`] say. The group's devices are not among it.
pub fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let machine = Machine {
        memory: stats::total_memory()?,
        processors: std::thread::available_parallelism().map_or(1, NonZero::get),
    };
    let now = |file: &str| fs::read_to_string(cgroup.path().join(file)).unwrap_or_default();
    machine.has(resources, &now("memory.max"), &now("cpu.max"))?;
    let failed = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        if let Some(cause) = error.source() {
            text.push_str(": ");
            text.push_str(&cause.to_string());
        }
        Error::Invalid(format!("changing what the container may use: {text}"))
    };
    let name = cgroup.name.strip_prefix("/").unwrap_or(&cgroup.name);
    let manager =
        Manager::new(Path::new(MOUNT).into(), name.into()).map_err(|error| failed(&error))?;
    let wanted = ControllerOpt {
        resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&wanted).map_err(|error| failed(&error))
}

/// What there is for all containers.
struct Machine {
    /// In bytes.
    memory: u64,
    processors: usize,
}

impl Machine {
    /// Refuses more than there is, but for what the group has `now`: a container may have been made so, and whoever
    /// changes one amount says all of them.
    fn has(&self, wanted: &LinuxResources, memory_now: &str, cpu_now: &str) -> Result<()> {
        if let Some(limit) = wanted.memory().as_ref().and_then(LinuxMemory::limit)
            && u64::try_from(limit).is_ok_and(|limit| limit > self.memory)
            && memory_now.trim() != limit.to_string()
        {
            return Err(Error::Invalid(format!(
                "a memory limit of {limit} bytes is more than the pod's machine has, {}",
                self.memory
            )));
        }
        let Some(cpu) = wanted.cpu() else {
            return Ok(());
        };
        if let (Some(quota), Some(period)) = quota(cpu, cpu_now)
            && u128::from(quota) > u128::from(period) * self.processors as u128
            && cpu_now.trim() != format!("{quota} {period}")
        {
            return Err(Error::Invalid(format!(
                "{quota} of {period} microseconds are more processors than the pod's machine has, {}",
                self.processors
            )));
        }
        Ok(())
    }
}

/// Quota and period as they would be.
fn quota(cpu: &LinuxCpu, now: &str) -> (Option<u64>, Option<u64>) {
    let mut now = now.split_whitespace().map(|number| number.parse().ok());
    let (quota, period) = (now.next().flatten(), now.next().flatten());
    (
        match cpu.quota() {
            None => quota,
            Some(quota) => u64::try_from(quota).ok(),
        },
        cpu.period().or(period).or(Some(CPU_PERIOD)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine {
        memory: 1 << 30,
        processors: 2,
    };

    fn resources(json: &str) -> LinuxResources {
        checked(parse(json.as_bytes()).unwrap()).unwrap()
    }

    fn refusal(json: &str, memory_now: &str, cpu_now: &str) -> String {
        match MACHINE.has(&resources(json), memory_now, cpu_now) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_is_0_says_nothing() {
        let given = resources(r#"{"cpu":{"quota":0,"period":0,"shares":512},"pids":{"limit":0}}"#);

        let cpu = given.cpu().as_ref().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (None, None));
        assert_eq!(cpu.shares(), Some(512));
        assert!(given.pids().is_none());
    }

    #[test]
    fn only_amounts_are_named_by_file() {
        assert!(checked(parse(br#"{"unified":{"memory.oom.group":"1"}}"#).unwrap()).is_ok());
        for file in ["cgroup.procs", "../infra/memory.max", "/etc/passwd", ""] {
            let json = format!(r#"{{"unified":{{"{file}":"1"}}}}"#);
            assert!(checked(parse(json.as_bytes()).unwrap()).is_err(), "{file}");
        }
        assert!(parse(&vec![b' '; MAX_RESOURCES + 1]).is_err());
    }

    #[test]
    fn more_than_the_machine_has_is_refused() {
        let memory = r#"{"memory":{"limit":2147483648}}"#;
        assert!(refusal(memory, "max", "").contains("2147483648"));
        assert_eq!(refusal(r#"{"memory":{"limit":-1}}"#, "max", ""), "");
        assert_eq!(refusal(r#"{"memory":{"limit":1048576}}"#, "max", ""), "");

        let cpu = r#"{"cpu":{"quota":300000}}"#;
        assert!(refusal(cpu, "", "max 100000").contains("processors"));
        assert_eq!(refusal(cpu, "", "max 200000"), "");
        let period = r#"{"cpu":{"period":1000}}"#;
        assert!(refusal(period, "", "100000 100000").contains("processors"));
        assert_eq!(refusal(r#"{"cpu":{"quota":-1}}"#, "", "max 100000"), "");
    }

    #[test]
    fn what_a_container_has_already_is_not_refused() {
        let json = r#"{"memory":{"limit":2147483648},"cpu":{"quota":800000,"period":100000}}"#;

        assert_eq!(refusal(json, "2147483648\n", "800000 100000\n"), "");
    }
}
