//! What a cgroup uses and has used, as the kernel counts it.
//!
//! A file that is not there (a controller or a feature that the kernel lacks) counts as 0.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use hull_protocol::agent::{CpuStats, IoStats, MemoryStats, PidsStats, StatsResponse};

use crate::error::{Doing, Result};

/// Lines of memory.stat that are told.
const MAX_DETAIL: usize = 128;
/// Lines of memory.events that are told.
const MAX_EVENTS: usize = 16;
/// Block devices that are told of.
const MAX_DEVICES: usize = 64;
/// How a limit that is none is told.
const NO_LIMIT: u64 = u64::MAX;

/// Reads a group's numbers.
pub fn read(group: &Path) -> Result<StatsResponse> {
    let cpu = keyed(&text(group, "cpu.stat")?, MAX_DETAIL);
    let cpu = |name: &str| cpu.get(name).copied().unwrap_or(0);
    let number = |file: &str| Ok(single(&text(group, file)?));
    Ok(StatsResponse {
        cpu: Some(CpuStats {
            usage_micros: cpu("usage_usec"),
            user_micros: cpu("user_usec"),
            system_micros: cpu("system_usec"),
            periods: cpu("nr_periods"),
            throttled_periods: cpu("nr_throttled"),
            throttled_micros: cpu("throttled_usec"),
            ..Default::default()
        })
        .into(),
        memory: Some(MemoryStats {
            usage: number("memory.current")?,
            limit: number("memory.max")?,
            peak: number("memory.peak")?,
            swap_usage: number("memory.swap.current")?,
            swap_limit: number("memory.swap.max")?,
            swap_peak: number("memory.swap.peak")?,
            detail: keyed(&text(group, "memory.stat")?, MAX_DETAIL),
            events: keyed(&text(group, "memory.events")?, MAX_EVENTS),
            ..Default::default()
        })
        .into(),
        pids: Some(PidsStats {
            current: number("pids.current")?,
            limit: number("pids.max")?,
            ..Default::default()
        })
        .into(),
        io: text(group, "io.stat")?
            .lines()
            .filter_map(device)
            .take(MAX_DEVICES)
            .collect(),
        ..Default::default()
    })
}

/// The guest's memory, in bytes.
pub fn total_memory() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).doing(|| format!("reading {path}"))?;
    Ok(total(&text))
}

fn total(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB"))
        .and_then(|kibibytes| kibibytes.trim().parse::<u64>().ok())
        .map_or(NO_LIMIT, |kibibytes| kibibytes.saturating_mul(1024))
}

fn text(group: &Path, file: &str) -> Result<String> {
    let path = group.join(file);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound && group.exists() => Ok(String::new()),
        other => other.doing(|| format!("reading {}", path.display())),
    }
}

/// A file of one number, or "max".
fn single(text: &str) -> u64 {
    match text.trim() {
        "max" => NO_LIMIT,
        number => number.parse().unwrap_or(0),
    }
}

/// A file with a name and a number on each line.
fn keyed(text: &str, most: usize) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, number) = line.split_once(' ')?;
            Some((name.to_owned(), number.trim().parse().ok()?))
        })
        .take(most)
        .collect()
}

/// A line of io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 …".
fn device(line: &str) -> Option<IoStats> {
    let (device, counts) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stats = IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..Default::default()
    };
    for count in counts.split_whitespace() {
        let (name, number) = count.split_once('=')?;
        let number = number.parse().unwrap_or(0);
        match name {
            "rbytes" => stats.read_bytes = number,
            "wbytes" => stats.written_bytes = number,
            "rios" => stats.reads = number,
            "wios" => stats.writes = number,
            _ => {}
        }
    }
    Some(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_groups_files_are_read() {
        let group = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\nnr_throttled 3\n\
                 throttled_usec 2\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\n"),
            ("memory.events", "low 0\noom_kill 5\n"),
            ("pids.current", "7\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:0 \n",
            ),
        ] {
            fs::write(group.path().join(file), text).unwrap();
        }

        let stats = read(group.path()).unwrap();

        assert_eq!(
            (stats.cpu.usage_micros, stats.cpu.throttled_periods),
            (30, 3)
        );
        assert_eq!((stats.memory.usage, stats.memory.limit), (4096, NO_LIMIT));
        assert_eq!(stats.memory.detail["file"], 2);
        assert_eq!(stats.memory.events["oom_kill"], 5);
        assert_eq!(stats.memory.swap_usage, 0);
        assert_eq!((stats.pids.current, stats.pids.limit), (7, 100));
        let io = &stats.io[0];
        assert_eq!((io.major, io.minor, io.written_bytes), (254, 16, 2));
    }

    #[test]
    fn a_group_that_is_gone_is_an_error() {
        let group = tempfile::tempdir().unwrap();

        assert!(read(&group.path().join("gone")).is_err());
    }

    #[test]
    fn numbers_are_bounded() {
        let many: String = (0..1000).map(|n| format!("name{n} {n}\n")).collect();

        assert_eq!(keyed(&many, MAX_DETAIL).len(), MAX_DETAIL);
        assert_eq!(total("MemFree: 1 kB\nMemTotal:    2048 kB\n"), 2 << 20);
    }
}
