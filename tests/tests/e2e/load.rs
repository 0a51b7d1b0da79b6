//! Much of everything: nothing grows without a bound, and nothing is lost.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::{Pod, sleepers};
use hull_tests::{eventually, host};

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
    // The policy (proc_pid_stat(5)), which the agent has changed for itself alone.
    let policies = pod.sh("one", "cut -d' ' -f41 /proc/1/stat /proc/self/stat");
    assert_eq!(policies, "0\n0");
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

/// A pod that prints lines of 1 KiB, 4 MiB at a time; in `progress`/printed it says how many times it has.
fn loud_pod(times: &str, progress: &Path) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: loud}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes:
  - {{name: progress, hostPath: {{path: {progress}, type: DirectoryOrCreate}}}}
  containers:
  - name: main
    image: busybox
    # Written by cat: head needs longer for a line than the line for its way.
    command:
    - sh
    - -c
    - |
      yes $(printf %01023d 7) | head -n 1024 > /dev/shm/lines
      lines='/dev/shm/lines /dev/shm/lines /dev/shm/lines /dev/shm/lines'
      for n in $(seq {times}); do cat $lines; echo $n > /progress/printed; done
    volumeMounts: [{{name: progress, mountPath: /progress}}]
",
        progress = progress.display()
    )
}

/// The memory of a process in KiB but for files; hull-vmm's with the guest's, as far as that was ever used.
fn memory(pid: i32) -> u64 {
    host::status_kib(pid, "RssAnon") + host::status_kib(pid, "RssShmem")
}

/// What output may need of it: buffers, with room to spare.
const BUFFERS_KIB: u64 = 16 * 1024;

#[test]
fn a_gigabyte_of_output_is_kept_whole_in_bounded_memory() {
    let hull = Hull::new();
    let manifest = loud_pod("256", &hull.work_dir().join("progress"));
    let pod = Pod::start(&hull, "loud", &manifest);
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));
    let before = (memory(supervisor), memory(vmm));

    let started = Instant::now();
    let mut most = before;
    eventually("it has printed all", Duration::from_secs(120), || {
        most.0 = most.0.max(memory(supervisor));
        most.1 = most.1.max(memory(vmm));
        // Being asked costs the machine more than a lab's printing can spare.
        std::thread::sleep(Duration::from_millis(900));
        (pod.container("main")["state"]["terminated"]["exitCode"] == 0).then_some(())
    });
    let printed = started.elapsed();

    let mut logs = hull
        .command(["logs", "loud"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = logs.stdout.take().unwrap();
    // Compared a mebibyte at a time.
    let expected = format!("{:01023}\n", 7).into_bytes().repeat(1024);
    let mut read = vec![0; expected.len()];
    for mebibyte in 0..1024 {
        output.read_exact(&mut read).unwrap();
        assert!(read == expected, "mebibyte {mebibyte} is not as printed");
    }
    assert_eq!(output.read(&mut read).unwrap(), 0, "more than was printed");
    assert!(logs.wait().unwrap().success());

    eprintln!(
        "printed in {printed:?}, read in {:?}; supervisor {} KiB, at most {}; hull-vmm {} KiB, at most {}",
        started.elapsed() - printed,
        before.0,
        most.0,
        before.1,
        most.1
    );
    assert!(most.0 < before.0 + BUFFERS_KIB, "the supervisor");
    assert!(most.1 < before.1 + BUFFERS_KIB, "hull-vmm");
}

#[test]
fn a_log_that_is_not_written_holds_the_container_back() {
    let hull = Hull::new();
    let progress = hull.work_dir().join("progress");
    let pod = Pod::start(&hull, "loud", &loud_pod("1000000", &progress));
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));
    let printed = || -> u64 {
        // There may be no file yet, or an empty one as it is written.
        eventually("it says how far it is", Duration::from_secs(10), || {
            let times = std::fs::read_to_string(progress.join("printed")).ok()?;
            times.trim().parse().ok()
        })
    };
    let comes_to = |times| {
        eventually("it prints", Duration::from_secs(20), || {
            (printed() >= times).then_some(())
        });
    };
    comes_to(8);

    let stopped = host::Stopped::new(supervisor);
    // What there is room for on the way is less than 4 MiB.
    let held_at = printed() + 1;
    std::thread::sleep(Duration::from_secs(2));
    let before = memory(vmm);
    std::thread::sleep(Duration::from_secs(5));
    let (held, after) = (printed(), memory(vmm));
    drop(stopped);

    eprintln!("held at {held} times 4 MiB, hull-vmm {before} KiB, then {after}");
    assert!(held <= held_at, "printed {held} times, not {held_at}");
    assert!(after < before + 1024, "{before} KiB became {after}");
    comes_to(held + 8);
}
