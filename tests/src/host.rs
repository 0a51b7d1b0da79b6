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
    /// But for those that are counted next.
    pub threads: usize,
    /// Threads that serve a share's requests, which `hull-vmm` makes as they are needed, and keeps.
    pub fs_workers: usize,
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
    let fs_workers = std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("the process exists")
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("fs-request"))
        .count();
    Footprint {
        descriptors: count("fd"),
        threads: count("task").saturating_sub(fs_workers),
        fs_workers,
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
    let Memory { own, guest } = memory(pid);
    (own.resident, guest.resident)
}

/// A process's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub own: Mapped,
    /// The RAM of the guest that it runs, if it does.
    pub guest: Mapped,
}

/// What is mapped and there, in KiB, as proc_pid_smaps(5) has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mapped {
    pub resident: u64,
    /// With what several processes have together divided among them.
    pub proportional: u64,
    /// Of this process alone.
    pub private: u64,
    /// Together with others, all of it.
    pub shared: u64,
}

/// # Panics
/// When the process is gone.
#[must_use]
pub fn memory(pid: i32) -> Memory {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process exists");
    of_mappings(&smaps)
}

fn of_mappings(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let mut size = 0;
    for line in smaps.lines() {
        let Some((field, rest)) = line.split_once(':') else {
            continue;
        };
        let Ok(kib) = rest.trim().trim_end_matches(" kB").parse::<u64>() else {
            continue;
        };
        if field == "Size" {
            size = kib;
        }
        // Guest RAM is the only mapping of 64 MiB or more that is touched.
        let of = if size >= 64 * 1024 {
            &mut memory.guest
        } else {
            &mut memory.own
        };
        match field {
            "Rss" => of.resident += kib,
            "Pss" => of.proportional += kib,
            "Private_Clean" | "Private_Dirty" => of.private += kib,
            "Shared_Clean" | "Shared_Dirty" => of.shared += kib,
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_ram_is_apart() {
        let memory = of_mappings(
            "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:              120000 kB
Pss:               70000 kB
Shared_Clean:     100000 kB
Private_Clean:       500 kB
Private_Dirty:     19500 kB
7f0020000000-7f0020001000 r-xp 00000000 fe:00 1234 /usr/bin/hull-vmm
Size:                  4 kB
Rss:                   4 kB
Pss:                   1 kB
Shared_Clean:          4 kB
VmFlags: rd ex mr mw me
",
        );

        let guest = Mapped {
            resident: 120_000,
            proportional: 70_000,
            private: 20_000,
            shared: 100_000,
        };
        let own = Mapped {
            resident: 4,
            proportional: 1,
            private: 0,
            shared: 4,
        };
        assert_eq!(memory, Memory { own, guest });
    }
}
