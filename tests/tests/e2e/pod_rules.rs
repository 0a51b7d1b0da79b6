//! What a pod is, each rule on a real pod.

use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::Hull;
use hull_tests::pod::{Pod, sleepers};

#[test]
fn containers_share_the_network_and_nothing_else() {
    let hull = Hull::new();
    let pod = Pod::start(
        &hull,
        "shared",
        &sleepers("shared", &[("one", ""), ("two", "")], ""),
    );

    // One network: the same namespace, interfaces and addresses, localhost between them.
    for namespace in ["net", "ipc", "uts"] {
        let link = format!("readlink /proc/self/ns/{namespace}");
        assert_eq!(pod.sh("one", &link), pod.sh("two", &link), "{namespace}");
    }
    assert_eq!(pod.sh("one", "ip address"), pod.sh("two", "ip address"));
    assert!(pod.sh("one", "ip address show lo").contains("127.0.0.1/8"));
    let _ = pod.sh(
        "one",
        "nc -l -p 8080 -e echo hello >/dev/null 2>&1 & sleep 0.5",
    );
    assert_eq!(pod.sh("two", "nc 127.0.0.1 8080"), "hello");

    // A port is bound once.
    let _ = pod.sh("one", "nc -l -p 8081 >/dev/null 2>&1 & sleep 0.5");
    let second = pod.exec("two", "nc -l -p 8081 </dev/null");
    assert!(!second.status.success());
    assert!(
        String::from_utf8_lossy(&second.stderr).contains("Address already in use"),
        "{second:?}"
    );

    // Separate root file systems, mount and process namespaces.
    let _ = pod.sh("one", "echo mine > /only-in-one");
    assert!(!pod.exec("two", "cat /only-in-one").status.success());
    for namespace in ["mnt", "pid"] {
        let link = format!("readlink /proc/self/ns/{namespace}");
        assert_ne!(pod.sh("one", &link), pod.sh("two", &link), "{namespace}");
    }
    assert_eq!(pod.sh("one", "hostname"), "shared");
}

#[test]
fn infra_comes_first_and_holds_the_namespaces() {
    let hull = Hull::new();
    let rest = "  shareProcessNamespace: true\n";
    let pod = Pod::start(&hull, "first", &sleepers("first", &[("only", "")], rest));

    // infra is process 1 of the shared PID namespace, so it was there before any container.
    let name = pod.sh("only", "cat /proc/1/comm");
    let same = pod.sh("only", "ps -o pid,comm");

    assert!(name.contains("infra"), "{name}");
    assert!(same.contains("sleep"), "{same}");
    let events = hull.ok(["events", "first"]);
    let position = |what: &str| {
        events
            .to_lowercase()
            .find(what)
            .unwrap_or_else(|| panic!("{what} in {events}"))
    };
    assert!(position("infra") < position("container"), "{events}");
}

#[test]
fn killing_every_container_leaves_the_pod_running() {
    let hull = Hull::new();
    let pod = Pod::start(
        &hull,
        "alive",
        &sleepers("alive", &[("one", ""), ("two", "")], ""),
    );

    let _ = hull.ok(["kill", "alive", "-c", "one", "-s", "KILL"]);
    let _ = hull.ok(["kill", "alive", "-c", "two", "-s", "KILL"]);

    for container in ["one", "two"] {
        let code = eventually("container has ended", Duration::from_secs(5), || {
            pod.container(container)["state"]["terminated"]["exitCode"].as_i64()
        });
        assert_eq!(code, 137, "{container}");
    }
    assert!(
        hull_tests::host::is_alive(pod.pid("vmmPid")),
        "the machine is there"
    );
    assert!(hull.ok(["ps"]).contains("alive"));
    pod.stop();
}

#[test]
fn killing_infra_ends_the_pod_and_all_containers() {
    let hull = Hull::new();
    let pod = Pod::start(
        &hull,
        "headless",
        &sleepers("headless", &[("one", ""), ("two", "")], ""),
    );
    let vmm = pod.pid("vmmPid");

    let _ = hull.ok(["kill", "headless", "--infra", "-s", "KILL"]);

    pod.wait_phase("Failed", Duration::from_secs(5));
    eventually("the machine is gone", Duration::from_secs(5), || {
        (!hull_tests::host::is_alive(vmm)).then_some(())
    });
    for container in ["one", "two"] {
        assert!(
            pod.container(container)["state"]["terminated"].is_object(),
            "{container}"
        );
    }
    assert!(
        pod.inspect().to_string().contains("infra"),
        "the reason names infra"
    );
}

#[test]
fn a_container_restarts_as_its_policy_says() {
    let hull = Hull::new();
    let manifest = "apiVersion: v1
kind: Pod
metadata: {name: again}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: state, emptyDir: {}}
  containers:
  - name: flaky
    image: busybox
    command: [sh, -c, 'echo run >> /state/runs; [ $(wc -l < /state/runs) -ge 2 ] || exit 3; echo settled; sleep 100000']
    volumeMounts:
    - {name: state, mountPath: /state}
";
    let pod = Pod::start(&hull, "again", manifest);

    pod.wait_log("flaky", "settled");

    let status = pod.container("flaky");
    assert_eq!(status["restartCount"], 1, "{status}");
    assert_eq!(status["lastState"]["terminated"]["exitCode"], 3, "{status}");
}

#[test]
fn init_containers_run_one_after_another_before_the_others() {
    let hull = Hull::new();
    let manifest = "apiVersion: v1
kind: Pod
metadata: {name: ordered}
spec:
  restartPolicy: Never
  volumes:
  - {name: state, emptyDir: {medium: Memory}}
  initContainers:
  - {name: first, image: busybox, command: [sh, -c, 'echo first >> /state/order'], volumeMounts: [{name: state, mountPath: /state}]}
  - {name: second, image: busybox, command: [sh, -c, 'echo second >> /state/order'], volumeMounts: [{name: state, mountPath: /state}]}
  containers:
  - {name: last, image: busybox, command: [cat, /state/order], volumeMounts: [{name: state, mountPath: /state}]}
";
    let path = hull.manifest("ordered.yaml", manifest);

    let output = hull.run(["run".as_ref(), path.as_os_str()]);

    hull_tests::hull::assert_success(&output, "hull run");
    let printed = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = printed.lines().filter(|l| l.contains("last")).collect();
    assert_eq!(lines.len(), 2, "{printed}");
    assert!(
        lines[0].ends_with("first") && lines[1].ends_with("second"),
        "{printed}"
    );
}

#[test]
fn sysctls_are_the_pods_own_before_any_container() {
    let hull = Hull::new();
    let settings = [
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.sem", "300 32000 100 200"),
        ("fs.mqueue.msg_max", "20"),
        ("net.ipv4.ip_unprivileged_port_start", "80"),
        ("net.ipv4.conf.eth0.forwarding", "1"),
        ("net.ipv6.conf.eth0.accept_dad", "0"),
    ];
    let list: String = settings
        .iter()
        .map(|(name, value)| format!("    - {{name: {name}, value: {value:?}}}\n"))
        .collect();
    let rest = format!(
        "  securityContext:\n    sysctls:\n{list}  initContainers:\n  - {{name: early, image: busybox, command: [cat, /proc/sys/kernel/shm_rmid_forced]}}\n"
    );
    let pod = Pod::start(&hull, "tuned", &sleepers("tuned", &[("one", "")], &rest));

    for (name, value) in settings {
        let path = format!("cat /proc/sys/{} | tr '\\t' ' '", name.replace('.', "/"));
        assert_eq!(pod.sh("one", &path), value, "{name}");
    }
    assert_eq!(pod.logs("early"), "1\n");
    // Nobody on the network gives the pod addresses or routes.
    for setting in ["accept_ra", "autoconf"] {
        let path = format!("cat /proc/sys/net/ipv6/conf/eth0/{setting}");
        assert_eq!(pod.sh("one", &path), "0", "{setting}");
    }
}

#[test]
fn sysctls_that_are_not_the_pods_are_refused() {
    let hull = Hull::new();
    let run = |name: &str, sysctl: &str| {
        let rest = format!("  securityContext:\n    sysctls: [{{name: {sysctl}, value: \"1\"}}]\n");
        let manifest = sleepers(name, &[("one", "")], &rest);
        let path = hull.manifest("sysctl.yaml", &manifest);
        let output = hull.run(["run".as_ref(), "-d".as_ref(), path.as_os_str()]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };

    let (code, said) = run("global", "kernel.panic");
    assert_eq!(code, Some(2), "{said}");
    let place = "spec.securityContext.sysctls[0].name: \"kernel.panic\": belongs to no namespace";
    assert!(said.contains(place), "{said}");

    let (code, said) = run("nowhere", "net.ipv4.conf.eth9.forwarding");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("of interface eth9"), "{said}");
}
