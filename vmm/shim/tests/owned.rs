//! A guest that is its tenant's, agent and machine: whatever it does, each call ends, the shim stays small, and the
//! pod can be killed and deleted. Needs root and /dev/kvm, which is opened and no more.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

mod bundle;
#[path = "owned/mod.rs"]
mod guest;

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bundle::{Bundle, client, runs, until};
use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::TaskClient;
use guest::{Conduct, Kind};
use tokio::time::timeout;
use ttrpc::context;

/// One call of the agent (30 s), and a machine's end (5 s for the guest, 5 s for `hull-vmm`), and a little.
const CALL: Duration = Duration::from_secs(45);
/// Never reached.
const PATIENCE: Duration = Duration::from_secs(200);
/// containerd waits 5 s for `delete`.
const DELETE: Duration = Duration::from_secs(5);
/// What a shim may have had in memory at most, in KiB: three of the largest messages, and itself.
const MEMORY: u64 = 64 << 10;

const SPEC: &str = r#"{"ociVersion":"1.0.2",
    "process":{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0}},"root":{"path":"rootfs"},
    "linux":{"namespaces":[{"type":"pid"},{"type":"network"},{"type":"mount"}]}}"#;

/// Not a test.
#[test]
fn what_the_shim_takes_for_hull_vmm() {
    guest::run();
}

struct Pod {
    bundle: Bundle,
    conduct: Conduct,
    client: TaskClient,
    /// Whether a call has had to be ended.
    slow: AtomicBool,
}

impl Pod {
    async fn new(conduct: Conduct) -> Self {
        let mut bundle = Bundle::new("alone", SPEC);
        let root = root_of(&bundle);
        bundle.environment = guest::installed(&root, conduct);
        let address = bundle.start();
        // What the shim logs is read, as containerd does.
        let log = bundle.path().join("log");
        std::thread::spawn(move || {
            let mut log = fs::File::open(log).unwrap();
            std::io::copy(&mut log, &mut std::io::sink())
        });
        Self {
            bundle,
            conduct,
            client: client(&address).await,
            slow: AtomicBool::new(false),
        }
    }

    /// What a call answers, which it must in time.
    async fn bounded<T: Debug>(
        &self,
        what: &str,
        limit: Duration,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> ttrpc::Result<T> {
        let begun = Instant::now();
        let answer = timeout(limit, call).await;
        let (took, conduct) = (begun.elapsed(), self.conduct);
        self.slow.fetch_or(took > DELETE, Ordering::Relaxed);
        println!("{conduct:?}: {what} took {:.1} s", took.as_secs_f32());
        let answer = answer.unwrap_or_else(|_| panic!("{conduct:?}: {what} takes too long"));
        if let Err(error) = &answer {
            println!("{conduct:?}: {what}: {error:.100}");
            assert!(error.to_string().len() < 10_000, "{conduct:?}: {what}");
        }
        answer
    }

    async fn create(&self) -> bool {
        let place = |name: &str| self.bundle.path().join(name).display().to_string();
        let request = CreateTaskRequest {
            id: "alone".into(),
            bundle: self.bundle.path().display().to_string(),
            stdin: place("stdin"),
            ..Default::default()
        };
        let created = self.client.create(within(), &request);
        self.bounded("create", CALL, created).await.is_ok()
    }

    async fn start(&self, exec: &str) {
        let request = StartRequest {
            id: "alone".into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let started = self.client.start(within(), &request);
        // Whether it can is the guest's to say.
        let _ = self.bounded("start", CALL, started).await;
    }

    async fn exec(&self) {
        let mut request = ExecProcessRequest {
            id: "alone".into(),
            exec_id: "e".into(),
            ..Default::default()
        };
        request.spec.mut_or_insert_default().value =
            br#"{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
        let made = self.client.exec(within(), &request);
        let _ = self.bounded("exec", CALL, made).await;
    }

    async fn look(&self) {
        let id = || "alone".to_owned();
        let pids = PidsRequest {
            id: id(),
            ..Default::default()
        };
        let pids = self.bounded("pids", CALL, self.client.pids(within(), &pids));
        if let Ok(answer) = pids.await {
            assert!(answer.processes.len() <= 4096);
        }
        self.amounts().await;
        let size = ResizePtyRequest {
            id: id(),
            ..Default::default()
        };
        let resized = self.client.resize_pty(within(), &size);
        let _ = self.bounded("resize", CALL, resized).await;
        let state = StateRequest {
            id: id(),
            ..Default::default()
        };
        let state = self.client.state(within(), &state);
        self.bounded("state", Duration::from_secs(1), state)
            .await
            .unwrap();
        let close = CloseIORequest {
            id: id(),
            stdin: true,
            ..Default::default()
        };
        let closed = self.client.close_io(within(), &close);
        self.bounded("close", Duration::from_secs(1), closed)
            .await
            .unwrap();
    }

    /// Looks at what it uses, and changes it.
    async fn amounts(&self) {
        let id = || "alone".to_owned();
        let stats = StatsRequest {
            id: id(),
            ..Default::default()
        };
        let stats = self.client.stats(within(), &stats);
        if let Ok(answer) = self.bounded("stats", CALL, stats).await {
            let length = answer.stats.value.len();
            assert!(length < 64 << 10, "{:?}: {length}", self.conduct);
        }
        let pause = PauseRequest {
            id: id(),
            ..Default::default()
        };
        let paused = self.client.pause(within(), &pause);
        let _ = self.bounded("pause", CALL, paused).await;
        let resume = ResumeRequest {
            id: id(),
            ..Default::default()
        };
        let resumed = self.client.resume(within(), &resume);
        let _ = self.bounded("resume", CALL, resumed).await;
        let mut update = UpdateTaskRequest {
            id: id(),
            ..Default::default()
        };
        update.resources.mut_or_insert_default().value = b"{}".to_vec();
        let updated = self.client.update(within(), &update);
        let _ = self.bounded("update", CALL, updated).await;
    }

    /// Ends it, for which the guest isn't asked. Returns its status.
    async fn end(&self) -> u32 {
        let request = KillRequest {
            id: "alone".into(),
            signal: 9,
            all: true,
            ..Default::default()
        };
        let killed = self.client.kill(within(), &request);
        match self.bounded("kill", CALL, killed).await {
            Ok(_) => {}
            // Its guest has ended it before.
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
            Err(error) => panic!("{:?}: {error}", self.conduct),
        }
        let wait = WaitRequest {
            id: "alone".into(),
            ..Default::default()
        };
        let waited = self.client.wait(within(), &wait);
        let waited = self.bounded("wait", CALL, waited).await.unwrap();
        let delete = DeleteRequest {
            id: "alone".into(),
            ..Default::default()
        };
        let deleted = self.client.delete(within(), &delete);
        // Asked to end its processes, and to forget it.
        let deleted = self.bounded("delete", CALL * 2, deleted).await.unwrap();
        assert_eq!(deleted.exit_status, waited.exit_status);
        waited.exit_status
    }

    /// Nothing stays, and `delete` says so.
    async fn nothing_left(self) {
        let shim = self.bundle.pid();
        let most = most_memory(&shim);
        println!("{:?}: {most} KiB", self.conduct);
        assert!(most < MEMORY, "{:?}: {most} KiB", self.conduct);
        // The answer may be lost with the shim.
        let _ = self
            .client
            .shutdown(within(), &ShutdownRequest::default())
            .await;
        until(|| !runs(&shim));
        self.delete();
    }

    fn delete(&self) {
        let begun = Instant::now();
        assert_eq!(self.bundle.delete(), 137);
        assert!(begun.elapsed() < DELETE);
        until(|| machines_of(&root_of(&self.bundle)).is_empty());
        assert_eq!(self.bundle.delete(), 137);
    }
}

/// Where all of it is.
fn root_of(bundle: &Bundle) -> PathBuf {
    bundle.path().parent().unwrap().to_owned()
}

fn within() -> context::Context {
    context::with_duration(PATIENCE)
}

/// What a process has had in memory at most, in KiB.
fn most_memory(pid: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.unwrap().trim().trim_end_matches(" kB");
    number.parse().unwrap()
}

/// Stand-ins of a shim that run.
fn machines_of(root: &Path) -> Vec<String> {
    let needle = root.as_os_str().as_encoded_bytes();
    let names_it = |pid: &String| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.windows(needle.len()).any(|part| part == needle)
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let number = |pid: &String| pid.bytes().all(|byte| byte.is_ascii_digit());
    pids.filter(number).filter(names_it).collect()
}

/// A pod's life with a guest that misbehaves at some point of it.
async fn live(conduct: Conduct) {
    let pod = Pod::new(conduct).await;
    if pod.create().await {
        pod.start("").await;
        // Once is enough to see how long it takes.
        if !pod.slow.load(Ordering::Relaxed) {
            pod.exec().await;
            pod.start("e").await;
        }
        if !pod.slow.load(Ordering::Relaxed) {
            pod.look().await;
        }
        assert!(pod.end().await <= 255, "{conduct:?}");
    }
    pod.nothing_left().await;
}

async fn all(conducts: &[Conduct]) {
    let lives: Vec<_> = conducts
        .iter()
        .map(|one| tokio::spawn(live(*one)))
        .collect();
    for life in lives {
        life.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_guest_is_one() {
    let pod = Pod::new((Kind::Honest, "")).await;
    assert!(pod.create().await);
    pod.start("").await;
    pod.look().await;
    assert_eq!(pod.end().await, 137);
    pod.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence() {
    all(&[
        (Kind::Silent, "hello"),
        (Kind::Silent, "start_infra"),
        (Kind::Silent, "create_container"),
        (Kind::Silent, "start_container"),
        (Kind::Silent, "exec"),
        (Kind::Silent, "processes"),
        (Kind::Silent, "resize"),
        (Kind::Silent, "stats"),
        (Kind::Silent, "freeze"),
        (Kind::Silent, "thaw"),
        (Kind::Silent, "update"),
        (Kind::Silent, "signal"),
        (Kind::Silent, "remove_container"),
        (Kind::Silent, "shutdown"),
        (Kind::Mute, "create_container"),
        (Kind::Mute, "start_container"),
        (Kind::Mute, "signal"),
        (Kind::Unconnected, "start_infra"),
        (Kind::Unconnected, "exec"),
        (Kind::Deaf, "start_container"),
        (Kind::Stop, "start_container"),
        (Kind::Stop, "signal"),
        (Kind::Immortal, "signal"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn noise() {
    let mut conducts = Vec::new();
    for kind in [
        Kind::Garbage,
        Kind::Endless,
        Kind::Unknown,
        Kind::Parts,
        Kind::Half,
        Kind::Refuse,
        Kind::HangUp,
        Kind::Exit,
    ] {
        for call in ["hello", "start_container", "processes", "signal"] {
            conducts.push((kind, call));
        }
    }
    all(&conducts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_and_floods() {
    all(&[(Kind::Lies, "create_container"), (Kind::Flood, "")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_with_such_a_guest_is_killed_and_deleted() {
    for kind in [Kind::Mute, Kind::Deaf, Kind::Flood, Kind::Honest] {
        let pod = Pod::new((kind, "start_container")).await;
        assert!(pod.create().await);
        let begun = timeout(Duration::from_secs(2), pod.start("")).await;
        assert_eq!(begun.is_ok(), matches!(kind, Kind::Flood | Kind::Honest));

        pod.delete();

        assert!(!runs(&pod.bundle.pid()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hangs_does_not_hold_up_a_kill() {
    for call in ["stats", "freeze", "processes", "exec"] {
        let pod = Pod::new((Kind::Silent, call)).await;
        assert!(pod.create().await);
        pod.start("").await;
        let hangs = timeout(Duration::from_secs(1), async {
            pod.exec().await;
            pod.start("e").await;
            pod.look().await;
        });
        assert!(hangs.await.is_err());
        let begun = Instant::now();

        assert_eq!(pod.end().await, 137);

        assert!(begun.elapsed() < Duration::from_secs(10), "{call}");
        pod.nothing_left().await;
    }
}
