//! The metrics of a host's pods, whoever runs them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use hull_tests::containerd::Containerd;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::Pod;
use hull_tests::{host, scaled};
use rustix::process::Signal;

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: counted}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: busybox, command: [sleep, '1000']}
";

/// The value of the first series whose line begins with `name` and has all of `labels`.
fn value(metrics: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let line = metrics.lines().find(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('{'))
            && labels.iter().all(|label| line.contains(label))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let patience = scaled(Duration::from_secs(30));
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    answer
}

#[test]
fn a_hosts_pods_are_measured_whoever_runs_them() {
    let hull = Hull::new();
    let run_dir = hull.run_dir();
    let run_dir = run_dir.to_string_lossy().into_owned();
    let containerd = Containerd::start_with(&[("HULL_RUN_DIR", &run_dir)]);
    let pod = Pod::start_with(&hull, "counted", POD, &["--network", "none"]);
    let file = containerd.work_dir().join("hull.toml");
    std::fs::write(&file, "default_vcpus = 1\ndefault_memory_mib = 512\n").unwrap();
    let file = file.to_string_lossy().into_owned();
    let options = ["--detach", "--runtime-config-path", &file];
    let started = containerd.run(&options, "measured", &["sleep", "1000"]);
    assert_success(&started, "ctr run");
    let mut monitor = hull
        .command(["monitor", "--listen", "127.0.0.1:0"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let stderr = monitor.stderr.take().unwrap();
    BufReader::new(stderr).read_line(&mut said).unwrap();
    let address = said.trim().trim_end_matches("/metrics");
    let address = address.rsplit('/').next().unwrap().to_owned();

    let all = scrape(&address);
    let supervisor = pod.inspect()["status"]["supervisorPid"].as_i64();
    let supervisor = i32::try_from(supervisor.unwrap()).unwrap();
    host::signal(supervisor, Signal::STOP);
    let hung = scrape(&address);
    host::signal(supervisor, Signal::CONT);
    let _ = containerd.ok(&["task", "kill", "--signal", "KILL", "measured"]);
    let _ = containerd.ok(&["task", "delete", "measured"]);
    let after = scrape(&address);
    monitor.kill().unwrap();
    monitor.wait().unwrap();

    println!("{all}");
    for labels in [
        [r#"manager="hull""#, r#"pod="counted""#],
        [r#"manager="containerd""#, r#"pod="measured""#],
    ] {
        let value = |name| value(&all, name, &labels).unwrap_or_else(|| panic!("{name}: {all}"));
        assert_eq!(value("hull_pod_up"), 1.0);
        let touched = value("hull_pod_guest_memory_touched_bytes");
        assert!(touched > 16e6 && touched < value("hull_pod_guest_memory_bytes"));
        assert!(value("hull_pod_vmm_resident_bytes") > touched);
        assert!(value("hull_pod_vmm_cpu_seconds_total") > 0.0);
        assert!(value("hull_pod_supervisor_resident_bytes") > 1e6);
        assert!(value("hull_pod_boot_seconds") > 0.0);
        assert!(value("hull_pod_agent_call_seconds_count") > 0.0);
    }
    // As the handler's configuration has it, and by default.
    for (pod, memory_mib) in [("measured", 512.0), ("counted", 1024.0)] {
        let memory = value(&all, "hull_pod_guest_memory_bytes", &[pod]);
        assert_eq!(memory, Some(memory_mib * 1024.0 * 1024.0));
    }
    assert_eq!(value(&all, "hull_pod_vcpus", &["measured"]), Some(1.0));
    let received = "hull_pod_network_receive_bytes_total";
    assert_eq!(value(&all, received, &["counted"]), None);
    let boots = all
        .lines()
        .find(|line| line.starts_with("hull_boot_seconds_count"));
    assert_eq!(boots, Some("hull_boot_seconds_count 2"));
    // One that hangs is down, and no other with it.
    assert_eq!(value(&hung, "hull_pod_up", &["counted"]), Some(0.0));
    assert_eq!(value(&hung, "hull_pod_up", &["measured"]), Some(1.0));
    assert_eq!(value(&after, "hull_pod_up", &["measured"]), None);
    assert_eq!(value(&after, "hull_pod_up", &["counted"]), Some(1.0));
    containerd.nothing_left();
    let sockets = std::fs::read_dir(hull.run_dir().join("shims")).unwrap();
    assert_eq!(sockets.count(), 0);
}
