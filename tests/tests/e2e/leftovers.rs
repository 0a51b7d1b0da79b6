//! What is left of a pod's network on the host, however the pod ends: nothing.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use hull_tests::hull::Hull;
use hull_tests::network::{host_network, traces};
use hull_tests::pod::Pod;
use hull_tests::{eventually, host, scaled};

const PORT: u16 = 18110;

/// A pod that answers at a published port, and may crash its kernel.
fn answering() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: answering}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: busybox
    command: [sh, -c, 'mkdir /tmp/www; echo here > /tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www']
    securityContext: {{capabilities: {{add: [SYS_ADMIN]}}, seccompProfile: {{type: Unconfined}}}}
    ports: [{{containerPort: 80, hostPort: {PORT}}}]
"
    )
}

fn start(hull: &Hull) -> Pod<'_> {
    let pod = Pod::start(hull, "answering", &answering());
    let server = SocketAddr::from(([127, 0, 0, 1], PORT));
    eventually("the pod answers", Duration::from_secs(3), || {
        let answer = hull_tests::network::get(server, "/").ok()?;
        (answer.body == "here\n").then_some(())
    });
    pod
}

fn differences(before: &[String], after: &[String]) -> Vec<String> {
    let only = |a: &[String], b: &[String], sign: &str| -> Vec<String> {
        let here = a.iter().filter(|line| !b.contains(line));
        here.map(|line| format!("{sign} {line}")).collect()
    };
    [only(after, before, "+"), only(before, after, "-")].concat()
}

#[test]
fn nothing_is_left_of_a_pods_network() {
    let _host = host_network();
    let hull = Hull::with_images(&["busybox"]);
    // netavark keeps the chains that its rules are in: the first pod's end is where to begin.
    let pod = start(&hull);
    let during = traces(&hull);
    pod.stop();
    drop(pod);
    let clean = traces(&hull);
    let there = |what: &str| {
        differences(&clean, &during)
            .iter()
            .any(|line| line.starts_with(what))
    };
    for what in [
        "+ interface: ",
        "+ iptables-save: ",
        "+ namespace: ",
        "+ process: aardvark-dns",
        "+ file: ",
    ] {
        assert!(
            there(what),
            "{what:?} in {:#?}",
            differences(&clean, &during)
        );
    }
    let is_clean = |how: &str| {
        let mut left = Vec::new();
        eventually(how, Duration::from_secs(2), || {
            let now = differences(&clean, &traces(&hull));
            if now != left {
                eprintln!("{how}: {now:#?}");
                left = now;
            }
            left.is_empty().then_some(())
        });
        let port = SocketAddr::from(([127, 0, 0, 1], PORT));
        assert!(TcpStream::connect_timeout(&port, scaled(Duration::from_secs(1))).is_err());
    };
    let remove = || {
        let _ = hull.ok(["rm", "--force", "answering"]);
    };

    let pod = start(&hull);
    host::kill_9(pod.pid("vmmPid"));
    pod.wait_phase("Failed", Duration::from_secs(3));
    remove();
    is_clean("after hull-vmm was killed");

    let pod = start(&hull);
    host::kill_9(pod.pid("supervisorPid"));
    let vmm = pod.pid("vmmPid");
    eventually("hull-vmm ends", Duration::from_secs(3), || {
        (!host::is_alive(vmm)).then_some(())
    });
    remove();
    is_clean("after the supervisor was killed, by hull rm");

    let pod = start(&hull);
    host::kill_9(pod.pid("supervisorPid"));
    eventually("hull gc finds it", Duration::from_secs(3), || {
        (!hull.ok(["gc"]).is_empty()).then_some(())
    });
    is_clean("after the supervisor was killed, by hull gc");

    let pod = start(&hull);
    let _ = pod.exec(
        "main",
        "mkdir /p; mount -t proc proc /p; echo c > /p/sysrq-trigger",
    );
    pod.wait_phase("Failed", Duration::from_secs(3));
    remove();
    is_clean("after the guest's kernel panicked");

    // And the name, the address and the port are there for the next.
    let _last = start(&hull);
}

/// How many, one after another; `HULL_TEST_PODS` says otherwise.
const MANY: usize = 10;

#[test]
fn many_pods_leave_nothing() {
    let _host = host_network();
    let hull = Hull::with_images(&["busybox"]);
    let many = std::env::var("HULL_TEST_PODS").map_or(MANY, |many| many.parse().expect("a number"));
    drop(start(&hull));
    let clean = traces(&hull);

    for number in 0..many {
        let pod = start(&hull);
        if number % 2 == 0 {
            pod.stop();
        }
        drop(pod);
    }

    let mut left = Vec::new();
    eventually("nothing is left", Duration::from_secs(2), || {
        let now = differences(&clean, &traces(&hull));
        if now != left {
            eprintln!("after {many} pods: {now:#?}");
            left = now;
        }
        left.is_empty().then_some(())
    });
}
