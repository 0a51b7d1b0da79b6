//! A bundle, and the shim that is started for it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use rustix::fs::{CWD, FileType, Mode};

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-hull-v2");
pub const LONG: Duration = Duration::from_secs(20);

/// A bundle, as containerd 2.3 has it; that one says where sockets are to be.
pub struct Bundle {
    root: tempfile::TempDir,
    pub id: &'static str,
    /// The shim's, beside this process's own.
    pub environment: Vec<(&'static str, PathBuf)>,
}

impl Bundle {
    pub fn new(id: &'static str, spec: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let bundle = Self {
            root,
            id,
            environment: vmm().into_iter().collect(),
        };
        fs::create_dir_all(bundle.path().join("rootfs")).unwrap();
        fs::write(bundle.path().join("config.json"), spec).unwrap();
        for name in ["log", "stdin", "stdout"] {
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(CWD, bundle.path().join(name), FileType::Fifo, mode, 0).unwrap();
        }
        let publisher = format!(
            "#!/bin/sh\necho $5 >>{}\ncat >/dev/null\n",
            bundle.told().display()
        );
        fs::write(bundle.publisher(), publisher).unwrap();
        fs::set_permissions(bundle.publisher(), fs::Permissions::from_mode(0o755)).unwrap();
        bundle
    }

    /// containerd's program, as far as it publishes.
    fn publisher(&self) -> PathBuf {
        self.root.path().join("publisher")
    }

    /// A file with the topics of the events so far.
    pub fn told(&self) -> PathBuf {
        self.root.path().join("told")
    }

    pub fn path(&self) -> PathBuf {
        self.root.path().join("bundle")
    }

    fn sockets(&self) -> PathBuf {
        self.root.path().join("s")
    }

    pub fn run(&self, action: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(PROGRAM)
            // A bundle is the only pod there is.
            .env("HULL_TEMPLATES", "off")
            .args(["-namespace", "default", "-id", self.id])
            .args(["-address", "/nowhere", "-publish-binary"])
            .arg(self.publisher())
            .args(action)
            .envs(self.environment.iter().cloned())
            .current_dir(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    pub fn try_start(&self) -> Output {
        let params = BootstrapParams {
            instance_id: self.id.into(),
            namespace: "default".into(),
            socket_dir: Some(self.sockets().display().to_string()),
            ..Default::default()
        };
        self.run(&["start"], &params.write_to_bytes().unwrap())
    }

    /// The shim's address, without `unix://`.
    pub fn start(&self) -> String {
        let output = self.try_start();
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        let written = fs::read_to_string(self.path().join("address")).unwrap();
        assert_eq!(result.address, written);
        written.strip_prefix("unix://").unwrap().to_owned()
    }

    pub fn pid(&self) -> String {
        fs::read_to_string(self.path().join("shim.pid")).unwrap()
    }

    pub fn delete(&self) -> u32 {
        let path = self.path().display().to_string();
        let output = self.run(&["-bundle", &path, "delete"], &[]);
        assert!(output.status.success(), "{output:?}");
        DeleteResponse::parse_from_bytes(&output.stdout)
            .unwrap()
            .exit_status
    }
}

/// Where `hull-vmm` is, which is of another build than this program.
fn vmm() -> Option<(&'static str, PathBuf)> {
    let path = std::env::var_os("PATH")?;
    let mut places = std::env::split_paths(&path).map(|place| place.join("hull-vmm"));
    Some(("HULL_VMM", places.find(|place| place.exists())?))
}

/// A test that fails leaves no shim.
impl Drop for Bundle {
    fn drop(&mut self) {
        self.delete();
    }
}

pub async fn client(address: &str) -> TaskClient {
    let address = format!("unix://{address}");
    TaskClient::new(Client::connect(&address).await.unwrap())
}

pub fn runs(pid: &str) -> bool {
    // A zombie has no program any more.
    fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

pub fn until(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(10));
    }
}
