//! A containerd of a test's own: the real one, whose runtime `io.containerd.hull.v2` is the shim that was built.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::hull::{assert_success, image};
use crate::{eventually, host, scaled};

/// The runtime that the shim is.
pub const HULL: &str = "io.containerd.hull.v2";
/// Where shims listen.
const SOCKETS: &str = "/run/containerd/s";
const CGROUPS: &str = "/sys/fs/cgroup";
/// containerd's namespace for what comes by CRI.
const CRI_NAMESPACE: &str = "k8s.io";
/// The longest that anything may take that `ctr` is asked for.
const LIMIT: Duration = Duration::from_secs(30);

/// A containerd that ends with its test, and all that it has started with it.
#[derive(Debug)]
pub struct Containerd {
    /// Sockets, configuration, state: its path is short.
    run: TempDir,
    /// Images and snapshots, where overlayfs can be.
    data: TempDir,
    daemon: Option<Child>,
    environment: Vec<(String, String)>,
    name: String,
    bridge: String,
    /// Its pods have the addresses 10.88.N.0/24.
    subnet: u8,
}

impl Containerd {
    /// With the images `busybox` and `pause`, for `ctr` and for CRI.
    ///
    /// # Panics
    /// When it doesn't start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with more variables in its environment, which its shims have from it.
    ///
    /// # Panics
    /// When it doesn't start.
    #[must_use]
    pub fn start_with(environment: &[(&str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all("/var/lib/hull").expect("/var/lib is writable");
        let run = tempfile::Builder::new().prefix("ht-").tempdir_in("/run");
        let run = run.expect("/run is writable");
        let data = tempfile::tempdir_in("/var/lib/hull").expect("/var/lib/hull is writable");
        let name = run.path().file_name().expect("a name");
        let name = name.to_string_lossy().to_lowercase();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let subnet = std::process::id().wrapping_add(count) % 250;
        let mut containerd = Self {
            bridge: format!("{}{count}", name.replace("ht-", "ht")),
            name,
            subnet: u8::try_from(subnet).expect("less than 250"),
            run,
            data,
            daemon: None,
            environment: environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        };
        containerd.configure();
        containerd.launch();
        for image in ["busybox", "pause"] {
            containerd.import(image);
        }
        containerd
    }

    fn configure(&self) {
        let (run, data) = (self.run.path().display(), self.data.path().display());
        let configuration = format!(
            r#"version = 2
root = "{data}/root"
state = "{run}/state"
disabled_plugins = [
    "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
    "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
address = "{run}/c"
[debug]
level = "info"
[plugins."io.containerd.internal.v1.opt"]
path = "{data}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "docker.io/library/pause:latest"
stream_server_address = "127.0.0.1"
stream_server_port = "0"
disable_apparmor = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "hull"
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.hull]
runtime_type = "{HULL}"
privileged_without_host_devices = true
pod_annotations = ["*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{run}/cni"
"#
        );
        let network = serde_json::json!({
            "cniVersion": "0.4.0",
            "name": self.name,
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": self.bridge,
                    "isGateway": true,
                    "hairpinMode": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": self.run.path().join("ipam"),
                        "ranges": [[{"subnet": format!("10.88.{}.0/24", self.subnet)}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
            ],
        });
        fs::create_dir_all(self.run.path().join("cni")).expect("/run is writable");
        for (name, text) in [
            ("config.toml", configuration),
            ("cni/10-test.conflist", network.to_string()),
        ] {
            fs::write(self.run.path().join(name), text).expect("/run is writable");
        }
    }

    fn launch(&mut self) {
        let log = File::options().create(true).append(true).open(self.log());
        let log = log.expect("/run is writable");
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(self.run.path().join("config.toml"))
            // What a test sees must not depend on which pods came before.
            .env("HULL_TEMPLATES", "off")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("descriptors are left"))
            .stderr(log)
            .spawn()
            .expect("containerd is installed");
        self.daemon = Some(daemon);
        eventually("containerd answers", LIMIT, || {
            self.ctr(&["version"]).status.success().then_some(())
        });
    }

    /// An image that `scripts/test` has made.
    ///
    /// # Panics
    /// When containerd doesn't take it.
    pub fn import(&self, name: &str) {
        let archive = image(name);
        for namespace in [&*self.name, CRI_NAMESPACE] {
            let mut command = self.command(namespace);
            command.args(["images", "import"]).arg(&archive);
            let output = command.output().expect("ctr is installed");
            assert_success(&output, &format!("ctr images import {name}"));
        }
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run.path().join("c")
    }

    /// What it and its shims have logged.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.run.path().join("log")
    }

    /// A directory for what a test makes, which goes with containerd.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn work_dir(&self) -> PathBuf {
        let work = self.run.path().join("work");
        fs::create_dir_all(&work).expect("/run is writable");
        work
    }

    /// The namespace for [`Self::ctr`], and the cgroup beneath which the test's pods are: nobody else's.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host's own address on the pods' network.
    #[must_use]
    pub fn gateway(&self) -> String {
        format!("10.88.{}.1", self.subnet)
    }

    /// The name of the pods' bridge on the host.
    #[must_use]
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// A bundle's directory, while its container has a task.
    #[must_use]
    pub fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        self.tasks_dir().join(namespace).join(id)
    }

    fn tasks_dir(&self) -> PathBuf {
        self.run.path().join("state/io.containerd.runtime.v2.task")
    }

    /// The shim's process of a container, by what it has written into the bundle.
    #[must_use]
    pub fn shim(&self, namespace: &str, id: &str) -> Option<i32> {
        let file = self.bundle(namespace, id).join("shim.pid");
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    /// `ctr` with these arguments, ended after a time; not started yet.
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&self.name);
        command.args(arguments);
        command
    }

    fn command(&self, namespace: &str) -> Command {
        let mut command = Command::new("timeout");
        let limit = scaled(LIMIT).as_secs().to_string();
        command
            .args(["--foreground", "--kill-after=5", &limit, "ctr"])
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", namespace])
            .stdin(Stdio::null());
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Output {
        let output = self.ctr_command(arguments).output();
        output.expect("ctr is installed")
    }

    /// Runs `ctr`, which must succeed, and returns its output.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.ctr(arguments);
        assert_success(&output, &format!("ctr {arguments:?}"));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `ctr run` of the `busybox` image; `flags` come before the container's name, `program` after it.
    #[must_use]
    pub fn run_command(&self, flags: &[&str], id: &str, program: &[&str]) -> Command {
        let mut command = self.ctr_command(&["run", "--runtime", HULL]);
        command
            .args(flags)
            .args(["docker.io/library/busybox:latest", id])
            .args(program);
        command
    }

    /// The same, to its end.
    ///
    /// # Panics
    /// When there is no `ctr`.
    #[must_use]
    pub fn run(&self, flags: &[&str], id: &str, program: &[&str]) -> Output {
        let output = self.run_command(flags, id, program).output();
        output.expect("ctr is installed")
    }

    /// Kills containerd itself, which has no time to tell anybody.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn kill9(&mut self) {
        let mut daemon = self.daemon.take().expect("containerd runs");
        daemon.kill().expect("it is ours");
        daemon.wait().expect("it is a child");
    }

    /// Starts it again, after [`Self::kill9`] or while it runs.
    ///
    /// # Panics
    /// When it doesn't start.
    pub fn restart(&mut self) {
        self.stop();
        self.launch();
    }

    fn stop(&mut self) {
        let Some(mut daemon) = self.daemon.take() else {
            return;
        };
        if let Ok(pid) = i32::try_from(daemon.id()) {
            host::signal(pid, Signal::TERM);
        }
        for _ in 0..scaled(Duration::from_secs(10)).as_secs() * 10 {
            if !matches!(daemon.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let _ = daemon.kill();
        let _ = daemon.wait();
    }

    /// What there is on the host of pods: processes, mounts, bundles, cgroups, sockets, interfaces.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let mut left = self.processes();
        left.extend(host::mounts_under(self.run.path()));
        for directory in children(&self.tasks_dir()) {
            left.extend(shown(children(&directory)));
        }
        let bridge = Path::new("/sys/class/net").join(&self.bridge).join("brif");
        left.extend(shown(children(&bridge)));
        left.extend(shown(self.cgroups()));
        left.extend(shown(dead_sockets()));
        left
    }

    /// # Panics
    /// When something of a pod stays; see [`Self::left`].
    pub fn nothing_left(&self) {
        let mut left = Vec::new();
        for _ in 0..scaled(Duration::from_secs(2)).as_secs() * 4 {
            left = self.left();
            if left.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        panic!("left on the host:\n{}", left.join("\n"));
    }

    /// Processes that name this containerd, but for itself and the tests.
    fn processes(&self) -> Vec<String> {
        let daemon = self.daemon.as_ref().map(Child::id).unwrap_or_default();
        let itself = format!("{daemon}: ");
        let mut processes = host::processes_of(self.run.path());
        processes.retain(|process| !process.starts_with(&itself));
        processes
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let mut cgroups = children(&Path::new(CGROUPS).join(&self.name));
        cgroups.retain(|path| path.is_dir());
        cgroups
    }

    /// Takes away whatever a test that failed has left.
    fn sweep(&self) {
        for process in self.processes() {
            let pid = process.split(':').next().and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                // It may have ended meanwhile.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        for directory in [&self.run, &self.data] {
            for line in host::mounts_under(directory.path()).iter().rev() {
                if let Some(point) = line.split(' ').nth(4) {
                    let _ = unmount(point, UnmountFlags::DETACH);
                }
            }
        }
        let _ = Command::new("ip")
            .args(["link", "delete", &self.bridge])
            .stderr(Stdio::null())
            .status();
        for socket in dead_sockets() {
            let _ = fs::remove_file(socket);
        }
        // The kernel may need a moment for the processes.
        for _ in 0..20 {
            remove_cgroups(&Path::new(CGROUPS).join(&self.name));
            if self.cgroups().is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn remove_containers(&self) {
        for namespace in [CRI_NAMESPACE, &*self.name] {
            let Ok(list) = self.command(namespace).args(["task", "ls", "-q"]).output() else {
                continue;
            };
            for id in String::from_utf8_lossy(&list.stdout).lines() {
                let mut remove = self.command(namespace);
                let _ = remove.args(["task", "rm", "--force", id]).output();
            }
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            let lines: Vec<_> = log
                .lines()
                .filter(|line| !line.contains(" plugin "))
                .collect();
            let mut tail = String::new();
            for line in &lines[lines.len().saturating_sub(100)..] {
                let _ = writeln!(tail, "{line}");
            }
            let _ = write!(std::io::stderr(), "containerd's log:\n{tail}");
        }
        if self.daemon.is_some() {
            self.remove_containers();
        }
        self.stop();
        self.sweep();
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn shown(paths: Vec<PathBuf>) -> Vec<String> {
    let paths = paths.into_iter();
    paths.map(|path| path.display().to_string()).collect()
}

/// Sockets of shims at which nobody listens.
fn dead_sockets() -> Vec<PathBuf> {
    let mut sockets = children(Path::new(SOCKETS));
    sockets.retain(|path| {
        fs::metadata(path).is_ok_and(|status| status.file_type().is_socket())
            && UnixStream::connect(path).is_err()
    });
    sockets
}

fn remove_cgroups(cgroup: &Path) {
    for child in children(cgroup) {
        if child.is_dir() {
            remove_cgroups(&child);
        }
    }
    let _ = fs::remove_dir(cgroup);
}
