//! What a pod sends is limited as its annotation says.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use hull_tests::eventually;
use hull_tests::hull::Hull;
use hull_tests::pod::Pod;

/// Sends 1 MiB to whoever connects. Without the limit that takes no second.
const SENDER: &str = "apiVersion: v1
kind: Pod
metadata:
  name: sender
  annotations: {kubernetes.io/egress-bandwidth: 2M}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: send
    image: busybox
    command: [nc, -ll, -p, '9', -e, dd, if=/dev/zero, bs=64k, count=16]
";

#[test]
fn a_pod_sends_no_more_than_its_bandwidth() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "sender", SENDER);
    let ip = pod.inspect()["status"]["podIP"]
        .as_str()
        .expect("an address")
        .to_owned();
    let mut connection = eventually("the pod answers", Duration::from_secs(10), || {
        TcpStream::connect((ip.as_str(), 9)).ok()
    });
    let begun = Instant::now();

    let mut received = Vec::new();
    connection.read_to_end(&mut received).unwrap();

    assert_eq!(received.len(), 1 << 20);
    // 8 Mibit, less what may go at once.
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(3), "{took:?}");
}
