//! What is on the host: processes, mounts and descriptors that Hull may leave behind.

use std::path::Path;

use rustix::process::Signal;

/// Whether a process exists and is not a zombie.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit(") ").next().map(|rest| !rest.starts_with('Z')))
        .unwrap_or(false)
}

/// Sends SIGKILL.
///
/// # Panics
/// When there is no such process.
pub fn kill_9(pid: i32) {
    signal(pid, Signal::KILL);
}

/// Sends a signal.
///
/// # Panics
/// When there is no such process.
pub fn signal(pid: i32, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("the process exists");
}

/// Processes whose command line or environment names this directory.
#[must_use]
pub fn processes_of(run_dir: &Path) -> Vec<String> {
    let needle = run_dir.as_os_str().as_encoded_bytes();
    let me = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == me || !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        let (cmdline, environ) = (read("cmdline"), read("environ"));
        let names_it = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        if !cmdline.is_empty() && (names_it(&cmdline) || names_it(&environ)) {
            found.push(format!(
                "{name}: {}",
                String::from_utf8_lossy(&cmdline).replace('\0', " ")
            ));
        }
    }
    found
}

/// Mounts of this namespace beneath a directory.
///
/// # Panics
/// When /proc is not mounted.
#[must_use]
pub fn mounts_under(dir: &Path) -> Vec<String> {
    let dir = dir.to_string_lossy();
    std::fs::read_to_string("/proc/self/mountinfo")
        .expect("/proc is mounted")
        .lines()
        .filter(|line| {
            line.split(' ')
                .nth(4)
                .is_some_and(|point| point.starts_with(&*dir))
        })
        .map(str::to_owned)
        .collect()
}

/// Pod directories that exist.
#[must_use]
pub fn pods_in(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir.join("pods"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Open descriptors, threads and mounts of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    pub descriptors: usize,
    pub threads: usize,
    pub mounts: usize,
}

/// # Panics
/// When the process is gone.
#[must_use]
pub fn footprint(pid: i32) -> Footprint {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/{pid}/{what}"))
            .expect("the process exists")
            .count()
    };
    Footprint {
        descriptors: count("fd"),
        threads: count("task"),
        mounts: std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))
            .expect("the process exists")
            .lines()
            .count(),
    }
}

/// Resident memory of a process in KiB: its own, and that of the guest in it.
///
/// # Panics
/// When the process is gone.
#[must_use]
pub fn resident_kib(pid: i32) -> (u64, u64) {
    memory_kib(pid, "Rss:")
}

/// The same, with what several processes have together divided among them (proc(5): Pss).
///
/// # Panics
/// When the process is gone.
#[must_use]
pub fn proportional_kib(pid: i32) -> (u64, u64) {
    memory_kib(pid, "Pss:")
}

fn memory_kib(pid: i32, kind: &str) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process exists");
    let (mut total, mut guest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let field = |name: &str| {
            line.strip_prefix(name)
                .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
        };
        if let Some(kib) = field("Size:") {
            size = kib;
        }
        if let Some(kib) = field(kind) {
            total += kib;
            // Guest RAM is the only mapping of 64 MiB or more that is touched.
            if size >= 64 * 1024 {
                guest += kib;
            }
        }
    }
    (total - guest, guest)
}
