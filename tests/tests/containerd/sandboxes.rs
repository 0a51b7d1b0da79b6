//! Pods as CRI has them, made with `ctr`: the annotations are the same.

use hull_tests::containerd::Containerd;
use hull_tests::hull::assert_success;

const KIND: &str = "io.kubernetes.cri.container-type";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// Runs a pod's sandbox.
pub fn sandbox(containerd: &Containerd, id: &str) {
    let (kind, owner) = (format!("{KIND}=sandbox"), format!("{SANDBOX}={id}"));
    let flags = ["-d", "--annotation", &kind, "--annotation", &owner];
    let output = containerd.run(&flags, id, &["never-runs"]);
    assert_success(&output, "ctr run of a sandbox");
}

/// Runs a container of a pod, to its end or, with `-d`, until it has started.
pub fn run_member(
    containerd: &Containerd,
    flags: &[&str],
    pod: &str,
    id: &str,
    program: &[&str],
) -> std::process::Output {
    let (kind, owner) = (format!("{KIND}=container"), format!("{SANDBOX}={pod}"));
    let annotations = ["--annotation", &kind, "--annotation", &owner];
    containerd.run(&[flags, &annotations[..]].concat(), id, program)
}

/// The same, which must succeed.
pub fn member(containerd: &Containerd, flags: &[&str], pod: &str, id: &str, program: &[&str]) {
    let output = run_member(containerd, flags, pod, id, program);
    assert_success(&output, "ctr run of a pod's container");
}
