//! Much of everything: nothing grows without a bound, and nothing is lost.

use std::time::Duration;

use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::{Pod, sleepers};
use hull_tests::{eventually, host};
use rustix::process::Signal;

/// As many threads as ever serve a share's requests.
const FS_WORKERS: usize = 8;

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
                    && a.fs_workers <= FS_WORKERS
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
    // Lines of 1 KiB, written 64 KiB at a time: what is measured is their way, not their making.
    let megabytes: u64 = 1024;
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
    command: [sh, -c, 'yes $(printf %01023d 7) | head -n 1024 > /block; i=0; while [ $i -lt {megabytes} ]; do cat /block; i=$((i+1)); done']
"
    );
    let pod = Pod::start(&hull, "loud", &manifest);
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));
    let memory = || [supervisor, vmm].map(|pid| host::resident_kib(pid).0);
    let before = memory();

    let mut most = before;
    eventually("it has printed all", Duration::from_secs(120), || {
        let now = memory();
        most = [most[0].max(now[0]), most[1].max(now[1])];
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
    eprintln!("supervisor and hull-vmm: {before:?} KiB, at most {most:?}");
    for (before, most) in before.into_iter().zip(most) {
        assert!(most < before + 16 * 1024, "from {before} to {most} KiB");
    }
}

#[test]
fn a_log_that_stands_still_holds_its_container_back() {
    let hull = Hull::new();
    let shown = hull.work_dir().display();
    let manifest = format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: eager}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes: [{{name: data, hostPath: {{path: {shown}/data}}}}]
  containers:
  - name: main
    image: busybox
    command: [sh, -c, 'yes | head -c 65536 > /block; i=0; while cat /block; do i=$((i+1)); echo $i > /data/count; done']
    volumeMounts: [{{name: data, mountPath: /data}}]
"
    );
    let pod = Pod::start(&hull, "eager", &manifest);
    let (supervisor, vmm) = (pod.pid("supervisorPid"), pod.pid("vmmPid"));
    let count = || {
        std::fs::read_to_string(hull.work_dir().join("data/count"))
            .ok()
            .and_then(|count| count.trim().parse::<u64>().ok())
    };
    let begun = eventually("it prints", Duration::from_secs(10), count);

    host::signal(supervisor, Signal::STOP);
    let mut last = None;
    let held = eventually("it is held back", Duration::from_secs(10), || {
        std::thread::sleep(Duration::from_secs(1));
        let (before, now) = (last, count());
        last = now;
        now.filter(|_| now == before)
    });
    let memory = host::resident_kib(vmm).0;
    host::signal(supervisor, Signal::CONT);

    // 64 KiB each.
    assert!(held < begun + 256, "from {begun} to {held}");
    assert!(memory < 32 * 1024, "hull-vmm has {memory} KiB");
    eventually("it goes on", Duration::from_secs(10), || {
        count().filter(|count| *count > held + 16)
    });
}
