//! Pods that are put aside in a directory, and go on from there.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hull_tests::eventually;
use hull_tests::host::signal;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::network::host_network;
use hull_tests::pod::{Pod, sleepers};
use rustix::process::Signal;

use crate::ports::{ANY, LOCALHOST, echoes, echoes_datagrams, published};

const LIMIT: Duration = Duration::from_secs(30);

/// One container counts in its memory, to three files that it holds open and to its log; the other has written something
/// into its root.
fn counter(hull: &Hull) -> String {
    let host = hull.work_dir().join("host");
    fs::create_dir_all(&host).unwrap();
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: counter}}
spec:
  terminationGracePeriodSeconds: 0
  volumes:
  - name: data
    emptyDir: {{}}
  - name: memory
    emptyDir: {{medium: Memory}}
  - name: host
    hostPath: {{path: {host}}}
  containers:
  - name: count
    image: busybox
    command:
    - sh
    - -c
    - |
      exec 3>>/data/log 4>>/memory/log 5>>/host/log
      n=0
      while :; do
        n=$((n+1)); echo $n; echo $n >&3; echo $n >&4; echo $n >&5
        sleep 0.1
      done
    volumeMounts:
    - {{name: data, mountPath: /data}}
    - {{name: memory, mountPath: /memory}}
    - {{name: host, mountPath: /host}}
  - name: keep
    image: busybox
    command: [sh, -c, 'echo kept > /kept; chmod 0700 /data; echo ready; cat; sleep infinity']
    stdin: true
    volumeMounts:
    - {{name: data, mountPath: /data}}
",
        host = host.display()
    )
}

fn counted(text: &str) -> Vec<u64> {
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// What was counted to the file on the host.
fn on_host(hull: &Hull) -> Vec<u64> {
    counted(&fs::read_to_string(hull.work_dir().join("host/log")).unwrap_or_default())
}

fn is_contiguous(numbers: &[u64]) -> bool {
    (1..)
        .zip(numbers)
        .all(|(expected, found)| expected == *found)
}

fn snapshot(hull: &Hull, pod: &str, directory: &Path) {
    let _ = hull.ok(["snapshot".as_ref(), pod.as_ref(), directory.as_os_str()]);
}

fn restore<'a>(hull: &'a Hull, directory: &Path, name: &str) -> Pod<'a> {
    let restored = hull.ok([
        "restore".as_ref(),
        directory.as_os_str(),
        "--name".as_ref(),
        name.as_ref(),
    ]);
    assert_eq!(restored.trim(), name);
    Pod::running(hull, name)
}

fn refused(hull: &Hull, args: &[&str], code: i32) -> String {
    let output = hull.run(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A small pod that has been put aside.
fn put_aside(hull: &Hull, name: &str) -> PathBuf {
    let directory = hull.work_dir().join(format!("{name}-aside"));
    let pod = Pod::start(hull, name, &sleepers(name, &[("main", "")], ""));
    snapshot(hull, name, &directory);
    drop(pod);
    directory
}

#[test]
fn a_pod_goes_on_exactly_where_it_was_put_aside() {
    let hull = Hull::new();
    let directory = hull.work_dir().join("aside");
    let pod = Pod::start(&hull, "counter", &counter(&hull));
    pod.wait_log("keep", "ready");
    eventually("it counts", LIMIT, || {
        (on_host(&hull).len() > 5).then_some(())
    });
    // What stands still counts nothing that the snapshot doesn't have.
    let _ = hull.ok(["pause", "counter"]);
    snapshot(&hull, "counter", &directory);
    let before = on_host(&hull);
    let logged = counted(&pod.logs("count")).len();
    drop(pod);
    assert_eq!(on_host(&hull), before);

    let pod = Pod::running(&hull, "counter");
    assert_eq!(
        hull.ok(["restore".as_ref(), directory.as_os_str()]).trim(),
        "counter"
    );

    let more = || (on_host(&hull).len() > before.len() + 5).then_some(());
    eventually("it goes on counting", LIMIT, more);
    for numbers in [
        on_host(&hull),
        counted(&pod.sh("count", "cat /data/log")),
        counted(&pod.sh("count", "cat /memory/log")),
    ] {
        assert!(numbers.len() > before.len());
        assert!(is_contiguous(&numbers), "{numbers:?}");
    }
    // The log has what came before, and what comes.
    let log = counted(&pod.logs("count"));
    assert!(log.len() > logged, "{log:?}");
    assert!(log.is_sorted_by(|a, b| a < b), "{log:?}");
    assert_eq!(log.first(), Some(&1));
    assert_eq!(pod.sh("keep", "cat /kept; stat -c %a /data"), "kept\n700");
    assert_eq!(pod.container("count")["restartCount"], 0);
    assert_eq!(pod.phase(), "Running");

    // It can be put aside again, and ends as any pod.
    let again = hull.work_dir().join("again");
    snapshot(&hull, "counter", &again);
    let len = on_host(&hull).len();
    eventually("it goes on counting", LIMIT, || {
        (on_host(&hull).len() > len).then_some(())
    });
    pod.stop();
    assert_eq!(pod.phase(), "Failed");
}

#[test]
fn one_snapshot_is_restored_twice_beside_its_pod() {
    let hull = Hull::new().with_templates();
    let _ = hull.ok(["template", "create"]);
    let directory = hull.work_dir().join("aside");
    let pod = Pod::start(&hull, "counter", &counter(&hull));
    pod.wait_log("keep", "ready");
    snapshot(&hull, "counter", &directory);
    let count = |pod: &Pod<'_>| counted(&pod.sh("count", "cat /data/log")).len();
    let before = count(&pod);
    eventually("the pod itself goes on", LIMIT, || {
        (count(&pod) > before).then_some(())
    });

    let pods = [
        pod,
        restore(&hull, &directory, "second"),
        restore(&hull, &directory, "third"),
    ];

    for pod in &pods {
        let before = count(pod);
        eventually("it counts", LIMIT, || (count(pod) > before).then_some(()));
        let log = counted(&pod.sh("count", "cat /data/log"));
        assert!(is_contiguous(&log), "{log:?}");
        assert_eq!(pod.sh("count", "hostname"), "counter");
    }
    for script in [
        "cat /proc/sys/kernel/random/uuid",
        "head -c 32 /dev/urandom | xxd -p",
        "hostname -i",
        "cat /sys/class/net/eth0/address",
    ] {
        let mut said: Vec<_> = pods.iter().map(|pod| pod.sh("keep", script)).collect();
        said.sort();
        said.dedup();
        assert_eq!(said.len(), 3, "{script}: {said:?}");
    }
    // They reach each other by their new addresses.
    let address = pods[1].addresses()[0];
    assert_eq!(
        pods[2].sh("keep", "hostname -i"),
        pods[2].addresses()[0].to_string()
    );
    let ping = format!("ping -c 1 -w 20 {address} > /dev/null && echo reached");
    assert_eq!(pods[2].sh("keep", &ping), "reached");
    // The directory is not needed any more.
    fs::remove_dir_all(&directory).unwrap();
    assert_eq!(pods[1].sh("keep", "cat /kept"), "kept");
}

#[test]
fn containers_of_a_restored_pod_are_started_again() {
    let hull = Hull::new();
    let manifest = "apiVersion: v1
kind: Pod
metadata: {name: restarts}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 0
  containers:
  - name: done
    image: busybox
    command: ['true']
  - name: main
    image: busybox
    command: [sh, -c, 'echo x >> /starts; trap \"exit 3\" TERM; echo up; while :; do sleep 0.1; done']
";
    let directory = hull.work_dir().join("aside");
    let pod = Pod::start_with(&hull, "restarts", manifest, &["--network", "none"]);
    pod.wait_log("main", "up");
    eventually("the first has ended", LIMIT, || {
        let state = pod.container("done");
        state["state"]["terminated"].is_object().then_some(())
    });
    snapshot(&hull, "restarts", &directory);
    drop(pod);
    let pod = restore(&hull, &directory, "restarts");

    let _ = hull.ok(["kill", "--signal", "TERM", "restarts", "-c", "main"]);

    eventually("it is started again", LIMIT, || {
        let main = pod.container("main");
        (main["restartCount"] == 1 && main["state"]["running"].is_object()).then_some(())
    });
    assert_eq!(pod.container("done")["restartCount"], 0);
    // Each start has a root of its own: the second finds nothing of the first's.
    assert_eq!(pod.sh("main", "cat /starts"), "x");
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let hull = Hull::new();
    let directory = put_aside(&hull, "small");
    let path = text(&directory);
    let description = fs::read_to_string(directory.join("snapshot.json")).unwrap();
    let memory = fs::File::options()
        .write(true)
        .open(directory.join("memory"))
        .unwrap();
    let length = memory.metadata().unwrap().len();

    memory.set_len(length + 4096).unwrap();
    assert!(refused(&hull, &["restore", path], 1).contains("memory has"));
    memory.set_len(length).unwrap();

    let state = fs::read(directory.join("state")).unwrap();
    let mut changed = state.clone();
    changed[state.len() / 2] ^= 4;
    fs::write(directory.join("state"), changed).unwrap();
    assert!(refused(&hull, &["restore", path], 1).contains("state has been changed"));
    fs::write(directory.join("state"), state).unwrap();

    let newer = description.replace("\"format\": 1", "\"format\": 7");
    fs::write(directory.join("snapshot.json"), newer).unwrap();
    assert!(refused(&hull, &["restore", path], 1).contains("form 7"));
    fs::remove_file(directory.join("snapshot.json")).unwrap();
    assert!(refused(&hull, &["restore", path], 2).contains("no snapshot"));
    fs::write(directory.join("snapshot.json"), description).unwrap();

    let bad = refused(&hull, &["restore", path, "--name", "Not/A/Name"], 2);
    assert!(bad.contains("--name"), "{bad}");
    assert!(hull.ok(["ps", "--all", "--quiet"]).is_empty());
    let pod = restore(&hull, &directory, "small");
    let taken = refused(&hull, &["restore", path], 1);
    assert!(taken.contains("small"), "{taken}");
    drop(pod);

    let other = Hull::without_images();
    let missing = refused(&other, &["restore", path], 1);
    assert!(
        missing.contains("busybox") && missing.contains("hull load"),
        "{missing}"
    );
}

#[test]
fn what_can_not_be_put_aside_is_refused_and_goes_on() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "small", &sleepers("small", &[("main", "")], ""));
    let full = hull.work_dir().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("memory"), "mine").unwrap();
    assert!(refused(&hull, &["snapshot", "small", text(&full)], 2).contains("not empty"));
    assert_eq!(fs::read_to_string(full.join("memory")).unwrap(), "mine");

    // A file that is open and has no name can't be found again.
    let directory = hull.work_dir().join("aside");
    let open = "exec 3>/nameless; rm /nameless; echo open; sleep 1000";
    let mut holder = pod.exec_command("main", open);
    let mut holder = holder.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = [0; 5];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut said).unwrap();
    let why = refused(&hull, &["snapshot", "small", text(&directory)], 1);
    assert!(why.contains("rootfs/main/nameless"), "{why}");
    assert!(!directory.exists());
    assert_eq!(pod.sh("main", "echo goes on"), "goes on");
    holder.kill().unwrap();
    holder.wait().unwrap();

    // A disk that is full.
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "none"])
        .arg(hull.work_dir().join("full"))
        .output()
        .unwrap();
    assert_success(&mounted, "mount");
    let small = full.join("aside");
    let why = refused(&hull, &["snapshot", "small", text(&small)], 1);
    assert!(why.contains("No space left"), "{why}");
    assert!(!small.exists());
    let unmounted = Command::new("umount").arg(&full).output().unwrap();
    assert_success(&unmounted, "umount");
    assert_eq!(pod.sh("main", "echo goes on"), "goes on");

    let joined = [
        "attach-container",
        "small",
        "--image",
        "busybox",
        "--name",
        "guest",
        "-d",
        "--",
    ];
    let _ = hull.ok(joined.iter().chain(&["sleep", "1000"]));
    let why = refused(&hull, &["snapshot", "small", text(&directory)], 1);
    assert!(why.contains("guest has joined"), "{why}");

    pod.stop();
    assert!(refused(&hull, &["snapshot", "small", text(&directory)], 1).contains("not running"));
    assert!(!directory.exists());
}

/// `hull snapshot` of a pod whose machine stands still, so that it can come to no end, once it has made its files.
fn endless_snapshot(hull: &Hull, pod: &Pod<'_>, directory: &Path) -> Child {
    signal(pod.pid("vmmPid"), Signal::STOP);
    let taking = hull
        .command(["snapshot".as_ref(), "small".as_ref(), directory.as_os_str()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let files = || directory.join("files.tar").exists().then_some(());
    eventually("it has begun", LIMIT, files);
    taking
}

#[test]
fn a_snapshot_that_is_given_up_leaves_a_pod_that_goes_on() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "small", &sleepers("small", &[("main", "")], ""));
    let (new, empty) = (hull.work_dir().join("new"), hull.work_dir().join("empty"));
    fs::create_dir(&empty).unwrap();
    for directory in [&new, &empty] {
        let taking = endless_snapshot(&hull, &pod, directory);
        signal(i32::try_from(taking.id()).unwrap(), Signal::INT);
        let given_up = taking.wait_with_output().unwrap();
        signal(pod.pid("vmmPid"), Signal::CONT);

        let said = String::from_utf8_lossy(&given_up.stderr).into_owned();
        assert_eq!(given_up.status.code(), Some(130), "{said}");
        assert!(said.contains("the pod goes on"), "{said}");
        assert_eq!(pod.sh("main", "echo goes on"), "goes on");
    }
    assert!(!new.exists());
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);

    // Killed, it can't tidy up.
    let mut taking = endless_snapshot(&hull, &pod, &new);
    taking.kill().unwrap();
    taking.wait().unwrap();
    signal(pod.pid("vmmPid"), Signal::CONT);
    assert_eq!(pod.sh("main", "echo goes on"), "goes on");
    let left = refused(&hull, &["snapshot", "small", text(&new)], 2);
    assert!(
        left.contains("parts of a snapshot") && left.contains("files.tar"),
        "{left}"
    );
    let none = refused(&hull, &["restore", text(&new)], 2);
    assert!(none.contains("there is no snapshot.json"), "{none}");
    fs::remove_dir_all(&new).unwrap();
    snapshot(&hull, "small", &new);
    let again = refused(&hull, &["snapshot", "small", text(&new)], 2);
    assert!(again.contains("has a snapshot already"), "{again}");
    drop(pod);
    drop(restore(&hull, &new, "small"));
}

#[test]
fn a_restored_pod_has_ports_of_its_own() {
    /// The copy's.
    const OTHER: u16 = ANY + 50;
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let directory = hull.work_dir().join("aside");
    let pod = Pod::start(&hull, "published", &published("published"));
    let answers = |port| {
        let address = SocketAddr::new(LOCALHOST, port);
        echoes(address) && echoes_datagrams(address)
    };
    eventually("the server is there", LIMIT, || answers(ANY).then_some(()));
    snapshot(&hull, "published", &directory);

    // Beside its pod it can't have the same ones.
    let taken = refused(&hull, &["restore", text(&directory), "--name", "copy"], 2);
    assert!(
        taken.contains(&ANY.to_string()) && taken.contains("--publish"),
        "{taken}"
    );
    let (tcp, udp) = (format!("{OTHER}:7000"), format!("{OTHER}:7000/udp"));
    let published = ["--publish", &tcp, "--publish", &udp];
    let args = ["restore", text(&directory), "--name", "copy"];
    let _ = hull.ok(args.iter().chain(&published));
    let copy = Pod::running(&hull, "copy");
    eventually("the copy answers", LIMIT, || answers(OTHER).then_some(()));
    assert!(answers(ANY));

    // Each by its own address, too.
    for pod in [&pod, &copy] {
        let address = SocketAddr::new(pod.addresses()[0], 7000);
        assert!(echoes(address) && echoes_datagrams(address), "{address}");
    }
    drop(pod);
    assert!(answers(OTHER));
    assert!(!answers(ANY));
    // In place of its pod it has those that the pod had.
    drop(copy);
    let _pod = restore(&hull, &directory, "published");
    eventually("it answers", LIMIT, || answers(ANY).then_some(()));
    assert!(!answers(OTHER));
}

/// Reads on until `wanted` has come, in all.
fn read_until(stream: &mut impl Read, printed: &mut String, wanted: impl Fn(&str) -> bool) {
    let mut chunk = [0; 256];
    while !wanted(printed) {
        let read = stream.read(&mut chunk).unwrap();
        assert!(read > 0, "it ended: {printed}");
        printed.push_str(&String::from_utf8_lossy(&chunk[..read]));
    }
}

#[test]
fn terminals_outlast_a_snapshot() {
    let hull = Hull::new();
    let manifest = sleepers("terminal", &[("main", "")], "")
        + "  - name: ticks
    image: busybox
    tty: true
    stdin: true
    command: [sh, -c, 'stty rows 7 cols 70; n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done']
";
    let directory = hull.work_dir().join("aside");
    let pod = Pod::start(&hull, "terminal", &manifest);
    let mut session = hull
        .script("exec hull exec -it terminal -c main -- sh -c 'stty -echo; echo ready; exec cat'")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut typed = session.stdin.take().unwrap();
    let mut stdout = session.stdout.take().unwrap();
    let mut printed = String::new();
    let last_of = |pod: &Pod<'_>| {
        let logs = pod.logs("ticks");
        let last = logs.lines().last().unwrap_or_default();
        last.trim_end().parse::<u64>().unwrap_or_default()
    };
    read_until(&mut stdout, &mut printed, |printed| {
        printed.contains("ready")
    });
    typed.write_all(b"before\n").unwrap();
    read_until(&mut stdout, &mut printed, |printed| {
        printed.contains("before")
    });
    eventually("it ticks", LIMIT, || (last_of(&pod) > 3).then_some(()));

    snapshot(&hull, "terminal", &directory);

    // The pod's own go on.
    typed.write_all(b"after\n").unwrap();
    read_until(&mut stdout, &mut printed, |printed| {
        printed.contains("after")
    });
    let before = last_of(&pod);
    eventually("it ticks", LIMIT, || (last_of(&pod) > before).then_some(()));
    drop(typed);
    assert!(session.wait().unwrap().success());

    // A copy's container goes on with its terminal; of the session, which is nobody's there, nothing is left.
    let copy = restore(&hull, &directory, "copy");
    let before = last_of(&copy);
    assert!(before > 3);
    eventually("it ticks", LIMIT, || {
        (last_of(&copy) > before).then_some(())
    });
    assert_eq!(copy.sh("ticks", "stty size < /proc/1/fd/0"), "7 70");
    eventually("the session has ended", LIMIT, || {
        let processes = copy.sh("main", "ps -o comm");
        (!processes.lines().any(|name| name == "cat")).then_some(())
    });
    let inside = "exec hull exec -it copy -c main -- sh -c 'tty; stty size; exit 5'";
    let output = hull
        .script(&format!("stty rows 33 cols 111; {inside}"))
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("33 111"), "{printed}");
    assert_eq!(output.status.code(), Some(5), "{printed}");
}
