//! Guest kernels other than the default.

use hull_tests::hull::{self, Hull};
use hull_tests::pod::{Pod, sleepers};

/// Debian 12's own kernel, whose virtio drivers are modules.
#[test]
fn a_pod_runs_on_linux_6_1() {
    let hull = Hull::new().with_guest(hull::target("guest-6.1"));
    let volume = "    volumeMounts: [{name: data, mountPath: /data}]\n";
    let rest = format!(
        "  volumes: [{{name: data, hostPath: {{path: {}/data}}}}]\n",
        hull.work_dir().display()
    );
    let containers = [("one", volume), ("two", volume)];
    let pod = Pod::start(&hull, "older", &sleepers("older", &containers, &rest));

    let kernel = pod.sh(
        "one",
        "uname -r > /data/kernel; nc -l -p 80 -e cat /data/kernel >/dev/null 2>&1 & sleep 1; uname -r",
    );
    let by_network = pod.sh("two", "nc 127.0.0.1 80");

    assert!(kernel.starts_with("6.1."), "{kernel}");
    assert_eq!(by_network, kernel);
    let on_host = std::fs::read_to_string(hull.work_dir().join("data/kernel")).unwrap();
    assert_eq!(on_host.trim(), kernel);
    pod.stop();
    assert_eq!(pod.phase(), "Failed", "its containers were killed");
}
