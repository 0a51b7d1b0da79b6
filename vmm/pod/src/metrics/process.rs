//! What a process of the host uses, by proc(5).

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

const KIB: u64 = 1024;

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessMetrics {
    /// Of processors, since its start, in user and system mode.
    pub cpu_seconds: f64,
    /// Memory that it has mapped.
    pub resident_bytes: u64,
    /// The same, with what is shared divided among those who share it.
    pub proportional_bytes: u64,
}

impl ProcessMetrics {
    /// # Errors
    /// When it is gone, or isn't ours to look at.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        Ok(Self {
            cpu_seconds: cpu_seconds(&stat, ticks_per_second()).ok_or_else(malformed)?,
            resident_bytes: field(&memory, "Rss:").ok_or_else(malformed)?,
            proportional_bytes: field(&memory, "Pss:").ok_or_else(malformed)?,
        })
    }
}

/// What a process has used of processors since its start, in user and system mode.
///
/// # Errors
/// When it is gone.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    cpu_seconds(&stat, ticks_per_second())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// So much of the mappings of these sizes is there: of a guest's memory, which nothing else in its process equals in
/// size.
///
/// # Errors
/// See [`ProcessMetrics::of`].
pub fn touched(pid: u32, sizes: &[u64]) -> io::Result<u64> {
    let mappings = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    Ok(touched_in(&mappings, sizes))
}

fn touched_in(mappings: &str, sizes: &[u64]) -> u64 {
    let mut is_guests = false;
    let mut bytes: u64 = 0;
    for line in mappings.lines() {
        if let Some(range) = range(line) {
            is_guests = sizes.contains(&(range.end() - range.start()));
        } else if is_guests && let Some(resident) = field(line, "Rss:") {
            bytes = bytes.saturating_add(resident);
        }
    }
    bytes
}

/// Of a mapping's first line: `7f12-7f34 rw-p …`. The end is that of the mapping.
fn range(line: &str) -> Option<RangeInclusive<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    (start <= end).then_some(start..=end)
}

/// The bytes that a line `NAME   123 kB` tells.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(KIB)
}

/// The name, in parentheses, may contain anything; after it user and system time are fields 14 and 15.
fn cpu_seconds(stat: &str, ticks: f64) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some((f64::from(user) + f64::from(system)) / ticks)
}

fn ticks_per_second() -> f64 {
    let ticks = rustix::param::clock_ticks_per_second();
    u32::try_from(ticks).map_or(100.0, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_sees_itself() {
        let own = ProcessMetrics::of(std::process::id()).unwrap();

        assert!(own.resident_bytes > 0);
        assert!(own.proportional_bytes <= own.resident_bytes);
    }

    #[test]
    fn a_name_may_contain_anything() {
        let stat = "7 (a) R 1) S 1 7 7 0 -1 0 0 0 0 0 250 50 0 0 20 0 1";

        assert_eq!(cpu_seconds(stat, 100.0), Some(3.0));
        assert_eq!(cpu_seconds("7 (hull", 100.0), None);
    }

    #[test]
    fn a_guests_memory_is_known_by_its_size() {
        let mappings = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:              120000 kB
Pss:              120000 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0
Rss:                   4 kB
";

        assert_eq!(touched_in(mappings, &[256 << 20]), 120_000 * KIB);
        assert_eq!(touched_in(mappings, &[512 << 20]), 0);
    }
}
