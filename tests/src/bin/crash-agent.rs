//! Process 1 of a guest whose agent crashes: becomes `/agent`, and kills it when a container runs.
//!
//! Process 1 gets no signal that it doesn't want, so its code is overwritten: the next
//! instruction faults, as after any bug in it.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test helper reports by panicking"
)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};

/// procfs, where the agent doesn't look.
const PROC: &str = "/crash-proc";
/// The program of the container whose start is waited for.
const VICTIM: &str = "sleep";

fn main() {
    if std::env::args().nth(1).as_deref() == Some("watch") {
        watch();
        return;
    }
    fs::create_dir(PROC).expect("the initramfs is writable");
    mount("proc", PROC, "proc", MountFlags::empty(), None).expect("procfs");
    let watcher = Command::new(format!("{PROC}/self/exe"))
        .arg("watch")
        .spawn()
        .expect("the watcher");
    // The agent reaps whatever is left to it.
    std::mem::forget(watcher);
    let error = Command::new("/agent").exec();
    panic!("/agent: {error}");
}

fn watch() {
    while !runs(VICTIM) {
        std::thread::sleep(Duration::from_millis(100));
    }
    let maps = fs::read_to_string(format!("{PROC}/1/maps")).expect("process 1");
    let code = maps
        .lines()
        .find(|line| line.contains(" r-xp "))
        .and_then(|line| line.split(' ').next()?.split_once('-'))
        .expect("process 1 has code");
    let address = |hex| u64::from_str_radix(hex, 16).expect("an address");
    let (start, end) = (address(code.0), address(code.1));
    let memory = fs::File::options()
        .write(true)
        .open(format!("{PROC}/1/mem"))
        .expect("the memory of process 1");
    // Zeros are a write through a register that points nowhere.
    let page = [0; 4096];
    for at in (start..end).step_by(page.len()) {
        memory.write_all_at(&page, at).expect("a page of code");
    }
}

fn runs(name: &str) -> bool {
    fs::read_dir(PROC)
        .expect("procfs")
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
        .any(|comm| comm.trim_end() == name)
}
