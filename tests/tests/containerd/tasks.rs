//! What `ctr` does with containers.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use hull_tests::containerd::{Containerd, HULL};
use hull_tests::eventually;
use hull_tests::hull::{assert_success, bursts_pass};
use serde_json::Value;

use crate::terminal::Terminal;

const SOON: Duration = Duration::from_secs(10);
/// Runs until it is told to end.
const WAITS: &str = "trap 'echo told; exit 5' USR1; echo started; while :; do sleep 0.2; done";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `ctr` without the program around it that bounds its time, which could not be killed with it.
fn unbounded(containerd: &Containerd, arguments: &[&str]) -> Command {
    let bounded = containerd.ctr_command(arguments);
    let mut command = Command::new("ctr");
    command.args(bounded.get_args().skip_while(|word| *word != "ctr").skip(1));
    command
}

/// What containerd publishes, from now on.
struct Events {
    program: Child,
    file: std::path::PathBuf,
}

impl Events {
    fn watch(containerd: &Containerd) -> Self {
        let file = containerd.work_dir().join("events");
        let program = unbounded(containerd, &["events"])
            .stdout(fs::File::create(&file).unwrap())
            .spawn()
            .unwrap();
        let events = Self { program, file };
        // It says nothing when it is ready.
        eventually("ctr events listens", SOON, || {
            let _ = containerd.ok(&["namespaces", "label", containerd.name(), "seen=now"]);
            (!events.text().is_empty()).then_some(())
        });
        events
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.file).unwrap()
    }

    /// The topics of tasks, beneath `/tasks/`, of a container.
    fn topics(&self, id: &str) -> Vec<String> {
        let text = self.text();
        let of_it = format!("\"container_id\":\"{id}\"");
        let lines = text.lines().filter(|line| line.contains(&of_it));
        let topic = |line: &str| {
            let (_, rest) = line.split_once(" /tasks/")?;
            Some(rest.split(' ').next()?.to_owned())
        };
        lines.filter_map(topic).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn status(containerd: &Containerd, id: &str) -> String {
    let list = containerd.ok(&["task", "ls"]);
    let line = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(id));
    let state = line.and_then(|line| line.split_whitespace().nth(2));
    state.unwrap_or("none").to_owned()
}

fn stopped(containerd: &Containerd, id: &str) {
    eventually("the container's end", SOON, || {
        (status(containerd, id) == "STOPPED").then_some(())
    });
}

fn exec(containerd: &Containerd, id: &str, name: &str, script: &str) -> Output {
    containerd.ctr(&["task", "exec", "--exec-id", name, id, "sh", "-c", script])
}

/// Deletes a task; `ctr` warns of an exit code.
fn deleted(containerd: &Containerd, id: &str, code: u32) {
    let output = containerd.ctr(&["task", "delete", id]);
    assert_success(&output, "ctr task delete");
    let warning = text(&output.stderr);
    assert!(warning.contains(&format!("exit code {code}")), "{warning}");
}

fn removed(containerd: &Containerd, id: &str) {
    let _ = containerd.ok(&["container", "delete", id]);
}

#[test]
fn a_container_runs_as_it_is_told_and_nothing_stays() {
    let containerd = Containerd::start();
    let data = containerd.work_dir().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "of the host\n").unwrap();
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        data.display()
    );
    let flags = [
        "--rm",
        "--env",
        "NAMED=value",
        "--cwd",
        "/var",
        "--read-only",
        "--mount",
        &mount,
    ];
    let script = "echo $(id -u) $(id -g) $NAMED $(pwd); cat /data/file; touch /here; echo err >&2; \
        (echo written >/data/new) 2>&1; exit 7";
    // The container's user may write where everybody may.
    fs::set_permissions(&data, fs::Permissions::from_mode(0o777)).unwrap();

    let output = containerd.run(&flags, "t1", &["sh", "-c", script]);

    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(text(&output.stdout), "0 0 value /var\nof the host\n");
    assert_eq!(
        text(&output.stderr),
        "touch: /here: Read-only file system\nerr\n"
    );
    assert_eq!(fs::read_to_string(data.join("new")).unwrap(), "written\n");
    containerd.nothing_left();

    // The same name again, with input that comes in bursts and ends.
    let mut command = containerd.run_command(&["--rm"], "t1", &["sh", "-c", "cat; echo end"]);
    bursts_pass(&mut command);
    containerd.nothing_left();

    let events = Events::watch(&containerd);
    let hungry = ["sh", "-c", "x=x; while :; do x=$x$x; done"];
    let output = containerd.run(&["--rm", "--memory-limit", "33554432"], "t2", &hungry);
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    eventually("the last event", SOON, || {
        let topics = events.topics("t2");
        topics.contains(&"delete".into()).then_some(())
    });
    assert_eq!(
        events.topics("t2"),
        ["create", "start", "oom", "exit", "delete"]
    );
    drop(events);

    let missing = containerd.run(&["--rm"], "t3", &["/no/such/program"]);
    assert!(!missing.status.success());
    assert!(
        text(&missing.stderr).contains("/no/such/program"),
        "{missing:?}"
    );
    // ctr leaves the container of a task that it could not start.
    let _ = containerd.ctr(&["task", "delete", "--force", "t3"]);
    let _ = containerd.ctr(&["container", "delete", "t3"]);
    let host = containerd.run(&["--rm", "--net-host"], "t4", &["true"]);
    assert!(text(&host.stderr).contains("--net-host"), "{host:?}");
    let _ = containerd.ctr(&["container", "delete", "t4"]);
    containerd.nothing_left();
}

#[test]
fn a_bundle_tells_how_its_pod_started() {
    let containerd = Containerd::start();
    let started = containerd.run(&["--detach"], "speaks", &["sh", "-c", WAITS]);
    assert_success(&started, "ctr run");
    let bundle = containerd.bundle(containerd.name(), "speaks");

    let kept = eventually("the timeline is written", SOON, || {
        fs::read(bundle.join("timeline.json")).ok()
    });

    let timeline: Value = serde_json::from_slice(&kept).unwrap();
    let stamps = timeline["stamps"].as_array().unwrap();
    let names: Vec<_> = stamps.iter().map(|stamp| &stamp["stamp"]).collect();
    assert_eq!(names, ["T0", "T1", "T2", "T3", "T4", "T5", "T6", "T7"]);
    let _ = containerd.ok(&["task", "delete", "--force", "speaks"]);
    removed(&containerd, "speaks");
}

/// `ctr --cni` looks for its network where everybody does: it is shown ours there.
fn with_network(containerd: &Containerd, command: &Command) -> Output {
    let networks = containerd.work_dir().join("../cni");
    fs::create_dir_all("/etc/cni/net.d").unwrap();
    let script = "mount --bind \"$0\" /etc/cni/net.d && mount -t tmpfs none /opt && mkdir /opt/cni && \
        ln -s /usr/lib/cni /opt/cni/bin && exec \"$@\"";
    Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(networks)
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .output()
        .expect("util-linux is installed")
}

#[test]
fn a_task_is_watched_and_told() {
    let containerd = Containerd::start();
    let events = Events::watch(&containerd);
    let run = containerd.run_command(&["-d", "--cni"], "t1", &["sh", "-c", WAITS]);
    assert_success(&with_network(&containerd, &run), "ctr run -d --cni");

    assert_eq!(status(&containerd, "t1"), "RUNNING");
    let processes = containerd.ok(&["task", "ps", "t1"]);
    assert!(processes.lines().count() >= 2, "{processes}");
    let failed = exec(&containerd, "t1", "e1", "echo out; echo err >&2; exit 4");
    assert_eq!(failed.status.code(), Some(4));
    assert_eq!(
        (&*failed.stdout, &*failed.stderr),
        (&b"out\n"[..], &b"err\n"[..])
    );
    // The network was put in after the container was made.
    let ping = format!("ping -c 1 -W 60 {}", containerd.gateway());
    assert_success(&exec(&containerd, "t1", "e2", &ping), &ping);
    let mut cat = containerd.ctr_command(&["task", "exec", "--exec-id", "e3", "t1"]);
    bursts_pass(cat.args(["sh", "-c", "cat; echo end"]));

    let mut on_terminal = containerd.ctr_command(&["task", "exec", "-t", "--exec-id", "e4", "t1"]);
    on_terminal.args(["sh", "-c", "tty; read go; stty size; exit 6"]);
    let mut terminal = Terminal::start(&on_terminal, 91, 17);
    terminal.wait_for("/dev/pts/");
    terminal.resize(93, 19);
    std::thread::sleep(hull_tests::scaled(Duration::from_millis(300)));
    terminal.type_in("go\r");
    let (ended, shown) = terminal.finish();
    assert_eq!(ended.code(), Some(6), "{shown}");
    assert!(shown.contains("19 93"), "{shown}");

    let _ = containerd.ok(&["task", "kill", "--signal", "USR1", "t1"]);
    stopped(&containerd, "t1");
    deleted(&containerd, "t1", 5);
    removed(&containerd, "t1");
    eventually("the last event", SOON, || {
        let topics = events.topics("t1");
        (topics.last().map(String::as_str) == Some("delete")).then_some(())
    });
    let topics = events.topics("t1");
    let one = ["exec-added", "exec-started", "exit"];
    let mut expected = vec!["create", "start"];
    (0..4).for_each(|_| expected.extend(one));
    expected.extend(["exit", "delete"]);
    assert_eq!(topics, expected);
    drop(events);
    containerd.nothing_left();
}

#[test]
fn a_terminal_is_as_large_as_ours() {
    let containerd = Containerd::start();
    let command = containerd.run_command(&["--rm", "-t"], "t1", &["sh"]);
    let mut terminal = Terminal::start(&command, 101, 33);
    terminal.type_in("stty size; tty\r");
    terminal.wait_for("33 101");
    terminal.wait_for("/dev/pts/");
    terminal.resize(77, 22);
    std::thread::sleep(hull_tests::scaled(Duration::from_millis(300)));
    terminal.type_in("stty size\r");
    terminal.wait_for("22 77");

    terminal.type_in("exit 3\r");

    let (ended, shown) = terminal.finish();
    assert_eq!(ended.code(), Some(3), "{shown}");
    containerd.nothing_left();
}

#[test]
fn who_attaches_finds_the_container_as_it_is() {
    let containerd = Containerd::start();
    let script = "while read line; do echo \"heard $line\"; done; exit 4";
    assert_success(
        &containerd.run(&["-d"], "t1", &["sh", "-c", script]),
        "ctr run -d",
    );

    for word in ["one", "two"] {
        let mut attached = unbounded(&containerd, &["task", "attach", "t1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = attached.stdin.take().unwrap();
        let mut stdout = BufReader::new(attached.stdout.take().unwrap());
        writeln!(stdin, "{word}").unwrap();
        let mut heard = String::new();
        stdout.read_line(&mut heard).unwrap();
        assert_eq!(heard, format!("heard {word}\n"));
        attached.kill().unwrap();
        attached.wait().unwrap();
    }

    let _ = containerd.ok(&["task", "kill", "--signal", "KILL", "t1"]);
    stopped(&containerd, "t1");
    deleted(&containerd, "t1", 137);
    removed(&containerd, "t1");
    containerd.nothing_left();
}

#[test]
fn output_goes_to_files_and_loggers() {
    let containerd = Containerd::start();
    let log = containerd.work_dir().join("printed");
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo bad >&2";
    let place = format!("file://{}", log.display());
    let run = containerd.run(&["-d", "--log-uri", &place], "t1", &["sh", "-c", script]);
    assert_success(&run, "ctr run --log-uri file://");

    stopped(&containerd, "t1");

    // All of it is there when the end is told.
    let printed = fs::read_to_string(&log).unwrap();
    assert_eq!(
        printed
            .lines()
            .filter(|line| line.starts_with("line "))
            .count(),
        2000
    );
    assert!(printed.lines().any(|line| line == "bad"));
    let _ = containerd.ok(&["task", "delete", "t1"]);
    removed(&containerd, "t1");

    let directory = containerd.work_dir();
    let program = directory.join("logger");
    let logger = "#!/bin/sh\ncd $2\nexec 5>&-\ncat <&4 >err &\ncat <&3 >out\nwait\n\
        echo $CONTAINER_NAMESPACE $CONTAINER_ID >told\n";
    fs::write(&program, logger).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let place = format!(
        "binary://{}?into={}",
        program.display(),
        directory.display()
    );
    let run = containerd.run(&["-d", "--log-uri", &place], "t2", &["sh", "-c", script]);
    assert_success(&run, "ctr run --log-uri binary://");
    stopped(&containerd, "t2");
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    assert_eq!(read("out").lines().count(), 2000);
    assert_eq!(read("err"), "bad\n");
    assert_eq!(read("told"), format!("{} t2\n", containerd.name()));
    let _ = containerd.ok(&["task", "delete", "t2"]);
    removed(&containerd, "t2");
    containerd.nothing_left();
}

/// A root file system outside of any snapshotter.
fn root(directory: &Path) {
    fs::create_dir_all(directory.join("bin")).unwrap();
    for name in ["proc", "dev", "sys", "run"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", directory.join("bin/busybox")).unwrap();
}

/// Docker and nerdctl name a program that wires the container when it has been made.
#[test]
fn a_hook_wires_the_network() {
    let containerd = Containerd::start();
    let work = containerd.work_dir();
    root(&work.join("root"));
    let hook = work.join("hook");
    let script = "#!/bin/sh\nset -e\nstate=$(cat)\npid=${state##*\\\"pid\\\":}; pid=${pid%%[!0-9]*}\n\
         ip link add hooked type veth peer name eth0 netns $pid\n\
         ip addr add 10.89.7.1/24 dev hooked; ip link set hooked up\n\
         nsenter --net=/proc/$pid/ns/net sh -c 'ip addr add 10.89.7.2/24 dev eth0; ip link set eth0 up'\n";
    fs::write(&hook, script).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    let mut spec: serde_json::Value =
        serde_json::from_str(&containerd.ok(&["oci", "spec"])).unwrap();
    spec["root"] = serde_json::json!({"path": work.join("root")});
    spec["process"]["args"] = serde_json::json!([
        "/bin/busybox",
        "sh",
        "-c",
        "busybox ping -c 1 -W 60 10.89.7.1; busybox ip addr"
    ]);
    spec["process"]["env"] = serde_json::json!(["PATH=/bin"]);
    spec["linux"]["cgroupsPath"] = format!("/{}/t1", containerd.name()).into();
    spec["hooks"] = serde_json::json!({"createRuntime": [{"path": hook, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]});
    let file = work.join("spec.json");
    fs::write(&file, spec.to_string()).unwrap();

    let output = containerd
        .ctr_command(&["run", "--runtime", HULL, "--rm", "--config"])
        .arg(&file)
        .arg("t1")
        .output()
        .unwrap();

    assert_success(&output, "ctr run --config");
    assert!(text(&output.stdout).contains("10.89.7.2/24"), "{output:?}");
    containerd.nothing_left();
    assert!(!Path::new("/sys/class/net/hooked").exists());
}
