//! The program as containerd runs it, up to where a machine would be needed. Needs root, for namespaces of its own.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

mod bundle;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use bundle::{Bundle, LONG, client, runs, until};
use containerd_shim_protos::api::{CreateTaskRequest, ShutdownRequest};
use ttrpc::context;

fn spec(namespaces: &str) -> String {
    format!(
        r#"{{"ociVersion":"1.0.2","process":{{"args":["sh"],"cwd":"/","user":{{"uid":0,"gid":0}}}},
            "root":{{"path":"rootfs"}},"linux":{{"namespaces":[{namespaces}]}}}}"#
    )
}

fn namespace(pid: &str, name: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap()
}

#[tokio::test]
async fn a_shim_is_found_again_and_goes_when_it_is_told() {
    let bundle = Bundle::new("alone", &spec(r#"{"type":"network"}"#));

    let address = bundle.start();
    let pid = bundle.pid();
    let again = bundle.start();

    assert_eq!((&again, bundle.pid()), (&address, pid.clone()));
    assert_ne!(namespace(&pid, "net"), namespace("self", "net"));
    assert_ne!(namespace(&pid, "mnt"), namespace("self", "mnt"));
    let client = client(&address).await;
    // The answer may be lost with the shim.
    let _ = client
        .shutdown(context::with_duration(LONG), &ShutdownRequest::default())
        .await;
    until(|| !runs(&pid) && !Path::new(&address).exists());
}

#[test]
fn a_shim_that_hangs_is_deleted() {
    let bundle = Bundle::new("alone", &spec(r#"{"type":"network"}"#));
    let address = bundle.start();
    let pid = bundle.pid();

    assert_eq!(bundle.delete(), 137);

    until(|| !runs(&pid));
    assert!(!Path::new(&address).exists());
    assert_eq!(bundle.delete(), 137);
}

#[test]
fn a_shim_that_does_not_start_says_why() {
    let missing = spec(r#"{"type":"network","path":"/nowhere/netns"}"#);
    let bundle = Bundle::new("alone", &missing);

    let output = bundle.try_start();

    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(said.contains("/nowhere/netns"), "{said}");
}

#[test]
fn a_container_of_a_sandbox_without_a_shim_is_refused() {
    let spec = r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.container-type":"container",
        "io.kubernetes.cri.sandbox-id":"gone"}}"#;
    let bundle = Bundle::new("one", spec);

    let output = bundle.try_start();

    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.contains("gone"), "{said}");
}

#[tokio::test]
async fn the_hosts_network_is_refused_where_a_user_sees_it() {
    let bundle = Bundle::new("alone", &spec(r#"{"type":"pid"}"#));
    let address = bundle.start();
    let client = client(&address).await;
    let create = CreateTaskRequest {
        id: "alone".into(),
        bundle: bundle.path().display().to_string(),
        ..Default::default()
    };

    let refused = client.create(context::with_duration(LONG), &create).await;

    let message = refused.unwrap_err().to_string();
    assert!(message.contains("hostNetwork"), "{message}");
    let mut log = vec![0; 4096];
    let path = bundle.path().join("log");
    let logged = tokio::task::spawn_blocking(move || {
        let length = File::open(path).unwrap().read(&mut log).unwrap();
        String::from_utf8_lossy(&log[..length]).into_owned()
    });
    assert!(logged.await.unwrap().contains("did not start"));
}
