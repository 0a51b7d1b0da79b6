//! `hull attach-container`: containers that join a running pod.

use std::process::{Output, Stdio};
use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::{Pod, sleepers};

/// `hull attach-container POD --image busybox OPTIONS -- sh -c SCRIPT`, to its end.
fn attach(hull: &Hull, pod: &str, options: &[&str], script: &str) -> Output {
    let mut line = vec!["attach-container", pod, "--image", "busybox"];
    line.extend_from_slice(options);
    line.extend(["--", "sh", "-c", script]);
    hull.run(line)
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).trim_end().to_owned()
}

#[test]
fn a_container_joins_the_pods_namespaces_and_is_a_member() {
    let hull = Hull::new();
    let pod = Pod::start(
        &hull,
        "host",
        &sleepers("host", &[("one", "    env: [{name: ONE, value: x}]\n")], ""),
    );
    let _ = pod.sh(
        "one",
        "nc -l -p 8080 -e echo hello >/dev/null 2>&1 & sleep 0.5",
    );
    let _ = pod.sh("one", "echo mine > /only-in-one");

    // In the foreground: the pod's network and name, streams apart, an exit code of its own.
    let script = "nc 127.0.0.1 8080; cat /etc/hostname /etc/hosts; ls /only-in-one; exit 7";
    let output = attach(&hull, "host", &[], script);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let names = pod.sh("one", "cat /etc/hostname /etc/hosts");
    assert_eq!(text(&output.stdout), format!("hello\n{names}"));
    assert!(text(&output.stderr).contains("only-in-one"), "{output:?}");
    let logged = hull.run(["logs", "host", "-c", "attached-1"]);
    assert_eq!(
        (text(&logged.stdout), text(&logged.stderr)),
        (text(&output.stdout), text(&output.stderr))
    );
    let ended = pod.container("attached-1");
    assert_eq!(ended["state"]["terminated"]["exitCode"], 7, "{ended}");
    assert_eq!(pod.phase(), "Running");

    // In the background: a member to every command.
    let options = [
        "-d",
        "--name",
        "side",
        "-e",
        "TOLD=$(X) $$",
        "-u",
        "1000:2000",
    ];
    let started = attach(
        &hull,
        "host",
        &options,
        "echo $TOLD; echo $(id -u):$(id -g); sleep 100000",
    );
    assert_success(&started, "hull attach-container -d");
    assert_eq!(text(&started.stdout), "side");
    pod.wait_log("side", "$(X) $$");
    pod.wait_log("side", "1000:2000");
    for namespace in ["net", "ipc", "uts"] {
        let link = format!("readlink /proc/self/ns/{namespace}");
        assert_eq!(pod.sh("one", &link), pod.sh("side", &link), "{namespace}");
    }
    assert_eq!(pod.sh("one", "ip address"), pod.sh("side", "ip address"));
    assert!(hull.ok(["ps"]).contains("2/2"), "{}", hull.ok(["ps"]));
    assert!(hull.ok(["events", "host"]).contains("side"));

    // It is stopped with the pod, and its end was its own.
    pod.stop();
    let ended = pod.container("side");
    assert_eq!(ended["state"]["terminated"]["exitCode"], 137, "{ended}");
    assert_eq!(ended["state"]["terminated"]["reason"], "Error", "{ended}");
    assert!(pod.logs("side").contains("1000:2000"));
}

#[test]
fn what_can_not_join_is_told_why() {
    let hull = Hull::new();
    let rest = "  volumes:\n  - {name: unused, emptyDir: {}}\n  - {name: data, emptyDir: {}}\n";
    let mounted = "    volumeMounts: [{name: data, mountPath: /data, readOnly: true}]\n";
    let pod = Pod::start(
        &hull,
        "strict",
        &sleepers("strict", &[("one", mounted)], rest),
    );
    let refused = |pod: &str, options: &[&str], code: i32, wanted: &[&str]| {
        let output = attach(&hull, pod, options, "true");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{options:?}: {said}");
        for words in wanted {
            assert!(said.contains(words), "{options:?}: {said}");
        }
    };

    refused("ghost", &[], 125, &["ghost", "hull ps -a"]);
    refused("strict", &["--name", "one"], 125, &["one", "--name"]);
    refused(
        "strict",
        &["--name", "One"],
        125,
        &["\"One\"", "lower-case"],
    );
    refused(
        "strict",
        &["-v", "other:/x"],
        125,
        &["\"other\"", "it has: data, unused"],
    );
    refused(
        "strict",
        &["-v", "unused:/x"],
        125,
        &["\"unused\"", "does not have it"],
    );
    refused(
        "strict",
        &["-v", "data:/x"],
        125,
        &["\"data\"", "read-only"],
    );
    refused(
        "strict",
        &["--cap-add", "FLY"],
        125,
        &["\"FLY\"", "is not a capability"],
    );
    let missing = hull.run(["attach-container", "strict", "--image", "nowhere"]);
    assert!(text(&missing.stderr).contains("hull load"), "{missing:?}");
    let program = [
        "attach-container",
        "strict",
        "--image",
        "busybox",
        "--",
        "/no/such",
    ];
    let missing = hull.run(program);
    assert_eq!(missing.status.code(), Some(127), "{missing:?}");
    assert!(text(&missing.stderr).contains("/no/such"), "{missing:?}");

    // Nothing of all that is left, and the pod goes on.
    assert!(pod.inspect()["status"]["ephemeralContainerStatuses"].is_null());
    assert_success(
        &attach(&hull, "strict", &["-v", "data:/x:ro"], "ls /x"),
        "a volume",
    );
    pod.stop();
    refused("strict", &[], 125, &["not running", "hull run"]);
}

#[test]
fn one_may_join_at_any_time_and_counts_for_nothing() {
    let hull = Hull::new();
    let manifest = "apiVersion: v1
kind: Pod
metadata: {name: early}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: gate, emptyDir: {}}
  initContainers:
  - {name: first, image: busybox, command: [sh, -c, 'until [ -e /gate/open ]; do sleep 0.2; done'], volumeMounts: [{name: gate, mountPath: /gate}]}
  containers:
  - {name: main, image: busybox, command: ['true']}
";
    let path = hull.manifest("early.yaml", manifest);
    let mut run = hull
        .command(["run".as_ref(), "-d".as_ref(), path.as_os_str()])
        .stdout(Stdio::null())
        .spawn()
        .expect("hull is on PATH");

    // While the pod still starts.
    let during = eventually("infra is up", Duration::from_secs(30), || {
        let output = attach(
            &hull,
            "early",
            &["-v", "gate:/gate"],
            "touch /gate/open; exit 3",
        );
        (output.status.code() == Some(3)).then_some(output)
    });
    assert_eq!(text(&during.stderr), "");
    assert!(run.wait().expect("a child").success());

    // When all others have ended.
    let completed = || hull.json(["inspect", "early"])["status"]["completed"] == true;
    eventually("main has ended", Duration::from_secs(10), || {
        completed().then_some(())
    });
    let late = attach(
        &hull,
        "early",
        &["--rm", "--name", "late"],
        "echo late; exit 4",
    );
    assert_eq!(
        (late.status.code(), &*text(&late.stdout)),
        (Some(4), "late")
    );
    // What was removed leaves its name.
    assert_eq!(
        attach(&hull, "early", &["--rm", "--name", "late"], "exit 5")
            .status
            .code(),
        Some(5)
    );
    assert!(!hull.run(["logs", "early", "-c", "late"]).status.success());

    assert_eq!(hull.ok(["wait", "early"]), "0\n");
    let _ = hull.ok(["stop", "early"]);
    let status = &hull.json(["inspect", "early"])["status"];
    assert_eq!(status["phase"], "Succeeded", "{status}");
}

#[test]
fn streams_terminals_and_restarts() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "open", &sleepers("open", &[("one", "")], ""));

    // Standard input in bursts, its end, and output after it.
    hull_tests::hull::bursts_pass(&mut hull.command([
        "attach-container",
        "-i",
        "--image",
        "busybox",
        "open",
        "--",
        "sh",
        "-c",
        "cat; echo end",
    ]));

    // A terminal.
    let line = "stty rows 33 cols 99; hull attach-container -it open --image busybox -- sh -c 'tty; stty size'";
    let output = hull.script(line).output().expect("script is installed");
    let said = text(&output.stdout);
    assert!(
        said.contains("/dev/") && said.contains("33 99"),
        "{output:?}"
    );

    // One whose client is killed ends.
    let mut client = hull
        .command([
            "attach-container",
            "open",
            "--image",
            "busybox",
            "--name",
            "held",
            "--",
            "sleep",
            "100000",
        ])
        .stdout(Stdio::null())
        .spawn()
        .expect("hull is on PATH");
    eventually("held runs", Duration::from_secs(10), || {
        hull.ok(["ps"]).contains("2/2").then_some(())
    });
    let _ = client.kill();
    let _ = client.wait();
    eventually("held has ended", Duration::from_secs(10), || {
        pod.container("held")["state"]["terminated"]
            .is_object()
            .then_some(())
    });

    // A policy of its own.
    let options = ["-d", "--name", "again", "--restart", "OnFailure"];
    assert_success(
        &attach(&hull, "open", &options, "echo run; exit 3"),
        "--restart",
    );
    eventually("it runs again", Duration::from_secs(20), || {
        (pod.container("again")["restartCount"].as_u64() >= Some(1)).then_some(())
    });
    assert_eq!(pod.phase(), "Running");
}
