//! An agent to test, and what a supervisor does with it.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_agent::endpoint::Endpoint;
use hull_agent::server::Agent;
use hull_protocol::STREAM_MAGIC;
use hull_protocol::agent::{
    CreateContainerRequest, ExecRequest, GetReadyRequest, RemoveContainerRequest,
    RemoveExecRequest, SignalRequest, StartContainerRequest, StartInfraRequest, Streams,
    WaitRequest, WaitResponse,
};
use hull_protocol::agent_ttrpc::AgentClient;
use rustix::mount::{MountFlags, mount};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Value, json};
use ttrpc::context::{self, Context};

pub type Test = fn(World) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// Lists tests with their names.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub fn tests() -> Vec<(&'static str, $crate::world::Test)> {
            vec![$((stringify!($name), |world| Box::pin($name(world)))),*]
        }
    };
}

#[derive(Clone)]
pub struct World {
    pub agent: Arc<Agent>,
    pub client: AgentClient,
    pub next_stream: Arc<AtomicU64>,
    pub infra: u32,
}

/// A process's streams, our ends.
pub struct Stdio {
    pub stdin: Endpoint,
    pub stdout: Endpoint,
    pub stderr: Option<Endpoint>,
    pub numbers: Streams,
}

pub fn limit() -> Context {
    context::with_timeout(60_000_000_000)
}

pub fn socket_pair() -> (Endpoint, Endpoint) {
    let (a, b): (OwnedFd, OwnedFd) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (Endpoint::new(a).unwrap(), Endpoint::new(b).unwrap())
}

/// Everything until the end.
pub async fn read_all(endpoint: &Endpoint) -> String {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 65536];
    loop {
        match endpoint.read(&mut buffer).await.unwrap() {
            0 => return String::from_utf8(bytes).unwrap(),
            count => bytes.extend_from_slice(&buffer[..count]),
        }
    }
}

impl World {
    pub async fn new() -> Self {
        mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).expect("root");
        hull_agent::set_up_cgroups().expect("cgroup v2");
        // Before the agent reaps all children, also the listing's.
        make_root(&Self::share().join("rootfs/a"));
        fs::create_dir_all(Self::share().join("volumes/data")).unwrap();
        let run = PathBuf::from(hull_agent::RUN);
        let agent = Arc::new(Agent::start(run, Duration::ZERO).await.unwrap());
        let client = connect(&agent).await;
        get_ready(&client).await;
        let mut request = StartInfraRequest {
            hostname: "pod-1".into(),
            ..Default::default()
        };
        for (name, value) in [
            ("net.ipv4.ip_unprivileged_port_start", "0"),
            ("net.ipv4.conf.all.forwarding", "1"),
        ] {
            request.sysctls.insert(name.into(), value.into());
        }
        request
            .memory_volumes
            .push(hull_protocol::agent::MemoryVolume {
                name: "mem".into(),
                size_bytes: 1 << 20,
                ..Default::default()
            });
        let infra = client.start_infra(limit(), &request).await.unwrap().pid;
        Self {
            agent,
            client,
            next_stream: Arc::new(AtomicU64::new(1)),
            infra,
        }
    }

    pub fn share() -> PathBuf {
        Path::new(hull_agent::RUN).join("share")
    }

    /// Opens streams as the supervisor does, before the call that names them.
    pub async fn stdio(&self, tty: bool) -> Stdio {
        let (stdin, stdin_number) = self.stream().await;
        let (stdout, stdout_number) = self.stream().await;
        let mut numbers = Streams {
            tty,
            stdin: stdin_number,
            stdout: stdout_number,
            ..Default::default()
        };
        let mut stderr = None;
        if !tty {
            let (endpoint, number) = self.stream().await;
            numbers.stderr = number;
            stderr = Some(endpoint);
        }
        Stdio {
            stdin,
            stdout,
            stderr,
            numbers,
        }
    }

    pub async fn stream(&self) -> (Endpoint, u64) {
        let number = self.stream_number();
        (self.open_stream(number).await, number)
    }

    pub fn stream_number(&self) -> u64 {
        self.next_stream.fetch_add(1, Ordering::Relaxed)
    }

    pub async fn open_stream(&self, number: u64) -> Endpoint {
        let (ours, theirs) = socket_pair();
        self.agent.take_stream(theirs);
        ours.write_all(&STREAM_MAGIC).await.unwrap();
        ours.write_all(&number.to_le_bytes()).await.unwrap();
        ours
    }

    pub async fn create(&self, id: &str, spec: &Value, numbers: Streams) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            rootfs: "rootfs/a".into(),
            user: spec["test-user"].as_str().unwrap_or_default().into(),
            additional_gids: vec![],
            streams: Some(numbers).into(),
            ..Default::default()
        };
        let response = self.client.create_container(limit(), &request).await?;
        Ok(response.pid)
    }

    pub async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .start_container(limit(), &request)
            .await
            .map(drop)
    }

    pub async fn run(&self, id: &str, spec: &Value, tty: bool) -> Stdio {
        let stdio = self.stdio(tty).await;
        self.create(id, spec, stdio.numbers.clone()).await.unwrap();
        self.start(id).await.unwrap();
        stdio
    }

    /// A container that lives until it is killed.
    pub async fn sleeper(&self, id: &str) {
        drop(self.run(id, &spec(&["sleep", "1000"]), false).await);
    }

    pub async fn wait(&self, container: &str, exec: &str) -> WaitResponse {
        let request = WaitRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client.wait(limit(), &request).await.unwrap()
    }

    pub async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client.signal(limit(), &request).await.map(drop)
    }

    pub async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .remove_container(limit(), &request)
            .await
            .map(drop)
    }

    /// Kills and removes.
    pub async fn end(&self, id: &str) {
        self.signal(id, "", 9, true).await.unwrap();
        self.wait(id, "").await;
        self.remove(id).await.unwrap();
    }

    /// Runs a container to its end: exit, standard output, standard error.
    pub async fn output(&self, id: &str, spec: &Value) -> (WaitResponse, String, String) {
        let stdio = self.run(id, spec, false).await;
        let (out, err) = tokio::join!(
            read_all(&stdio.stdout),
            read_all(stdio.stderr.as_ref().unwrap())
        );
        let exit = self.wait(id, "").await;
        self.remove(id).await.unwrap();
        (exit, out, err)
    }

    pub async fn start_exec(
        &self,
        container: &str,
        exec: &str,
        args: &[&str],
        stdio: &Stdio,
        change: impl FnOnce(&mut ExecRequest),
    ) -> ttrpc::Result<u32> {
        let mut request = ExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            args: args.iter().map(|&arg| arg.into()).collect(),
            streams: Some(stdio.numbers.clone()).into(),
            ..Default::default()
        };
        change(&mut request);
        Ok(self.client.exec(limit(), &request).await?.pid)
    }

    pub async fn exec(
        &self,
        container: &str,
        exec: &str,
        args: &[&str],
        change: impl FnOnce(&mut ExecRequest),
    ) -> (WaitResponse, String, String) {
        let stdio = self.stdio(false).await;
        self.start_exec(container, exec, args, &stdio, change)
            .await
            .unwrap();
        stdio.stdin.shutdown_write().unwrap();
        let (out, err) = tokio::join!(
            read_all(&stdio.stdout),
            read_all(stdio.stderr.as_ref().unwrap())
        );
        let exit = self.wait(container, exec).await;
        let request = RemoveExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client.remove_exec(limit(), &request).await.unwrap();
        (exit, out, err)
    }
}

/// As in a machine that becomes a template: all that follows is in its clone.
async fn get_ready(client: &AgentClient) {
    let request = GetReadyRequest {
        spec: spec(&["/program"]).to_string().into_bytes(),
        ..Default::default()
    };
    // Saying it again changes nothing.
    for _ in 0..2 {
        client.get_ready(limit(), &request).await.unwrap();
        assert!(!Path::new("/sys/fs/cgroup/rehearsal").exists());
        assert!(!World::share().join("rootfs/rehearsal").exists());
        for name in ["containers", "state"] {
            let left = fs::read_dir(Path::new(hull_agent::RUN).join(name)).unwrap();
            assert_eq!(left.count(), 0, "{name}");
        }
    }
}

pub async fn connect(agent: &Agent) -> AgentClient {
    let (ours, theirs) = socket_pair();
    agent.serve_calls(theirs).await;
    let socket = ttrpc::asynchronous::transport::Socket::new(ours);
    AgentClient::new(ttrpc::asynchronous::Client::new(socket))
}

/// A root file system of busybox.
fn make_root(root: &Path) {
    for directory in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("a static busybox");
    let list = std::process::Command::new("/bin/busybox")
        .arg("--list")
        .output()
        .unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines() {
        let _ = symlink("busybox", root.join("bin").join(applet));
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/tmp:/bin/sh\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nweb:x:34:\nlogs:x:4:web\n",
    )
    .unwrap();
}

/// A specification as a supervisor makes it.
pub fn spec(args: &[&str]) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": args,
            "cwd": "/",
            "env": ["PATH=/bin", "COLOUR=red"],
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": false,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// A specification for a shell script.
pub fn script(text: &str) -> Value {
    spec(&["sh", "-c", text])
}

/// Adds a mount.
pub fn with_mount(mut spec: Value, mount: Value) -> Value {
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec
}
