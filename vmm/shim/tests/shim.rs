//! The program as containerd runs it, up to where a machine would be needed. Needs root, for namespaces of its own.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteResponse, ShutdownRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use rustix::fs::{CWD, FileType, Mode};
use ttrpc::context;

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-hull-v2");
const LONG: Duration = Duration::from_secs(20);

/// A bundle, as containerd 2.3 has it; that one says where sockets are to be.
struct Bundle {
    root: tempfile::TempDir,
    id: &'static str,
}

impl Bundle {
    fn new(id: &'static str, spec: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let bundle = Self { root, id };
        fs::create_dir(bundle.path()).unwrap();
        fs::write(bundle.path().join("config.json"), spec).unwrap();
        let log = bundle.path().join("log");
        rustix::fs::mknodat(CWD, log, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        bundle
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("bundle")
    }

    fn sockets(&self) -> PathBuf {
        self.root.path().join("s")
    }

    fn run(&self, action: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(PROGRAM)
            .args(["-namespace", "default", "-id", self.id])
            .args(["-address", "/nowhere", "-publish-binary", "/bin/false"])
            .args(action)
            .current_dir(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn try_start(&self) -> Output {
        let params = BootstrapParams {
            instance_id: self.id.into(),
            namespace: "default".into(),
            socket_dir: Some(self.sockets().display().to_string()),
            ..Default::default()
        };
        self.run(&["start"], &params.write_to_bytes().unwrap())
    }

    /// The shim's address, without `unix://`.
    fn start(&self) -> String {
        let output = self.try_start();
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        let written = fs::read_to_string(self.path().join("address")).unwrap();
        assert_eq!(result.address, written);
        written.strip_prefix("unix://").unwrap().to_owned()
    }

    fn pid(&self) -> String {
        fs::read_to_string(self.path().join("shim.pid")).unwrap()
    }

    fn delete(&self) -> u32 {
        let path = self.path().display().to_string();
        let output = self.run(&["-bundle", &path, "delete"], &[]);
        assert!(output.status.success(), "{output:?}");
        DeleteResponse::parse_from_bytes(&output.stdout)
            .unwrap()
            .exit_status
    }

    fn spec(namespaces: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.0.2","process":{{"args":["sh"],"cwd":"/","user":{{"uid":0,"gid":0}}}},
                "root":{{"path":"rootfs"}},"linux":{{"namespaces":[{namespaces}]}}}}"#
        )
    }
}

/// A test that fails leaves no shim.
impl Drop for Bundle {
    fn drop(&mut self) {
        self.delete();
    }
}

async fn client(address: &str) -> TaskClient {
    let address = format!("unix://{address}");
    TaskClient::new(Client::connect(&address).await.unwrap())
}

fn runs(pid: &str) -> bool {
    // A zombie has no program any more.
    fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

fn until(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn namespace(pid: &str, name: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap()
}

#[tokio::test]
async fn a_shim_is_found_again_and_goes_when_it_is_told() {
    let bundle = Bundle::new("alone", &Bundle::spec(r#"{"type":"network"}"#));

    let address = bundle.start();
    let pid = bundle.pid();
    let again = bundle.start();

    assert_eq!((&again, bundle.pid()), (&address, pid.clone()));
    assert_ne!(namespace(&pid, "net"), namespace("self", "net"));
    assert_ne!(namespace(&pid, "mnt"), namespace("self", "mnt"));
    let client = client(&address).await;
    let connect = ConnectRequest::default();
    let connected = client
        .connect(context::with_duration(LONG), &connect)
        .await
        .unwrap();
    assert_eq!(connected.shim_pid.to_string(), pid);
    // The answer may be lost with the shim.
    let _ = client
        .shutdown(context::with_duration(LONG), &ShutdownRequest::default())
        .await;
    until(|| !runs(&pid) && !Path::new(&address).exists());
}

#[test]
fn a_shim_that_hangs_is_deleted() {
    let bundle = Bundle::new("alone", &Bundle::spec(r#"{"type":"network"}"#));
    let address = bundle.start();
    let pid = bundle.pid();

    assert_eq!(bundle.delete(), 137);

    until(|| !runs(&pid));
    assert!(!Path::new(&address).exists());
    assert_eq!(bundle.delete(), 137);
}

#[test]
fn a_shim_that_does_not_start_says_why() {
    let missing = Bundle::spec(r#"{"type":"network","path":"/nowhere/netns"}"#);
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
    let bundle = Bundle::new("alone", &Bundle::spec(r#"{"type":"pid"}"#));
    let address = bundle.start();
    let client = client(&address).await;
    let create = CreateTaskRequest {
        id: "alone".into(),
        bundle: bundle.path().display().to_string(),
        ..Default::default()
    };

    let refused = client.create(context::with_duration(LONG), &create).await;

    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("network") || message.contains("hull-vmm"),
        "{message}"
    );
    let mut log = vec![0; 4096];
    let path = bundle.path().join("log");
    let logged = tokio::task::spawn_blocking(move || {
        let length = File::open(path).unwrap().read(&mut log).unwrap();
        String::from_utf8_lossy(&log[..length]).into_owned()
    });
    assert!(logged.await.unwrap().contains("did not start"));
}
