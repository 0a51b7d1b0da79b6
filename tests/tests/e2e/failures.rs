//! Things die. What is told, and what is left.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::{Pod, death, sleepers};
use hull_tests::{eventually, host};

fn assert_nothing_runs(hull: &Hull) {
    eventually("no process is left", Duration::from_secs(2), || {
        host::processes_of(&hull.run_dir()).is_empty().then_some(())
    });
    assert_eq!(host::mounts_under(&hull.run_dir()), Vec::<String>::new());
}

#[test]
fn hull_vmm_is_killed() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "shot", &sleepers("shot", &[("one", "")], ""));
    let vmm = pod.pid("vmmPid");
    let start = Instant::now();

    host::kill_9(vmm);

    pod.wait_phase("Failed", Duration::from_secs(2));
    let told_after = start.elapsed();
    assert!(
        told_after < death() + Duration::from_secs(2),
        "{told_after:?}"
    );
    let inspected = pod.inspect().to_string();
    assert!(inspected.contains("killed by signal 9"), "{inspected}");
    assert_nothing_runs(&hull);
}

#[test]
fn the_supervisor_is_killed() {
    let hull = Hull::new();
    let manifest = sleepers("orphan", &[("one", "")], "");
    let pod = Pod::start(&hull, "orphan", &manifest);
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));

    host::kill_9(supervisor);

    eventually(
        "hull-vmm ends with its supervisor",
        Duration::from_secs(2),
        || (!host::is_alive(vmm)).then_some(()),
    );
    // The network's server of names stays until somebody gives the pod's addresses back.
    eventually(
        "no process of the pod is left",
        Duration::from_secs(2),
        || {
            let left = host::processes_of(&hull.run_dir());
            left.iter()
                .all(|process| process.contains("aardvark-dns"))
                .then_some(())
        },
    );
    assert_eq!(host::mounts_under(&hull.run_dir()), Vec::<String>::new());
    assert!(!hull.ok(["ps"]).contains("Running"));

    // The next run of that name just works, and gc leaves nothing of the first.
    let _again = Pod::start(&hull, "orphan", &manifest);
    let _ = hull.ok(["rm", "--force", "orphan"]);
    let _ = hull.ok(["gc"]);
    assert_eq!(host::pods_in(&hull.run_dir()), Vec::<String>::new());
    assert_nothing_runs(&hull);
}

#[test]
fn the_guest_kernel_panics() {
    let hull = Hull::new();
    let privileged = "    securityContext: {capabilities: {add: [SYS_ADMIN]}, seccompProfile: {type: Unconfined}}\n";
    let pod = Pod::start(
        &hull,
        "panic",
        &sleepers("panic", &[("one", privileged)], ""),
    );

    let _ = pod.exec(
        "one",
        "mkdir /p; mount -t proc proc /p; echo c > /p/sysrq-trigger",
    );

    pod.wait_phase("Failed", Duration::from_secs(3));
    let inspected = pod.inspect().to_string();
    assert!(
        inspected.contains("the guest kernel panicked"),
        "{inspected}"
    );
    assert!(
        inspected.contains("sysrq triggered crash"),
        "the console's tail: {inspected}"
    );
    assert_nothing_runs(&hull);
}

/// The guest image of this host with `program` as its process 1, and the agent beside it as `/agent`.
fn guest_of(hull: &Hull, program: &Path) -> PathBuf {
    let guest = hull.work_dir().join("guest");
    let script = format!(
        "set -e; mkdir -p {0}/root; cd {0}; ln -s $HULL_GUEST_DIR/vmlinux vmlinux; cd root; cpio --quiet -id < $HULL_GUEST_DIR/initramfs.cpio; mv init agent; cp {1} init; find . | cpio --quiet -o -H newc > ../initramfs.cpio",
        guest.display(),
        program.display(),
    );
    let made = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_success(&made, "making a guest image");
    guest
}

#[test]
fn the_agent_never_comes() {
    let hull = Hull::new();
    // A program that wants arguments, and ends at once.
    let guest = guest_of(&hull, Path::new("$(command -v hull-vmm)"));
    let hull = hull.with_guest(guest);
    let manifest = hull.manifest("pod.yaml", &sleepers("deaf", &[("one", "")], ""));

    let output = hull
        .command(["run".as_ref(), "-d".as_ref(), manifest.as_os_str()])
        .env("HULL_AGENT_TIMEOUT", "20")
        .output()
        .unwrap();

    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        stderr.contains("Kernel panic"),
        "the console's tail is shown: {stderr}"
    );
    assert_nothing_runs(&hull);
}

#[test]
fn the_agent_crashes() {
    let hull = Hull::new();
    let guest = guest_of(&hull, Path::new(env!("CARGO_BIN_EXE_crash-agent")));
    let hull = hull.with_guest(guest);
    let manifest = hull.manifest("pod.yaml", &sleepers("crash", &[("one", "")], ""));

    // Whether the start is still told as a success depends on who is first.
    let _ = hull.run(["run".as_ref(), "-d".as_ref(), manifest.as_os_str()]);

    let status = || hull.json(["inspect", "crash"]).to_string();
    eventually("the pod has failed", Duration::from_secs(3), || {
        status().contains(r#""phase":"Failed""#).then_some(())
    });
    let status = status();
    assert!(status.contains("the guest kernel panicked"), "{status}");
    assert!(
        status.contains("Attempted to kill init"),
        "the console's tail: {status}"
    );
    assert_nothing_runs(&hull);
}

#[test]
fn no_guest_image() {
    let hull = Hull::new();
    let manifest = hull.manifest("pod.yaml", &sleepers("blank", &[("one", "")], ""));

    let output = hull
        .command(["run".as_ref(), "-d".as_ref(), manifest.as_os_str()])
        .env("HULL_GUEST_DIR", "/no/such/guest")
        .output()
        .unwrap();

    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(stderr.contains("/no/such/guest"), "{stderr}");
    assert_nothing_runs(&hull);
}
