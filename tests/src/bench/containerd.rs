//! Containers under containerd, of Hull and of runc. `HULL_BENCH_MIB` is how much goes through `ctr task exec`, in MiB
//! (default 1024).

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::options::Options;
use super::report::{Report, Table};
use super::series::{Contender, Series, as_float, interleave, until_printed};
use crate::containerd::{Containerd, HULL};
use crate::cri::{Cri, CriPod, container, log_lines};
use crate::host;
use crate::hull::assert_success;

const RUNC: &str = "io.containerd.runc.v2";
const IMAGE: &str = "docker.io/library/busybox:latest";
const RUNTIMES: [(&str, &str); 2] = [("runc", RUNC), ("Hull", HULL)];
const PATIENCE: Duration = Duration::from_secs(300);

/// Seconds that a command takes, which must succeed.
fn seconds(command: &mut Command) -> f64 {
    let start = Instant::now();
    let output = command.output().expect("it can be run");
    let taken = start.elapsed().as_secs_f64();
    assert_success(&output, &format!("{command:?}"));
    taken
}

fn first_output(options: &Options, containerd: &Containerd) -> Table {
    let contenders = RUNTIMES.map(|(name, runtime)| {
        Contender::new(format!("{name}: ctr run --rm, echo"), move |round| {
            let id = format!("{}-{round}", name.to_lowercase());
            let args = ["run", "--rm", "--runtime", runtime, IMAGE, &id];
            let mut command = containerd.ctr_command(&args);
            command.args(["echo", "hello"]);
            until_printed(&mut command, "hello")
        })
    });
    let rows = interleave(options.rounds(), true, contenders.into());
    Table::new("`ctr run` to the container's first output", "s", rows)
}

/// As a kubelet does it: a sandbox, its network by CNI, a container, and the first line in its log.
fn pod_to_log(options: &Options, containerd: &Containerd) -> Table {
    let cri = Cri::new(containerd);
    let cri = &cri;
    let contenders = RUNTIMES.map(|(name, _)| {
        Contender::new(
            format!("{name}: RunPodSandbox to a log's first line"),
            move |round| {
                let handler = name.to_lowercase();
                let config = cri.pod_config(&format!("{handler}-{round}"));
                let start = Instant::now();
                let pod = CriPod::run_with(cri, &handler, config);
                let _ = pod.started(container("main", "echo hello; exec sleep 100000"));
                while log_lines(&pod.log_path("main.log")).is_empty() {
                    assert!(start.elapsed() < PATIENCE, "{name} logs nothing");
                    std::thread::sleep(Duration::from_millis(5));
                }
                let taken = start.elapsed().as_secs_f64();
                pod.remove();
                taken
            },
        )
    });
    let rows = interleave(options.rounds(), true, contenders.into());
    Table::new(
        "CRI pod of one container, RunPodSandbox to its log's first line",
        "s",
        rows,
    )
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

fn named<'a>(
    running: &'a [Running<'_>; 2],
    what: &str,
    measure: impl Fn(&Running<'_>, usize) -> f64 + Copy + 'a,
) -> Vec<Contender<'a>> {
    RUNTIMES
        .iter()
        .zip(running)
        .map(|((name, _), container)| {
            Contender::new(format!("{name}: {what}"), move |round| {
                measure(container, round)
            })
        })
        .collect()
}

fn exec_latency(options: &Options, running: &[Running<'_>; 2]) -> Table {
    let contenders = named(running, "ctr task exec, true", |container, round| {
        seconds(&mut container.exec(&format!("true-{round}"), &["true"]))
    });
    let rows = interleave(2 * options.rounds(), true, contenders);
    Table::new("`ctr task exec` of a program that ends at once", "s", rows)
}

/// One round, as it takes minutes.
fn throughput(running: &[Running<'_>; 2]) -> [Table; 2] {
    let mib: u64 = std::env::var("HULL_BENCH_MIB").map_or(1024, |mib| {
        mib.parse().expect("HULL_BENCH_MIB is a number of MiB")
    });
    let bytes = (mib << 20).to_string();
    let bytes = bytes.as_str();
    let out = named(running, "out", |container, round| {
        let program = ["head", "-c", bytes, "/dev/zero"];
        let mut command = container.exec(&format!("out-{round}"), &program);
        let start = Instant::now();
        let status = command.stdout(Stdio::null()).status().expect("ctr");
        assert!(status.success());
        rate(mib, start)
    });
    let into = named(running, "in", |container, round| {
        let source = Command::new("head")
            .args(["-c", bytes, "/dev/zero"])
            .stdout(Stdio::piped())
            .spawn();
        let mut source = source.expect("head");
        let mut command = container.exec(&format!("in-{round}"), &["wc", "-c"]);
        let start = Instant::now();
        let stdin = source.stdout.take().expect("a pipe");
        let output = command.stdin(stdin).output().expect("ctr");
        let rate = rate(mib, start);
        source.wait().expect("head");
        assert_success(&output, "ctr task exec");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), bytes);
        rate
    });
    let title = |what| format!("{mib} MiB through `ctr task exec`, {what}");
    [
        Table::new(&title("output"), "MiB/s", interleave(1, false, out)),
        Table::new(&title("input"), "MiB/s", interleave(1, false, into)),
    ]
}

fn rate(mib: u64, start: Instant) -> f64 {
    as_float(mib) / start.elapsed().as_secs_f64()
}

fn memory(containerd: &Containerd, running: &[Running<'_>; 2]) -> Table {
    let mut rows = Vec::new();
    let mut row = |name: String, value: u64| {
        let mut series = Series::new(name);
        series.add(as_float(value));
        rows.push(series);
    };
    for (container, (name, _)) in running.iter().zip(RUNTIMES) {
        let shim = shim_of(containerd, &container.id);
        row(
            format!("{name}: shim, PSS"),
            host::memory(shim).own.proportional,
        );
        for pid in children(shim) {
            let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            if program.ends_with("hull-vmm") {
                let memory = host::memory(pid);
                row(
                    format!("{name}: hull-vmm without guest RAM, PSS"),
                    memory.own.proportional,
                );
                row(format!("{name}: guest RAM touched"), memory.guest.resident);
            }
        }
    }
    Table::new("Memory of a pod with one idle container", "KiB", rows)
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

/// # Panics
/// When something doesn't run.
pub fn measure(options: &Options, report: &mut Report) {
    let containerd = Containerd::start();
    report.add(first_output(options, &containerd));
    report.add(pod_to_log(options, &containerd));
    let running = RUNTIMES.map(|(name, runtime)| Running::start(&containerd, name, runtime));
    report.add(exec_latency(options, &running));
    report.add(memory(&containerd, &running));
    for table in throughput(&running) {
        report.add(table);
    }
}
