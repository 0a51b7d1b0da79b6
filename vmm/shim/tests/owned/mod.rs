//! A stand-in for `hull-vmm`, with a guest whose tenant owns it: it boots as it should, and misbehaves at a call.
//!
//! It is this test program itself, run by a script that the shim takes for `hull-vmm`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hull_machine::channel::{AsyncChannel, Channel};
use hull_machine::control::{Event, ExitReason, MemoryRefused, Request};
use hull_machine::steps::Started;
use hull_protocol::agent::*;
use hull_protocol::agent_ttrpc::{Agent, create_agent};
use hull_protocol::{AGENT_PORT, READY_PORT, STREAM_MAGIC};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

/// The environment of the stand-in: what it does; and of the machine, rather than its launcher, which is its parent.
const CONDUCT: &str = "HULL_TEST_CONDUCT";
const JAILED: &str = "HULL_TEST_JAILED";
/// By which its processes are found.
const ROOT: &str = "HULL_TEST_ROOT";
/// The name of the test that is no test.
const ENTRY: &str = "what_the_shim_takes_for_hull_vmm";
/// More than a message may have.
const HUGE: usize = 5 << 20;

/// What a guest does at a call, or from then on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What it should.
    Honest,
    /// Doesn't answer this call, and all others.
    Silent,
    /// Answers nothing any more.
    Mute,
    /// Says no, at length.
    Refuse,
    /// Something that is no message.
    Garbage,
    /// A message longer than any may be, without end.
    Endless,
    /// Answers to what nobody has asked, without end.
    Unknown,
    /// Parts of an answer to all that is asked, without end.
    Parts,
    /// Half of a message's header, and hangs up.
    Half,
    /// Says yes to everything, and does nothing.
    Immortal,
    /// Numbers and lists that can't be.
    Lies,
    /// Prints without end, also after its end.
    Flood,
    /// Takes no further connections.
    Unconnected,
    /// The agent is gone, and the machine goes on.
    HangUp,
    /// The machine ends.
    Exit,
    /// The machine stands still.
    Stop,
    /// The machine no longer hears its supervisor.
    Deaf,
}

/// A kind of misbehaviour, and the call at which it begins.
pub type Conduct = (Kind, &'static str);

/// Makes a program that a shim takes for `hull-vmm`, and a guest image. Returns the environment for the shim.
pub fn installed(root: &Path, (kind, call): Conduct) -> Vec<(&'static str, PathBuf)> {
    let program = root.join("hull-vmm");
    let script = format!(
        "#!/bin/sh\nexport {CONDUCT}={kind:?}:{call} {ROOT}={root}\nexec {} --exact {ENTRY} --nocapture\n",
        std::env::current_exe().unwrap().display(),
        root = root.display(),
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for file in ["vmlinux", "initramfs.cpio"] {
        fs::write(root.join(file), "").unwrap();
    }
    vec![
        ("HULL_VMM", program),
        ("HULL_GUEST_DIR", root.into()),
        ("HULL_TIMEOUT_SCALE", "1".into()),
    ]
}

/// Is the stand-in, where it is started as that.
pub fn run() {
    let Ok(conduct) = std::env::var(CONDUCT) else {
        return;
    };
    let control = io::stdin().as_fd().try_clone_to_owned().unwrap();
    if std::env::var_os(JAILED).is_none() {
        launch(Channel::new(control));
        std::process::exit(0);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    // The launcher has something to say before.
    while std::env::var(JAILED).unwrap() == parent().to_string() {
        std::thread::sleep(Duration::from_millis(1));
    }
    runtime.unwrap().block_on(async {
        let control = AsyncChannel::new(Channel::new(control)).unwrap();
        Machine::new(control, &conduct).run().await;
    });
    std::process::exit(0);
}

fn parent() -> u32 {
    std::os::unix::process::parent_id()
}

/// What runs until the machine is jailed, and is that process's parent here.
#[expect(clippy::zombie_processes, reason = "it outlives its parent")]
fn launch(control: Channel) {
    let (_boot, _descriptors) = control.receive::<Request>().unwrap().unwrap();
    let machine = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", ENTRY, "--nocapture"])
        .env(JAILED, std::process::id().to_string())
        .stdin(control.as_fd().try_clone_to_owned().unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = i32::try_from(machine.id()).unwrap();
    let process = rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty());
    control
        .send(&Event::Jailed { pid }, &[process.unwrap().as_fd()])
        .unwrap();
}

struct Machine {
    control: Arc<AsyncChannel>,
    guest: Arc<Guest>,
    ready: Option<StdUnixStream>,
}

impl Machine {
    fn new(control: AsyncChannel, conduct: &str) -> Self {
        let (kind, call) = conduct.split_once(':').unwrap();
        let control = Arc::new(control);
        let guest = Guest {
            kind: kind.into(),
            call: call.into(),
            begun: watch::Sender::new(false),
            processes: Mutex::default(),
            streams: Arc::default(),
            control: Arc::clone(&control),
        };
        Self {
            control,
            guest: Arc::new(guest),
            ready: None,
        }
    }

    async fn run(mut self) {
        self.control
            .send(&Event::Running(Started::default()), &[])
            .await
            .unwrap();
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let hello = Event::GuestConnection { port: READY_PORT };
        self.control.send(&hello, &[theirs.as_fd()]).await.unwrap();
        self.ready = Some(ours);
        let mut begun = self.guest.begun.subscribe();
        let hang_up = self.guest.is("HangUp");
        let deaf = self.guest.is("Deaf");
        loop {
            let received = tokio::select! {
                received = self.control.receive::<Request>() => received,
                _ = begun.wait_for(|begun| *begun), if hang_up && self.ready.is_some() => {
                    self.ready = None;
                    continue;
                }
            };
            match received {
                Ok(Some(_)) if deaf && *begun.borrow() => {}
                Ok(Some((request, descriptors))) => self.answer(request, descriptors).await,
                // The supervisor is gone.
                Ok(None) | Err(_) => return,
            }
        }
    }

    async fn answer(&self, request: Request, mut descriptors: Vec<OwnedFd>) {
        let answer = match request {
            Request::Connect { id, port } => {
                if self.guest.is("Unconnected") && self.guest.begins("connect") {
                    return;
                }
                let stream = StdUnixStream::from(descriptors.pop().unwrap());
                stream.set_nonblocking(true).unwrap();
                let stream = UnixStream::from_std(stream).unwrap();
                let guest = Arc::clone(&self.guest);
                if port == AGENT_PORT {
                    tokio::spawn(guest.calls(stream));
                } else {
                    tokio::spawn(guest.stream(stream));
                }
                Event::Connected { id, result: Ok(()) }
            }
            Request::PlugNet { id, .. } => Event::Plugged { id, result: Ok(()) },
            Request::InsertDisk { id, .. } | Request::EjectDisk { id, .. } => {
                Event::DiskChanged { id, result: Ok(()) }
            }
            Request::ResizeMemory { id, .. } | Request::AskMemory { id } => Event::AddedMemory {
                id,
                result: Err(MemoryRefused::NoDevice),
            },
            Request::Pause { id } => Event::Paused { id },
            Request::Resume { id } => Event::Resumed { id },
            Request::Snapshot { id } => Event::SnapshotTaken { id, result: Ok(()) },
            Request::Stop => std::process::exit(0),
            Request::Boot(_) => return,
        };
        self.control.send(&answer, &[]).await.unwrap();
    }
}

/// A process: how it ended, once it has.
type Running = watch::Sender<Option<u32>>;

/// An agent that its tenant owns.
struct Guest {
    kind: String,
    call: String,
    /// Whether the misbehaviour has.
    begun: watch::Sender<bool>,
    processes: Mutex<HashMap<String, (Running, Streams)>>,
    streams: Arc<Mutex<HashMap<u64, UnixStream>>>,
    control: Arc<AsyncChannel>,
}

impl Guest {
    fn is(&self, kind: &str) -> bool {
        self.kind == kind
    }

    /// Whether it misbehaves at this call, or has begun to.
    fn begins(&self, call: &str) -> bool {
        if self.call == call {
            self.begun.send_replace(true);
        }
        *self.begun.borrow()
    }

    /// The misbehaviour at a call, if it is this one.
    async fn at(&self, call: &str) -> ttrpc::Result<()> {
        if !self.begins(call) {
            return Ok(());
        }
        let here = self.call == call;
        match self.kind.as_str() {
            "Silent" if here => std::future::pending().await,
            "Mute" | "Deaf" | "Garbage" | "Endless" | "Unknown" | "Parts" | "Half" | "HangUp" => {
                std::future::pending().await
            }
            "Refuse" if here => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                ttrpc::Code::NOT_FOUND,
                "\x1b[2J".repeat(100_000),
            ))),
            "Exit" => std::process::exit(0),
            "Stop" => {
                rustix::process::kill_process(rustix::process::getpid(), Signal::STOP).unwrap();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Serves calls on a connection, until it is used for something else.
    async fn calls(self: Arc<Self>, mut stream: UnixStream) {
        let (mut ours, servers) = tokio::io::duplex(1 << 16);
        let (accepted, mut accept) = mpsc::channel(1);
        accepted.send(Ok::<_, io::Error>(servers)).await.unwrap();
        let connections = futures::stream::poll_fn(move |context| accept.poll_recv(context));
        let mut server = Server::new()
            .register_service(create_agent(Arc::clone(&self) as Arc<_>))
            .add_listener(Listener::new(connections));
        server.start().await.unwrap();
        let mut begun = self.begun.subscribe();
        let raw = matches!(
            self.kind.as_str(),
            "Garbage" | "Endless" | "Unknown" | "Parts" | "Half"
        );
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut stream, &mut ours) => return,
            _ = begun.wait_for(|begun| raw && *begun) => {}
        }
        // What it sends is read or not: it goes on.
        let _ = self.attack(&mut stream).await;
        std::future::pending().await
    }

    async fn attack(&self, stream: &mut UnixStream) -> io::Result<()> {
        // ttrpc: length, number of the call, kind (2: answer, 3: part of one), flags.
        let header = |length: u32, call: u32, kind: u8| {
            let numbers = [length.to_be_bytes(), call.to_be_bytes()].concat();
            [numbers, vec![kind, 0]].concat()
        };
        match self.kind.as_str() {
            "Garbage" => stream.write_all(&[0x5a; 1 << 16]).await,
            "Half" => {
                stream.write_all(&header(100, 1, 2)[..5]).await?;
                stream.shutdown().await
            }
            "Endless" => {
                stream.write_all(&header(u32::MAX, 1, 2)).await?;
                loop {
                    stream.write_all(&[0; 1 << 16]).await?;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            kind => {
                let body = vec![0; HUGE - (2 << 20)];
                let length = u32::try_from(body.len()).unwrap();
                for call in (1..100).cycle() {
                    let (call, kind) = match kind {
                        "Unknown" => (call * 2 + 1_000_001, 2),
                        _ => (call, 3),
                    };
                    stream.write_all(&header(length, call, kind)).await?;
                    stream.write_all(&body).await?;
                    // Other tests run, too.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Ok(())
            }
        }
    }

    /// Takes a stream, which says its number.
    async fn stream(self: Arc<Self>, mut stream: UnixStream) {
        let mut header = [0; STREAM_MAGIC.len() + 8];
        if stream.read_exact(&mut header).await.is_ok() {
            let number = u64::from_le_bytes(header[STREAM_MAGIC.len()..].try_into().unwrap());
            self.streams.lock().unwrap().insert(number, stream);
        }
    }

    fn begin(&self, key: &str, streams: Option<&Streams>) {
        let process = (Running::new(None), streams.cloned().unwrap_or_default());
        self.processes.lock().unwrap().insert(key.into(), process);
    }

    /// Prints on a process's standard output, and never stops.
    fn flood(&self, key: &str) {
        let number = self.processes.lock().unwrap()[key].1.stdout;
        let streams = Arc::clone(&self.streams);
        tokio::spawn(async move {
            let taken = || streams.lock().unwrap().remove(&number);
            let mut stream = loop {
                if let Some(stream) = taken() {
                    break stream;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
            while stream.write_all(&[b'x'; 1 << 16]).await.is_ok() {}
        });
    }

    fn end(&self, key: &str, code: u32) {
        let processes = self.processes.lock().unwrap();
        if let Some((process, streams)) = processes.get(key) {
            process.send_replace(Some(code));
            for number in [streams.stdout, streams.stderr] {
                self.streams.lock().unwrap().remove(&number);
            }
        }
    }
}

fn key(container: &str, exec: &str) -> String {
    format!("{container}/{exec}")
}

/// Each does `at` first, then what an agent should.
macro_rules! calls {
    ($($name:ident($request:ident) -> $response:ty = |$guest:ident, $call:ident| $work:expr;)*) => {
        /// The service, whose state is shared with what it spawns.
        #[async_trait]
        impl Agent for Guest {
            $(async fn $name(
                &self,
                _: &TtrpcContext,
                $call: $request,
            ) -> ttrpc::Result<$response> {
                self.at(stringify!($name)).await?;
                let $guest = self;
                $work
            })*
        }
    };
}

calls! {
    hello(HelloRequest) -> HelloResponse = |_guest, _call| Ok(HelloResponse::default());
    start_infra(StartInfraRequest) -> StartInfraResponse = |_guest, _call| {
        Ok(StartInfraResponse::default())
    };
    configure_network(ConfigureNetworkRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    create_container(CreateContainerRequest) -> CreateContainerResponse = |guest, call| {
        guest.begin(&key(&call.container_id, ""), call.streams.as_ref());
        Ok(CreateContainerResponse { pid: u32::MAX, ..Default::default() })
    };
    start_container(StartContainerRequest) -> Empty = |guest, call| {
        if guest.is("Flood") {
            guest.flood(&key(&call.container_id, ""));
        }
        Ok(Empty::default())
    };
    exec(ExecRequest) -> ExecResponse = |guest, call| {
        guest.begin(&key(&call.container_id, &call.exec_id), call.streams.as_ref());
        Ok(ExecResponse::default())
    };
    signal(SignalRequest) -> Empty = |guest, call| {
        if !guest.is("Immortal") {
            guest.end(&key(&call.container_id, &call.exec_id), 128 + call.signal);
        }
        Ok(Empty::default())
    };
    wait(WaitRequest) -> WaitResponse = |guest, call| {
        let process = {
            let processes = guest.processes.lock().unwrap();
            processes
                .get(&key(&call.container_id, &call.exec_id))
                .map(|(process, _)| process.subscribe())
        };
        let Some(mut process) = process else {
            return std::future::pending().await;
        };
        let code = *process.wait_for(Option::is_some).await.unwrap();
        let lie = guest.is("Lies").then_some(u32::MAX);
        Ok(WaitResponse {
            exit_code: lie.or(code).unwrap(),
            signal: lie.unwrap_or_default(),
            ..Default::default()
        })
    };
    resize(ResizeRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    remove_container(RemoveContainerRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    remove_exec(RemoveExecRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    processes(ProcessesRequest) -> ProcessesResponse = |guest, _call| {
        let count = if guest.is("Lies") { 800_000 } else { 1 };
        Ok(ProcessesResponse { pids: vec![u32::MAX; count], ..Default::default() })
    };
    stats(StatsRequest) -> StatsResponse = |guest, _call| Ok(match guest.is("Lies") {
        false => StatsResponse::default(),
        true => StatsResponse {
            cpu: Some(CpuStats { usage_micros: u64::MAX, ..Default::default() }).into(),
            memory: Some(MemoryStats {
                usage: u64::MAX,
                detail: (0..50_000).map(|key| (format!("\x1b{key}"), u64::MAX)).collect(),
                ..Default::default()
            })
            .into(),
            io: vec![IoStats { major: u32::MAX, ..Default::default() }; 200_000],
            ..Default::default()
        },
    });
    freeze(FreezeRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    thaw(ThawRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    update(UpdateRequest) -> Empty = |_guest, _call| Ok(Empty::default());
    wait_oom(WaitOomRequest) -> WaitOomResponse = |guest, call| {
        if !guest.is("Lies") {
            return std::future::pending().await;
        }
        // Without end, unless somebody bounds it.
        Ok(WaitOomResponse { kills: call.kills + 1, ..Default::default() })
    };
    shutdown(Empty) -> Empty = |guest, _call| {
        if guest.is("Immortal") {
            return Ok(Empty::default());
        }
        let ended = Event::Ended(ExitReason::PowerOff);
        guest.control.send(&ended, &[]).await.unwrap();
        std::process::exit(0)
    };
}
