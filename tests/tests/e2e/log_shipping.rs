//! A sidecar ships the lines of a shared volume to a search engine's bulk endpoint on the host.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::Hull;
use hull_tests::network::host_network;
use hull_tests::pod::Pod;

const LINES: usize = 2000;

fn shipping(port: u16) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: shipping}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes: [{{name: logs, emptyDir: {{}}}}]
  containers:
  - name: app
    image: network
    command:
    - sh
    - -c
    - for i in $(seq {LINES}); do echo \"line $i\"; [ $((i % 100)) != 0 ] || sleep 0.2; done > /logs/log; exec sleep 100000
    volumeMounts: [{{name: logs, mountPath: /logs}}]
  - name: shipper
    image: network
    command: [sh, -c, \"exec ship /logs/log http://$(ip route | sed -n 's/^default via \\\\([^ ]*\\\\).*/\\\\1/p'):{port}/_bulk\"]
    volumeMounts: [{{name: logs, mountPath: /logs, readOnly: true}}]
"
    )
}

/// Documents by their id, each with how often it came.
type Documents = Arc<Mutex<BTreeMap<u64, Vec<String>>>>;

/// A bulk endpoint that turns down every fifth request, as a busy one does.
fn endpoint(listener: TcpListener, documents: Documents) {
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let refuse = number % 5 == 1;
            answer(stream.unwrap(), refuse, &documents);
        }
    });
}

fn answer(mut stream: TcpStream, refuse: bool, documents: &Documents) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    let field = |name: &str| {
        head.lines()
            .find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix(name)
                    .map(str::to_owned)
            })
            .unwrap_or_default()
    };
    assert!(head.starts_with("POST /_bulk "), "{head}");
    assert_eq!(field("content-type: "), "application/x-ndjson", "{head}");
    if field("expect: ") == "100-continue" {
        write!(stream, "HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    }
    let mut body = vec![0; field("content-length: ").parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    if refuse {
        let _ = write!(
            stream,
            "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        return;
    }
    let lines: Vec<serde_json::Value> = body
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    for pair in lines.chunks(2) {
        let id = pair[0]["create"]["_id"].as_str().unwrap().parse().unwrap();
        let message = pair[1]["message"].as_str().unwrap().to_owned();
        let mut documents = documents.lock().unwrap();
        documents.entry(id).or_default().push(message);
    }
    let told = r#"{"errors":false,"items":[]}"#;
    let _ = write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{told}",
        told.len()
    );
}

#[test]
fn every_line_arrives_once() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let documents = Documents::default();
    endpoint(listener, Arc::clone(&documents));
    let _pod = Pod::start(&hull, "shipping", &shipping(port));

    eventually("all lines have come", Duration::from_secs(12), || {
        (documents.lock().unwrap().len() >= LINES).then_some(())
    });
    // One that comes twice may come late.
    std::thread::sleep(Duration::from_secs(1));

    let documents = documents.lock().unwrap();
    let messages: Vec<&String> = documents.values().flatten().collect();
    let expected: Vec<String> = (1..=LINES).map(|n| format!("line {n}")).collect();
    assert_eq!(messages, expected.iter().collect::<Vec<_>>());
}
