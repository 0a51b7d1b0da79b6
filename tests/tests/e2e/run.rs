//! `hull run` in the foreground, and the commands round it.

use std::io::{BufRead, BufReader};
use std::process::{Output, Stdio};
use std::time::Duration;

use hull_tests::hull::Hull;
use hull_tests::pod::{Pod, sleepers};
use hull_tests::{eventually, host};

fn run_never(hull: &Hull, name: &str, command: &str) -> Output {
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  restartPolicy: Never\n  containers:\n  - name: main\n    image: busybox\n    command: [sh, -c, '{command}']\n"
    );
    let path = hull.manifest("pod.yaml", &manifest);
    hull.run(["run".as_ref(), path.as_os_str()])
}

#[test]
fn the_counter_counts_and_appends() {
    let hull = Hull::new();
    let log = std::path::Path::new("/var/log/counter/log");
    let _ = std::fs::remove_file(log);
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/pods/counter.yaml");
    let count_three = || {
        let mut child = hull
            .command(["run", manifest])
            .stdout(Stdio::piped())
            .spawn()
            .expect("hull is on PATH");
        let lines: Vec<String> = BufReader::new(child.stdout.take().expect("a pipe"))
            .lines()
            .map(|line| line.expect("text"))
            .take(3)
            .collect();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
        let status = child.wait().expect("it ends");
        (lines, status)
    };

    let (first, _) = count_three();
    let lines_after_first = std::fs::read_to_string(log).expect("the log is on the host");
    let (second, _) = count_three();
    let lines_after_second = std::fs::read_to_string(log).expect("the log is on the host");

    assert!(
        first[0].contains("counter") && first[0].contains("count-log"),
        "{first:?}"
    );
    assert!(first[0].contains("0: "), "{first:?}");
    assert!(second[0].contains("0: "), "the whole log again: {second:?}");
    assert!(lines_after_second.starts_with(&lines_after_first));
    assert!(lines_after_second.len() > lines_after_first.len());
    assert_eq!(host::processes_of(&hull.run_dir()), Vec::<String>::new());
}

#[test]
fn the_exit_code_is_the_first_failing_containers() {
    let hull = Hull::new();

    let good = run_never(&hull, "good", "echo done");
    let bad = run_never(&hull, "bad", "echo oops >&2; exit 42");

    assert_eq!(good.status.code(), Some(0), "{good:?}");
    assert!(String::from_utf8_lossy(&good.stdout).contains("done"));
    assert_eq!(bad.status.code(), Some(42), "{bad:?}");
    assert_eq!(host::processes_of(&hull.run_dir()), Vec::<String>::new());
}

#[test]
fn two_runs_of_one_name() {
    let hull = Hull::new();
    let manifest = sleepers("twin", &[("one", "")], "");
    let _first = Pod::start(&hull, "twin", &manifest);
    let path = hull.manifest("second.yaml", &manifest);

    let second = hull.run(["run".as_ref(), "-d".as_ref(), path.as_os_str()]);

    assert!(!second.status.success());
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert!(stderr.contains("twin"), "{stderr}");
    assert_eq!(host::pods_in(&hull.run_dir()).len(), 1);
}

#[test]
fn interrupting_a_start_at_any_moment_leaves_nothing() {
    let hull = Hull::new();
    let manifest = hull.manifest("pod.yaml", &sleepers("cut", &[("one", "")], ""));

    for millis in [20, 150, 400, 900, 1600, 2500, 4000] {
        let mut child = hull
            .command(["run".as_ref(), manifest.as_os_str()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("hull is on PATH");
        std::thread::sleep(Duration::from_millis(millis));
        let pid = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        eventually("hull run has ended", Duration::from_secs(20), || {
            child.try_wait().expect("a child")
        });

        eventually("its processes are gone", Duration::from_secs(5), || {
            host::processes_of(&hull.run_dir()).is_empty().then_some(())
        });
        assert_eq!(
            host::mounts_under(&hull.run_dir()),
            Vec::<String>::new(),
            "after {millis} ms"
        );
        assert!(!hull.ok(["ps"]).contains("cut"), "after {millis} ms");
    }
}

#[test]
fn logs_tail_since_and_follow() {
    let hull = Hull::new();
    let manifest = "apiVersion: v1
kind: Pod
metadata: {name: chatty}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: busybox, command: [sh, -c, 'for i in 1 2 3; do echo line $i; done; sleep 3; echo late; sleep 100000']}
";
    let pod = Pod::start(&hull, "chatty", manifest);
    pod.wait_log("main", "line 3");

    let mut follow = hull
        .command(["logs", "-f", "--tail", "1", "chatty"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("hull is on PATH");
    let followed: Vec<String> = BufReader::new(follow.stdout.take().expect("a pipe"))
        .lines()
        .map(|line| line.expect("text"))
        .take(2)
        .collect();
    let _ = follow.kill();
    let _ = follow.wait();

    assert_eq!(followed, ["line 3", "late"]);
    assert_eq!(hull.ok(["logs", "--tail", "2", "chatty"]), "line 3\nlate\n");
    assert_eq!(
        hull.ok(["logs", "--since", "2000-01-01T00:00:00Z", "chatty"])
            .lines()
            .count(),
        4
    );
    assert_eq!(hull.ok(["logs", "--since", "0s", "chatty"]), "");
}

#[test]
fn wait_and_stop_and_rm() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "ended", &sleepers("ended", &[("one", "")], ""));
    let mut wait = hull
        .command(["wait", "ended"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("hull is on PATH");

    pod.stop();

    eventually("hull wait has ended", Duration::from_secs(5), || {
        wait.try_wait().expect("a child")
    });
    assert!(hull.ok(["ps", "-a"]).contains("ended"));
    let _ = hull.ok(["rm", "ended"]);
    assert!(!hull.ok(["ps", "-a"]).contains("ended"));
    assert_eq!(host::pods_in(&hull.run_dir()), Vec::<String>::new());
    assert_eq!(host::processes_of(&hull.run_dir()), Vec::<String>::new());
}

#[test]
fn a_pod_that_is_not_there_is_named() {
    let hull = Hull::without_images();

    for command in [
        vec!["logs", "ghost"],
        vec!["stop", "ghost"],
        vec!["inspect", "ghost"],
        vec!["exec", "ghost", "--", "true"],
        vec!["wait", "ghost"],
    ] {
        let output = hull.run(&command);
        assert!(!output.status.success(), "{command:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("ghost"),
            "{command:?}: {output:?}"
        );
    }
}
