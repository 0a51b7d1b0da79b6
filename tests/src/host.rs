//! What is on the host: processes, mounts and descriptors that Hull may leave behind.

use std::path::Path;

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
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("the process exists");
}

/// A process that is stopped until this is dropped.
#[derive(Debug)]
pub struct Stopped(rustix::process::Pid);

impl Stopped {
    /// Sends SIGSTOP.
    ///
    /// # Panics
    /// When there is no such process.
    #[must_use]
    pub fn new(pid: i32) -> Self {
        let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
        rustix::process::kill_process(pid, rustix::process::Signal::STOP)
            .expect("the process exists");
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It fails only if the process is gone.
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
    }
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

/// A line of /proc/PID/status, in KiB, for example `VmRSS` or `RssAnon`.
///
/// # Panics
/// When the process is gone or has no such line.
#[must_use]
pub fn status_kib(pid: i32, key: &str) -> u64 {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("the process exists")
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .unwrap_or_else(|| panic!("{key} of {pid}"))
}
