//! What is left after many pods and containers: nothing.

use std::collections::BTreeSet;
use std::fs;

use hull_tests::containerd::Containerd;
use hull_tests::host;
use hull_tests::hull::assert_success;

use crate::sandboxes::{run_member, sandbox};

/// How often: more than CI has time for when it is asked (`HULL_TEST_CYCLES`).
fn rounds(usual: u32) -> u32 {
    let asked = std::env::var("HULL_TEST_CYCLES").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// What of the host as a whole a pod could leave: mounts, interfaces, and files where shims and `ctr` make them.
fn holdings(containerd: &Containerd) -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    // Without the numbers, of which a mount may get others.
    let mut all: BTreeSet<String> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| format!("mount {point}"))
        .collect();
    let state = containerd.bundle(containerd.name(), "x");
    let directories = [
        "/sys/class/net",
        "/run/containerd/s",
        "/run/containerd/fifo",
        "/run/netns",
        "/run/hull",
        "/sys/fs/cgroup",
    ];
    let directories = directories.iter().map(std::path::Path::new);
    for directory in directories.chain(state.parent()) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            all.insert(entry.path().display().to_string());
        }
    }
    all
}

#[track_caller]
fn nothing_more(before: &BTreeSet<String>, containerd: &Containerd) {
    containerd.nothing_left();
    let more: Vec<_> = holdings(containerd).difference(before).cloned().collect();
    assert!(more.is_empty(), "left on the host: {more:#?}");
}

/// Descriptors of containerd itself are its own affair, those of pods aren't.
#[test]
fn pods_that_come_and_go_leave_nothing() {
    let containerd = Containerd::start();
    // What is there once is there for all.
    assert_success(&containerd.run(&["--rm"], "first", &["true"]), "ctr run");
    let before = holdings(&containerd);

    let rounds = rounds(5);
    for round in 0..rounds {
        let id = format!("pod-{round}");
        let output = containerd.run(&["--rm"], &id, &["sh", "-c", "echo hello"]);
        assert_success(&output, "ctr run");
        assert_eq!(output.stdout, b"hello\n");
    }

    nothing_more(&before, &containerd);
    println!("{rounds} pods have come and gone");
}

#[test]
fn a_container_that_crashes_again_and_again_leaves_nothing() {
    let containerd = Containerd::start();
    sandbox(&containerd, "pod");
    let shim = containerd.shim(containerd.name(), "pod").unwrap();
    let crash = |round: u32| {
        let id = format!("crash-{round}");
        let output = run_member(&containerd, &["--rm"], "pod", &id, &["sh", "-c", "exit 1"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    };
    for round in 0..3 {
        crash(round);
    }
    let (held, resident) = (host::footprint(shim), host::resident_kib(shim).0);
    let before = holdings(&containerd);

    let rounds = rounds(10);
    for round in 3..3 + rounds {
        crash(round);
    }

    let (now, resident_now) = (host::footprint(shim), host::resident_kib(shim).0);
    println!("{rounds} crashes: {held:?}, {resident} KiB, then {now:?}, {resident_now} KiB");
    assert_eq!(
        (now.descriptors, now.mounts),
        (held.descriptors, held.mounts)
    );
    // Threads for what blocks come and go.
    assert!(now.threads <= held.threads + 8);
    assert!(resident_now < resident + 8 * 1024);
    let more: Vec<_> = holdings(&containerd).difference(&before).cloned().collect();
    assert!(more.is_empty(), "left on the host: {more:#?}");
    let _ = containerd.ok(&["task", "rm", "--force", "pod"]);
    let _ = containerd.ok(&["container", "rm", "pod"]);
    containerd.nothing_left();
}
