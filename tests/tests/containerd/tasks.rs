//! What `ctr` does with containers.

use hull_tests::containerd::Containerd;
use hull_tests::hull::assert_success;

#[test]
fn a_container_runs_and_nothing_stays() {
    let containerd = Containerd::start();

    let output = containerd.run(
        &["--rm"],
        "t1",
        &["sh", "-c", "echo out; echo err >&2; exit 7"],
    );

    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
    containerd.nothing_left();

    let again = containerd.run(&["--rm"], "t1", &["true"]);

    assert_success(&again, "ctr run");
    containerd.nothing_left();
}
