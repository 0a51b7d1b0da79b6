//! A service mesh's sidecar: all TCP of a pod goes through a proxy, and nobody knows.

use std::net::SocketAddr;

use hull_tests::hull::Hull;
use hull_tests::network::{get, host_network};
use hull_tests::pod::Pod;

const PORT: u16 = 18090;
const REQUESTS: usize = 20;

fn meshed() -> String {
    let files = concat!(env!("CARGO_MANIFEST_DIR"), "/pods/mesh");
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: meshed}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes:
  - {{name: mesh, hostPath: {{path: {files}, type: Directory}}}}
  initContainers:
  - name: redirect
    image: network
    command: [/mesh/redirect]
    securityContext: {{capabilities: {{add: [NET_ADMIN]}}}}
    volumeMounts: [{{name: mesh, mountPath: /mesh, readOnly: true}}]
  containers:
  - name: proxy
    image: network
    command: [haproxy, -W, -db, -f, /mesh/haproxy.cfg]
    securityContext: {{runAsUser: 1337}}
    volumeMounts: [{{name: mesh, mountPath: /mesh, readOnly: true}}]
  - name: app
    image: network
    command: [sh, -c, 'mkdir /tmp/www; echo from the app > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www']
    securityContext: {{runAsUser: 1000}}
    ports: [{{containerPort: 8080, hostPort: {PORT}}}]
"
    )
}

const PLAIN: &str = "apiVersion: v1
kind: Pod
metadata: {name: plain}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: network
    command: [sh, -c, 'mkdir /tmp/www; echo from outside > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www']
";

/// Asks so many times, and says what came each time.
fn ask(pod: &Pod, name: &str, times: usize) -> String {
    let script = format!(
        "curl --silent --show-error --max-time 60 --header 'Connection: close' 'http://{name}:8080/?[1-{times}]'"
    );
    pod.sh("app", &script)
}

/// Connections that a frontend of the proxy has had.
fn sessions(pod: &Pod, frontend: &str) -> usize {
    let table = pod.sh("proxy", "echo show stat | socat - UNIX:/tmp/haproxy.sock");
    let column = |line: &str, name: &str| {
        let names = table.lines().next().unwrap().trim_start_matches("# ");
        let place = names.split(',').position(|n| n == name).unwrap();
        line.split(',').nth(place).unwrap().to_owned()
    };
    let line = table
        .lines()
        .find(|line| line.starts_with(&format!("{frontend},FRONTEND,")))
        .unwrap_or_else(|| panic!("{frontend} in {table}"));
    column(line, "stot").parse().unwrap()
}

#[test]
fn all_goes_through_the_sidecar() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let meshed = Pod::start(&hull, "meshed", &meshed());
    let plain = Pod::start(&hull, "plain", PLAIN);

    let inbound = ask(&plain, "meshed", REQUESTS);
    let outbound = ask(&meshed, "plain", REQUESTS);
    let published: Vec<String> = (0..REQUESTS)
        .map(|_| {
            get(SocketAddr::from(([127, 0, 0, 1], PORT)), "/")
                .unwrap()
                .body
        })
        .collect();

    assert_eq!(inbound, vec!["from the app"; REQUESTS].join("\n"));
    assert_eq!(outbound, vec!["from outside"; REQUESTS].join("\n"));
    assert_eq!(published, vec!["from the app\n"; REQUESTS]);
    assert_eq!(sessions(&meshed, "inbound"), 2 * REQUESTS);
    assert_eq!(sessions(&meshed, "outbound"), REQUESTS);

    // Nothing finds another way.
    let _ = meshed.exec("proxy", "kill 1; sleep 100000");
    let refused = |pod: &Pod, name: &str| {
        let output = pod.exec(
            "app",
            &format!("curl --silent --max-time 60 http://{name}:8080/"),
        );
        // Couldn't connect.
        assert_eq!(output.status.code(), Some(7), "{output:?}");
    };
    refused(&plain, "meshed");
    refused(&meshed, "plain");
}
