//! The host's side: a template, clones of it, and what the guest says.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hull_machine::client::{
    GuestConnection, LaunchError, Machine, MachineSpec, NetSpec, SnapshotFiles,
};
use hull_machine::config::{CachePolicy, NetLimits};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::{COMMANDS, READY, Test, initramfs};

/// Generous: emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(300);
/// Times that a question is asked.
const ASKED: usize = 3;
pub const MEMORY_MIB: u64 = 256;
/// Addresses for memory that is added.
pub const REGION_MIB: u64 = 4096;
/// Of the template; one of them runs.
const VCPUS: u8 = 2;

/// Runs the tests, all on one template.
pub fn run(image: &Path, tests: Vec<Test>) -> ExitCode {
    let template = Template::make(image);
    let mut failed = 0;
    for (name, test) in &tests {
        let began = Instant::now();
        let result = std::panic::catch_unwind(|| test(&template));
        let took = began.elapsed().as_millis();
        println!(
            "test {name} ... {} ({took} ms)",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        failed += usize::from(result.is_err());
    }
    println!(
        "test result: {}. {} tests, {failed} failed",
        if failed == 0 { "ok" } else { "FAILED" },
        tests.len()
    );
    ExitCode::from(u8::from(failed > 0))
}

/// The files of a snapshot.
pub struct Template {
    pub runtime: Runtime,
    directory: tempfile::TempDir,
    /// What the guest had counted to when it was put aside, and its time.
    pub count: u64,
    pub now: u64,
}

impl Template {
    fn make(image: &Path) -> Self {
        let runtime = Runtime::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (count, now) = runtime.block_on(async {
            let mut first = Clone::launch(booted(image)).await.unwrap();
            let connection = first.connections.recv().await.unwrap();
            assert_eq!(connection.port, READY);
            println!("clocksource: {}", first.ask("clock").await);
            first.ask("fill 7").await;
            let count = first.number("count").await;
            let now = first.number("now").await;
            let began = Instant::now();
            first
                .machine
                .snapshot(files(directory.path(), true))
                .await
                .unwrap();
            println!("snapshot: {} ms", began.elapsed().as_millis());
            (count, now)
        });
        let size = |name: &str| {
            use std::os::unix::fs::MetadataExt;
            let found = fs::metadata(directory.path().join(name)).unwrap();
            println!(
                "{name}: {} bytes, {} KiB on disk",
                found.len(),
                found.blocks() / 2
            );
        };
        size("state");
        size("memory");
        Self {
            runtime,
            directory,
            count,
            now,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn files(&self) -> SnapshotFiles {
        files(self.directory.path(), false)
    }

    /// A machine of this template, with a share that has a file `name`.
    pub fn spec(&self, name: &str) -> Spec {
        Spec::restored(self.files(), name)
    }

    pub async fn clone(&self, name: &str) -> Clone {
        Clone::launch(self.spec(name)).await.unwrap()
    }
}

/// The files of a snapshot in a directory, new ones to be written or old ones to be read.
pub fn files(directory: &Path, new: bool) -> SnapshotFiles {
    let open = |name: &str| -> OwnedFd {
        let mut options = File::options();
        options.read(true).write(new).create_new(new);
        options.open(directory.join(name)).unwrap().into()
    };
    SnapshotFiles {
        state: open("state"),
        memory: open("memory"),
    }
}

/// A machine before it is one, with what it is to find.
pub struct Spec {
    pub machine: MachineSpec,
    console: File,
    share: tempfile::TempDir,
}

fn kvm() -> File {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap()
}

fn booted(image: &Path) -> Spec {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let machine = MachineSpec::new(kvm(), File::open(image.join("vmlinux")).unwrap(), writer)
        .cmdline("console=hvc0 loglevel=4 panic=-1 maxcpus=1")
        .initramfs(initramfs::with_init(
            image,
            &std::env::current_exe().unwrap(),
        ))
        .memory_mib(MEMORY_MIB)
        .vcpus(VCPUS);
    Spec::with_devices(machine, reader.into(), "template")
}

impl Spec {
    pub fn restored(files: SnapshotFiles, name: &str) -> Self {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let machine = MachineSpec::restored(kvm(), files, writer);
        Self::with_devices(machine, reader.into(), name)
    }

    fn with_devices(machine: MachineSpec, console: File, name: &str) -> Self {
        let share = tempfile::tempdir().unwrap();
        fs::write(share.path().join("name"), name).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, share.path(), flags, Mode::empty()).unwrap();
        let net = NetSpec {
            udp_segmentation: true,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queue_pairs: 1,
            limits: NetLimits::default(),
        };
        Self {
            machine: machine
                .balloon()
                .memory_device(REGION_MIB)
                .disk_slot("slot")
                .share("hull", root, false, CachePolicy::Auto)
                .vsock(3, vec![READY])
                .net(net, None),
            console,
            share,
        }
    }
}

/// A machine that runs.
pub struct Clone {
    pub machine: Machine,
    pub connections: mpsc::Receiver<GuestConnection>,
    console: Arc<Mutex<String>>,
    pub share: tempfile::TempDir,
}

impl Clone {
    pub async fn launch(spec: Spec) -> Result<Self, LaunchError> {
        let vmm = Path::new(env!("CARGO_BIN_EXE_hull-vmm"));
        let began = Instant::now();
        let (machine, connections) = Machine::launch(vmm, spec.machine).await?;
        println!("launched: {} ms", began.elapsed().as_millis());
        let console = Arc::new(Mutex::new(String::new()));
        let (said, mut reader) = (Arc::clone(&console), spec.console);
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut part) {
                let text = String::from_utf8_lossy(&part[..count]);
                print!("{text}");
                said.lock().unwrap().push_str(&text);
            }
        });
        Ok(Self {
            machine,
            connections,
            console,
            share: spec.share,
        })
    }

    /// Why a machine doesn't start.
    pub async fn refused(spec: Spec) -> String {
        match Self::launch(spec).await {
            Ok(_) => panic!("it starts"),
            Err(error) => std::error::Error::source(&error).unwrap().to_string(),
        }
    }

    /// Asks the guest for something.
    pub async fn ask_for(&self, command: &str) -> UnixStream {
        let ask = async {
            let mut stream = self.machine.connect(COMMANDS).await.unwrap();
            let line = format!("{command}\n");
            stream.write_all(line.as_bytes()).await.unwrap();
            stream
        };
        let asked = tokio::time::timeout(PATIENCE, ask).await;
        asked.expect("the guest listens")
    }

    /// Has the guest do something, and gives its answer.
    ///
    /// When a clone's kernel hears that its connections are gone, it ends all there are, and one that was made a moment
    /// before, too: that has no answer, not even an empty line, and is made again.
    pub async fn ask(&self, command: &str) -> String {
        for _ in 0..ASKED {
            let answer = Self::read(&mut self.ask_for(command).await).await;
            if answer.ends_with('\n') {
                return answer.trim_end().to_owned();
            }
        }
        panic!("{command}: no answer");
    }

    /// Ends what the guest was asked to wait for.
    pub async fn finish(stream: &mut UnixStream) {
        stream.write_all(b"done\n").await.unwrap();
        assert_eq!(Self::read(stream).await.trim_end(), "done");
    }

    async fn read(stream: &mut UnixStream) -> String {
        let mut answer = String::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
        read.expect("the guest answers").unwrap();
        answer
    }

    pub async fn number(&self, command: &str) -> u64 {
        self.ask(command).await.parse().unwrap()
    }

    /// Waits until the console has said something.
    pub async fn says(&self, text: &str) {
        let said = async {
            while !self.console.lock().unwrap().contains(text) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, said)
            .await
            .expect("the console says it");
    }
}
