//! A pod stands still and goes on, and its connections don't notice.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hull_tests::hull::Hull;
use hull_tests::pod::Pod;
use hull_tests::{eventually, scaled};

/// Answers with what it is sent, and counts in its log.
const ECHO: &str = "apiVersion: v1
kind: Pod
metadata: {name: echo}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: echo
    image: busybox
    command: [nc, -ll, -p, '7', -e, cat]
  - name: count
    image: busybox
    command: [sh, -c, \"trap 'echo bye; exit' TERM; n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done\"]
";

fn echoes(connection: &mut TcpStream, text: &[u8]) {
    connection.write_all(text).unwrap();
    let mut answer = vec![0; text.len()];
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

#[test]
fn connections_outlast_a_pause() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "echo", ECHO);
    let ip = pod.inspect()["status"]["podIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    let mut connection = eventually("the pod answers", Duration::from_secs(10), || {
        TcpStream::connect((ip.as_str(), 7)).ok()
    });
    connection
        .set_read_timeout(Some(scaled(Duration::from_secs(10))))
        .unwrap();
    echoes(&mut connection, b"before");

    let _ = hull.ok(["pause", "echo"]);
    let _ = hull.ok(["pause", "echo"]);
    assert!(hull.ok(["ps"]).contains("Paused"));
    let counted = pod.logs("count");
    connection.write_all(b"meanwhile").unwrap();
    let refused = hull.run(["exec", "echo", "-c", "count", "--", "true"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("hull resume echo"));
    std::thread::sleep(Duration::from_secs(1));
    // What was on its way when the processors stopped has arrived by the first look or the second.
    assert!(pod.logs("count").len() <= counted.len() + 8);

    let _ = hull.ok(["resume", "echo"]);
    let mut answer = [0; 9];
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"meanwhile");
    echoes(&mut connection, b"after");
    assert_eq!(
        pod.sh("count", "echo of old and new connections"),
        "of old and new connections"
    );
    eventually("it counts on", Duration::from_secs(5), || {
        (pod.logs("count").len() > counted.len() + 8).then_some(())
    });
}

#[test]
fn a_paused_pod_is_stopped_in_order() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "echo", ECHO);
    // What its shell has no trap for yet, a process 1 doesn't even notice.
    eventually("it counts", Duration::from_secs(10), || {
        (!pod.logs("count").is_empty()).then_some(())
    });
    let _ = hull.ok(["pause", "echo"]);

    let _ = hull.ok(["stop", "echo"]);

    assert!(
        pod.logs("count").ends_with("bye\n"),
        "{}",
        pod.logs("count")
    );
}
