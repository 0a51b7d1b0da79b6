//! Much of everything: nothing grows without a bound, and nothing is lost.

use std::time::Duration;

use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::{Pod, sleepers};
use hull_tests::{eventually, host, scaled};

#[test]
fn two_hundred_execs_and_ten_at_once_leave_nothing() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "busy", &sleepers("busy", &[("one", "")], ""));
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));
    let _ = pod.sh("one", "true");
    let settled = |pid| {
        std::thread::sleep(Duration::from_millis(500));
        host::footprint(pid)
    };
    let before = (settled(supervisor), settled(vmm));
    let guest_before = pod.sh("one", "ls /proc | grep -c '^[0-9]'");

    for number in 0..200 {
        assert_eq!(pod.sh("one", &format!("echo {number}")), number.to_string());
    }
    let together: Vec<_> = (0..10)
        .map(|number| {
            let mut command = pod.exec_command("one", &format!("sleep 1; echo {number}"));
            std::thread::spawn(move || command.output())
        })
        .collect();
    for (number, thread) in together.into_iter().enumerate() {
        let output = thread.join().unwrap().unwrap();
        assert_success(&output, "one of ten");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            number.to_string()
        );
    }

    // Some descriptors of the file server stay open for what the guest has looked up.
    let after = eventually(
        "descriptors, threads and mounts are as before",
        Duration::from_secs(5),
        || {
            let after = (host::footprint(supervisor), host::footprint(vmm));
            let within = |a: host::Footprint, b: host::Footprint| {
                a.descriptors <= b.descriptors + 4
                    && a.threads <= b.threads + 1
                    && a.mounts == b.mounts
            };
            (within(after.0, before.0) && within(after.1, before.1)).then_some(after)
        },
    );
    eprintln!("before {before:?}, after {after:?}");
    assert_eq!(pod.sh("one", "ls /proc | grep -c '^[0-9]'"), guest_before);
}

#[test]
fn a_gigabyte_of_output_is_kept_whole_in_bounded_memory() {
    let hull = Hull::new();
    // An emulated machine takes minutes for a gigabyte.
    let emulated = scaled(Duration::from_secs(1)) > Duration::from_secs(1);
    let megabytes: u64 = std::env::var("HULL_TEST_OUTPUT_MIB")
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(if emulated { 64 } else { 1024 });
    // Lines of 1 KiB.
    let manifest = format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: loud}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: [sh, -c, 'yes $(printf %01023d 7) | head -n {}']
",
        megabytes * 1024
    );
    let pod = Pod::start(&hull, "loud", &manifest);
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));
    let before = (host::status_kib(supervisor, "RssAnon"), 0);

    let mut most = before;
    eventually("it has printed all", Duration::from_secs(600), || {
        most.0 = most.0.max(host::status_kib(supervisor, "RssAnon"));
        most.1 = most.1.max(host::status_kib(vmm, "VmRSS"));
        (pod.container("main")["state"]["terminated"]["exitCode"] == 0).then_some(())
    });

    let mut counted = hull
        .command(["logs", "loud"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = 0_u64;
    let line = format!("{:01023}", 7);
    for printed in std::io::BufRead::lines(std::io::BufReader::new(counted.stdout.take().unwrap()))
    {
        assert_eq!(printed.unwrap(), line);
        lines += 1;
    }
    assert!(counted.wait().unwrap().success());
    assert_eq!(lines, megabytes * 1024);
    eprintln!(
        "supervisor {} KiB, at most {} KiB; hull-vmm with guest memory at most {} KiB",
        before.0, most.0, most.1
    );
    assert!(
        most.0 < before.0 + 16 * 1024,
        "the supervisor's memory grew from {} to {} KiB",
        before.0,
        most.0
    );
}
