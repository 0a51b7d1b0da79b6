//! Times containers under containerd, of Hull and of runc, interleaved on one machine, and prints medians and ratios.
//!
//! Run by `scripts/bench containerd`. Absolute times say nothing where the machine is emulated; the ratios do.
//! `HULL_BENCH_MIB` is how much goes through `ctr task exec`, in MiB (default 1024).

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a benchmark reports by panicking"
)]

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_tests::containerd::{Containerd, HULL};
use hull_tests::cri::{Cri, CriPod, container, log_lines};
use hull_tests::host;
use hull_tests::hull::assert_success;
use hull_tests::series::{Series, print, until_printed};

const RUNC: &str = "io.containerd.runc.v2";
const IMAGE: &str = "docker.io/library/busybox:latest";
const RUNTIMES: [(&str, &str); 2] = [("runc", RUNC), ("Hull", HULL)];
const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(300);
/// Of what takes minutes.
const LONG_ROUNDS: usize = 1;

fn series(what: &str) -> [Series; 2] {
    RUNTIMES.map(|(name, _)| Series::new(format!("{name}: {what}")))
}

/// Seconds that a command takes, which must succeed.
fn seconds(command: &mut Command) -> f64 {
    let start = Instant::now();
    let output = command.output().expect("it can be run");
    let taken = start.elapsed().as_secs_f64();
    assert_success(&output, &format!("{command:?}"));
    taken
}

fn first_output(containerd: &Containerd) {
    let mut all = series("ctr run --rm, echo");
    for round in 0..=ROUNDS {
        for (one, (name, runtime)) in all.iter_mut().zip(RUNTIMES) {
            let id = format!("{}-{round}", name.to_lowercase());
            let mut command =
                containerd.ctr_command(&["run", "--rm", "--runtime", runtime, IMAGE, &id]);
            command.args(["echo", "hello"]);
            let taken = until_printed(&mut command, "hello");
            // The first one warms the caches.
            if round > 0 {
                one.add(taken);
            }
        }
    }
    print("`ctr run` to the container's first output", "s", &all);
}

/// As a kubelet does it: a sandbox, its network by CNI, a container, and the first line in its log.
fn pod_to_log(containerd: &Containerd) {
    let cri = Cri::new(containerd);
    let mut all = series("RunPodSandbox to a log's first line");
    for round in 0..=ROUNDS {
        for (one, (name, _)) in all.iter_mut().zip(RUNTIMES) {
            let handler = name.to_lowercase();
            let config = cri.pod_config(&format!("{handler}-{round}"));
            let start = Instant::now();
            let pod = CriPod::run_with(&cri, &handler, config);
            let _ = pod.started(container("main", "echo hello; exec sleep 100000"));
            while log_lines(&pod.log_path("main.log")).is_empty() {
                assert!(start.elapsed() < PATIENCE, "{name} logs nothing");
                std::thread::sleep(Duration::from_millis(5));
            }
            let taken = start.elapsed().as_secs_f64();
            if round > 0 {
                one.add(taken);
            }
            pod.remove();
        }
    }
    print(
        "CRI pod of one container, RunPodSandbox to its log's first line",
        "s",
        &all,
    );
}

/// A container that runs while it is measured.
struct Running<'a> {
    containerd: &'a Containerd,
    id: String,
}

impl<'a> Running<'a> {
    fn start(containerd: &'a Containerd, name: &str, runtime: &str) -> Self {
        let id = format!("{}-long", name.to_lowercase());
        let mut command =
            containerd.ctr_command(&["run", "--detach", "--runtime", runtime, IMAGE, &id]);
        command.args(["sleep", "100000"]);
        let _ = seconds(&mut command);
        Self { containerd, id }
    }

    fn exec(&self, exec: &str, program: &[&str]) -> Command {
        let arguments = ["task", "exec", "--exec-id", exec, &self.id];
        let mut command = self.containerd.ctr_command(&arguments);
        command.args(program);
        command
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.containerd.ctr(&["task", "rm", "--force", &self.id]);
        let _ = self.containerd.ctr(&["container", "rm", &self.id]);
    }
}

fn exec_latency(running: &[Running; 2]) {
    let mut all = series("ctr task exec, true");
    for round in 0..=2 * ROUNDS {
        for (one, container) in all.iter_mut().zip(running) {
            let taken = seconds(&mut container.exec(&format!("true-{round}"), &["true"]));
            if round > 0 {
                one.add(taken);
            }
        }
    }
    print("`ctr task exec` of a program that ends at once", "s", &all);
}

fn throughput(running: &[Running; 2]) {
    let mib: u64 = std::env::var("HULL_BENCH_MIB").map_or(1024, |mib| {
        mib.parse().expect("HULL_BENCH_MIB is a number of MiB")
    });
    let bytes = (mib << 20).to_string();
    let (mut out, mut into) = (series("out"), series("in"));
    for round in 0..LONG_ROUNDS {
        for (one, container) in out.iter_mut().zip(running) {
            let program = ["head", "-c", &bytes, "/dev/zero"];
            let mut command = container.exec(&format!("out-{round}"), &program);
            let start = Instant::now();
            let status = command.stdout(Stdio::null()).status().expect("ctr");
            assert!(status.success());
            one.add(rate(mib, start));
        }
        for (one, container) in into.iter_mut().zip(running) {
            let source = Command::new("head")
                .args(["-c", &bytes, "/dev/zero"])
                .stdout(Stdio::piped())
                .spawn();
            let mut source = source.expect("head");
            let mut command = container.exec(&format!("in-{round}"), &["wc", "-c"]);
            let start = Instant::now();
            let stdin = source.stdout.take().expect("a pipe");
            let output = command.stdin(stdin).output().expect("ctr");
            one.add(rate(mib, start));
            source.wait().expect("head");
            assert_success(&output, "ctr task exec");
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), bytes);
        }
    }
    let title = format!("{mib} MiB through `ctr task exec`");
    print(&format!("{title}, output"), "MiB/s", &out);
    print(&format!("{title}, input"), "MiB/s", &into);
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^52")]
fn rate(mib: u64, start: Instant) -> f64 {
    mib as f64 / start.elapsed().as_secs_f64()
}

fn memory(containerd: &Containerd, running: &[Running; 2]) {
    println!("Memory of a pod with one idle container, in KiB");
    for (container, (name, _)) in running.iter().zip(RUNTIMES) {
        let shim = shim_of(containerd, &container.id);
        let show = |what: &str, pid: i32| {
            let ((resident, _), (own, guest)) =
                (host::resident_kib(pid), host::proportional_kib(pid));
            println!(
                "  {name}: {what}: PSS {own}, resident {resident}, of guest RAM touched {guest}"
            );
        };
        show("shim", shim);
        for pid in children(shim) {
            let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            if program.ends_with("hull-vmm") {
                show("hull-vmm without guest RAM", pid);
            }
        }
    }
}

/// Of a container whose task is the shim itself, or the shim's child.
fn shim_of(containerd: &Containerd, id: &str) -> i32 {
    let list = containerd.ok(&["task", "ls"]);
    let task = list.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.next() == Some(id)).then(|| fields.next()?.parse::<i32>().ok())?
    });
    let task = task.expect("the task is listed");
    let program = fs::read_link(format!("/proc/{task}/exe")).expect("the task runs");
    if program.ends_with("containerd-shim-hull-v2") {
        return task;
    }
    let stat = fs::read_to_string(format!("/proc/{task}/stat")).expect("the task runs");
    let parent = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    parent.expect("a parent (proc_pid_stat(5))")
}

fn children(pid: i32) -> Vec<i32> {
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(
            list.split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    children
}

fn main() {
    let containerd = Containerd::start();
    first_output(&containerd);
    pod_to_log(&containerd);
    let running = RUNTIMES.map(|(name, runtime)| Running::start(&containerd, name, runtime));
    exec_latency(&running);
    memory(&containerd, &running);
    throughput(&running);
}
