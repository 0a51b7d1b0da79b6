//! Guest kernels other than the default.

use hull_tests::hull::{self, Hull};
use hull_tests::pod::{Pod, sleepers};

/// Our kernel, which has no modules, whatever the default is.
#[test]
fn a_pod_runs_on_the_tuned_kernel() {
    runs_on("tuned", "6.12.");
}

/// A distribution's kernel, most of whose virtio drivers are built in.
#[test]
fn a_pod_runs_on_linux_6_12() {
    runs_on("6.12", "6.12.");
}

/// Debian 12's own kernel, whose virtio drivers are modules.
#[test]
fn a_pod_runs_on_linux_6_1() {
    runs_on("6.1", "6.1.");
}

/// Two containers on this kernel, whose release begins so, with a volume and a network in common.
fn runs_on(kernel: &str, release: &str) {
    let hull = Hull::new().with_guest(hull::target(&format!("guest-{kernel}")));
    let volume = "    volumeMounts: [{name: data, mountPath: /data}]\n";
    let rest = format!(
        "  volumes: [{{name: data, hostPath: {{path: {}/data}}}}]\n",
        hull.work_dir().display()
    );
    let containers = [("one", volume), ("two", volume)];
    let pod = Pod::start(&hull, "other", &sleepers("other", &containers, &rest));

    let kernel = pod.sh(
        "one",
        "uname -r > /data/kernel; nc -l -p 80 -e cat /data/kernel >/dev/null 2>&1 & sleep 1; uname -r",
    );
    let by_network = pod.sh("two", "nc 127.0.0.1 80");

    assert!(kernel.starts_with(release), "{kernel}");
    assert_eq!(by_network, kernel);
    let on_host = std::fs::read_to_string(hull.work_dir().join("data/kernel")).unwrap();
    assert_eq!(on_host.trim(), kernel);
    pod.stop();
    assert_eq!(pod.phase(), "Failed", "its containers were killed");
}
