#[path = "service_tests/amounts.rs"]
mod amounts;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{
    Client, Events as EventsService, TaskClient, create_events,
};
use hull_pod::agent::{AgentError, ExitStatus, Process, Stats, Stdio};
use hull_pod::supervisor::api::{Exec, Size};
use hull_pod::supervisor::{Limits, PodFailure};
use oci_spec::runtime::LinuxResources;
use rustix::fs::{CWD, FileType, Mode};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use ttrpc::r#async::transport::{Listener, Socket};
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, context};

use super::services;
use crate::bundle::Bundle;
use crate::events::{Events, Target};
use crate::failure::TaskError;
use crate::host::Host;
use crate::pod::{Pod, RootMount};
use crate::tasks::Tasks;

#[path = "service_kill_tests.rs"]
mod kills;

const LONG: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(2);
const LIMITS: Limits = Limits {
    agent_ready: LONG,
    call: LONG,
    drain: IDLE,
    end: IDLE,
};

/// A pod without a machine: its processes are this test's ends of their streams.
#[derive(Default)]
struct StandIn {
    up: watch::Sender<bool>,
    guests: Mutex<HashMap<String, Guest>>,
    exits: Mutex<HashMap<String, watch::Sender<Option<i32>>>>,
    signals: Mutex<Vec<(String, u32, bool)>>,
    /// Processes killed for want of memory, in whatever container.
    ooms: watch::Sender<u64>,
    updates: Mutex<Vec<(String, LinuxResources)>>,
    /// Of further processes.
    users: Mutex<Vec<Option<String>>>,
    refuse_start: Mutex<bool>,
    /// Its agent answers no signal.
    silent: Mutex<bool>,
}

/// A process's own ends.
#[derive(Debug)]
struct Guest {
    stdin: UnixStream,
    stdout: UnixStream,
}

fn key(process: Process<'_>) -> String {
    match process {
        Process::Infra => "infra".into(),
        Process::Container(name) => name.into(),
        Process::Exec { exec, .. } => exec.into(),
    }
}

impl StandIn {
    fn process(&self, name: &str) -> Stdio {
        let (our_in, guest_in) = UnixStream::pair().unwrap();
        let (our_out, guest_out) = UnixStream::pair().unwrap();
        let mut stdio = Stdio::default();
        stdio.stdin = Some(our_in.into());
        stdio.stdout = Some(our_out.into());
        let guest = Guest {
            stdin: guest_in,
            stdout: guest_out,
        };
        self.guests.lock().unwrap().insert(name.into(), guest);
        let exit = watch::Sender::new(None);
        self.exits.lock().unwrap().insert(name.into(), exit);
        stdio
    }

    fn guest(&self, name: &str) -> Guest {
        self.guests.lock().unwrap().remove(name).unwrap()
    }

    fn end(&self, name: &str, code: i32) {
        self.exits.lock().unwrap()[name].send_replace(Some(code));
    }
}

#[async_trait]
impl Pod for StandIn {
    async fn begin(&self, _: &str, _: &Bundle, _: &[RootMount]) -> Result<(), TaskError> {
        self.up.send_replace(true);
        Ok(())
    }

    async fn create(
        &self,
        name: &str,
        _: &Bundle,
        _: &[RootMount],
        _: bool,
    ) -> Result<Stdio, TaskError> {
        Ok(self.process(name))
    }

    async fn start(&self, name: &str) -> Result<(), TaskError> {
        if *self.refuse_start.lock().unwrap() {
            return Err(TaskError::NoTask(name.into()));
        }
        Ok(())
    }

    async fn exec(&self, exec: &str, what: &Exec) -> Result<Stdio, TaskError> {
        let mut stdio = self.process(exec);
        if !what.stdin {
            stdio.stdin = None;
        }
        self.users.lock().unwrap().push(what.user.clone());
        Ok(stdio)
    }

    async fn wait(&self, process: Process<'_>) -> Result<ExitStatus, TaskError> {
        let mut exit = self.exits.lock().unwrap()[&key(process)].subscribe();
        let mut up = self.up.subscribe();
        tokio::select! {
            code = exit.wait_for(Option::is_some) => Ok(ExitStatus {
                code: code.unwrap().unwrap(),
                signal: None,
                oom_killed: false,
            }),
            _ = up.wait_for(|up| !up) => Err(PodFailure::Stopped.into()),
        }
    }

    async fn signal(&self, process: Process<'_>, signal: u32, all: bool) -> Result<(), TaskError> {
        let sent = (key(process), signal, all);
        self.signals.lock().unwrap().push(sent);
        if *self.silent.lock().unwrap() {
            let (call, limit) = ("Signal", LONG);
            return Err(AgentError::TimedOut { call, limit }.into());
        }
        Ok(())
    }

    async fn resize(&self, _: Process<'_>, _: Size) -> Result<(), TaskError> {
        Ok(())
    }

    async fn processes(&self, _: &str) -> Result<Vec<u32>, TaskError> {
        Ok(vec![7, 9])
    }

    async fn stats(&self, name: Option<&str>) -> Result<Stats, TaskError> {
        let mut stats = Stats::default();
        stats.pids.current = if name.is_some() { 2 } else { 20 };
        Ok(stats)
    }

    async fn freeze(&self, _: &str) -> Result<(), TaskError> {
        Ok(())
    }

    async fn thaw(&self, _: &str) -> Result<(), TaskError> {
        Ok(())
    }

    async fn update(&self, name: &str, resources: &LinuxResources) -> Result<(), TaskError> {
        let updated = (name.to_owned(), resources.clone());
        self.updates.lock().unwrap().push(updated);
        Ok(())
    }

    async fn wait_oom(&self, _: &str, kills: u64) -> Result<u64, TaskError> {
        let mut ooms = self.ooms.subscribe();
        let more = ooms.wait_for(|ooms| *ooms > kills).await;
        Ok(*more.unwrap())
    }

    async fn remove(&self, name: &str) -> Result<(), TaskError> {
        self.guests.lock().unwrap().remove(name);
        Ok(())
    }

    async fn remove_exec(&self, _: &str, _: &str) -> Result<(), TaskError> {
        Ok(())
    }

    async fn ended(&self) {
        let _ = self.up.subscribe().wait_for(|up| !up).await;
    }

    async fn shut_down(&self) {
        self.guests.lock().unwrap().clear();
        self.up.send_replace(false);
    }
}

/// containerd's service for events.
struct Recorder(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl EventsService for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.send(request.envelope.unwrap()).unwrap();
        Ok(Empty::default())
    }
}

/// A shim without a machine, and its client.
struct Shim {
    root: TempDir,
    pod: Arc<StandIn>,
    tasks: Arc<Tasks>,
    client: TaskClient,
    connection: Client,
    events: mpsc::UnboundedReceiver<Envelope>,
    _servers: [Server; 2],
}

async fn server(path: &Path, services: HashMap<String, ttrpc::r#async::Service>) -> Server {
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    let mut server = Server::new()
        .register_service(services)
        .add_listener(Listener::from(listener));
    server.start().await.unwrap();
    server
}

impl Shim {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (record, events) = mpsc::unbounded_channel();
        let events_socket = root.path().join("events");
        let recorder = create_events(Arc::new(Recorder(record)));
        let first = server(&events_socket, recorder).await;
        let pod = Arc::new(StandIn::default());
        let publisher = Events::new(Target {
            namespace: "default".into(),
            socket: events_socket.display().to_string(),
            ..Target::default()
        });
        let tasks = Tasks::new(
            Arc::clone(&pod) as Arc<dyn Pod>,
            Host::here().unwrap(),
            publisher,
            LIMITS,
        );
        let socket = root.path().join("shim");
        let second = server(&socket, services(&tasks)).await;
        let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        let connection = Client::new(Socket::new(stream));
        Self {
            root,
            pod,
            tasks,
            client: TaskClient::new(connection.clone()),
            connection,
            events,
            _servers: [first, second],
        }
    }

    fn bundle(&self, id: &str, annotations: &str) -> PathBuf {
        let bundle = self.root.path().join(id);
        std::fs::create_dir(&bundle).unwrap();
        let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}}}}"#);
        std::fs::write(bundle.join("config.json"), spec).unwrap();
        for name in ["stdin", "stdout"] {
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(CWD, bundle.join(name), FileType::Fifo, mode, 0).unwrap();
        }
        bundle
    }

    fn request(&self, id: &str, bundle: &Path) -> CreateTaskRequest {
        let place = |name: &str| bundle.join(name).display().to_string();
        CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            stdin: place("stdin"),
            stdout: place("stdout"),
            ..Default::default()
        }
    }

    async fn create(&self, id: &str, annotations: &str) -> ttrpc::Result<CreateTaskResponse> {
        let bundle = self.bundle(id, annotations);
        let request = self.request(id, &bundle);
        self.client.create(within(), &request).await
    }

    async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<StartResponse> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client.start(within(), &request).await
    }

    async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: id.into(),
            signal,
            ..Default::default()
        };
        self.client.kill(within(), &request).await
    }

    async fn wait(&self, id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client
            .wait(within(), &request)
            .await
            .unwrap()
            .exit_status
    }

    async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client.delete(within(), &request).await
    }

    /// Topic and event of the next one.
    async fn event(&mut self) -> (String, Vec<u8>) {
        let envelope = timeout(LONG, self.events.recv()).await.unwrap().unwrap();
        assert_eq!(envelope.namespace, "default");
        (envelope.topic, envelope.event.unwrap().value)
    }

    async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        for _ in 0..count {
            topics.push(self.event().await.0);
        }
        topics
    }

    /// Reads what a process prints, to its end.
    fn reader(&self, id: &str) -> tokio::task::JoinHandle<String> {
        let path = self.root.path().join(id).join("stdout");
        tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            let mut fifo = std::fs::File::open(path).unwrap();
            fifo.read_to_string(&mut text).unwrap();
            text
        })
    }
}

fn within() -> context::Context {
    context::with_duration(LONG)
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

const SANDBOX: &str = r#""io.kubernetes.cri.container-type":"sandbox",
    "io.kubernetes.cri.sandbox-id":"pod""#;
const MEMBER: &str = r#""io.kubernetes.cri.container-type":"container",
    "io.kubernetes.cri.sandbox-id":"pod""#;

#[tokio::test]
async fn a_container_lives_and_its_events_come_in_order() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    let printed = shim.reader("web");
    assert_eq!(shim.start("web", "").await.unwrap().pid, std::process::id());
    let mut guest = shim.pod.guest("container-1");

    // It has ended, and its last words are still on their way.
    shim.pod.end("container-1", 3);
    guest.stdout.write_all(b"last words").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(guest);

    assert_eq!(shim.wait("web").await, 3);
    assert_eq!(
        shim.topics(3).await,
        ["/tasks/create", "/tasks/start", "/tasks/exit"]
    );
    assert_eq!(shim.delete("web", "").await.unwrap().exit_status, 3);
    assert_eq!(shim.topics(1).await, ["/tasks/delete"]);
    assert_eq!(printed.await.unwrap(), "last words");
    assert_eq!(code(shim.delete("web", "").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn nobody_hears_of_an_end_before_the_last_byte_is_out() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    let printed = shim.reader("web");
    shim.start("web", "").await.unwrap();
    let mut guest = shim.pod.guest("container-1");
    shim.topics(2).await;

    shim.pod.end("container-1", 0);

    let early = timeout(Duration::from_millis(200), shim.events.recv()).await;
    assert!(early.is_err(), "{early:?}");
    let written = move || guest.stdout.write_all(&vec![b'x'; 1 << 20]).unwrap();
    tokio::task::spawn_blocking(written).await.unwrap();
    let (topic, event) = shim.event().await;
    let exit = TaskExit::parse_from_bytes(&event).unwrap();
    assert_eq!((topic.as_str(), exit.id.as_str()), ("/tasks/exit", "web"));
    assert_eq!(printed.await.unwrap().len(), 1 << 20);
}

#[tokio::test]
async fn both_versions_of_the_api_answer() {
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    let connect = ConnectRequest {
        id: "web".into(),
        ..Default::default()
    };
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut request = ttrpc::Request::new();
        request.set_service(service.into());
        request.set_method("Connect".into());
        request.payload = connect.write_to_bytes().unwrap();

        let response = shim.connection.request(request).await.unwrap();

        let response = ConnectResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!(response.shim_pid, std::process::id());
    }
}

#[tokio::test]
async fn a_creation_that_is_asked_for_again_is_answered_the_same() {
    let shim = Shim::new().await;
    let bundle = shim.bundle("web", "");
    let request = shim.request("web", &bundle);
    let other = CreateTaskRequest {
        bundle: "/elsewhere".into(),
        ..request.clone()
    };

    let first = shim.client.create(within(), &request).await.unwrap();
    let second = shim.client.create(within(), &request).await.unwrap();
    let third = shim.client.create(within(), &other).await;

    assert_eq!(first.pid, second.pid);
    assert_eq!(shim.pod.guests.lock().unwrap().len(), 1);
    assert_eq!(code(third), Code::ALREADY_EXISTS);
}

#[tokio::test]
async fn a_container_that_does_not_start_can_be_deleted() {
    let mut shim = Shim::new().await;
    *shim.pod.refuse_start.lock().unwrap() = true;
    shim.create("web", "").await.unwrap();

    let started = shim.start("web", "").await;

    assert!(started.is_err());
    assert_eq!(shim.delete("web", "").await.unwrap().exit_status, 137);
    assert_eq!(shim.topics(2).await, ["/tasks/create", "/tasks/delete"]);
    assert!(!*shim.pod.up.borrow());
}

#[tokio::test]
async fn what_runs_is_not_deleted_and_what_has_ended_is_not_killed() {
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();

    assert_eq!(
        code(shim.delete("web", "").await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code(shim.start("web", "").await), Code::FAILED_PRECONDITION);
    shim.kill("web", 15).await.unwrap();
    assert_eq!(
        *shim.pod.signals.lock().unwrap(),
        [("container-1".to_owned(), 15, false)]
    );

    drop(shim.pod.guest("container-1"));
    shim.pod.end("container-1", 143);
    assert_eq!(shim.wait("web").await, 143);
    assert_eq!(code(shim.kill("web", 9).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_sandbox_ends_with_all_that_is_in_it() {
    let shim = Shim::new().await;
    shim.create("pod", SANDBOX).await.unwrap();
    shim.start("pod", "").await.unwrap();
    shim.create("one", MEMBER).await.unwrap();
    shim.start("one", "").await.unwrap();
    // A container that ends leaves the pod.
    drop(shim.pod.guest("container-1"));
    shim.pod.end("container-1", 0);
    assert_eq!(shim.wait("one").await, 0);
    shim.delete("one", "").await.unwrap();
    assert!(*shim.pod.up.borrow());
    shim.create("two", MEMBER).await.unwrap();
    shim.start("two", "").await.unwrap();

    shim.kill("pod", 9).await.unwrap();

    assert_eq!(shim.wait("pod").await, 137);
    assert_eq!(shim.wait("two").await, 137);
    shim.delete("two", "").await.unwrap();
    shim.delete("pod", "").await.unwrap();
    let shutdown = ShutdownRequest::default();
    shim.client.shutdown(within(), &shutdown).await.unwrap();
    timeout(LONG, shim.tasks.done()).await.unwrap();
}

#[tokio::test]
async fn a_container_of_another_pod_is_refused() {
    let shim = Shim::new().await;
    shim.create("other", SANDBOX).await.unwrap();

    let refused = shim.create("one", MEMBER).await;

    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_shim_with_tasks_stays() {
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();

    let shutdown = ShutdownRequest::default();
    shim.client.shutdown(within(), &shutdown).await.unwrap();

    let done = timeout(Duration::from_millis(100), shim.tasks.done()).await;
    assert!(done.is_err());
    assert!(*shim.pod.up.borrow());
}

#[tokio::test]
async fn a_further_process_reads_its_input_to_the_end() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    let places = shim.bundle("exec", "");
    let spec = br#"{"args":["cat"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    let mut exec = ExecProcessRequest {
        id: "web".into(),
        exec_id: "e".into(),
        stdin: places.join("stdin").display().to_string(),
        stdout: places.join("stdout").display().to_string(),
        ..Default::default()
    };
    exec.spec.mut_or_insert_default().value = spec;
    shim.client.exec(within(), &exec).await.unwrap();
    shim.start("web", "e").await.unwrap();
    let mut guest = shim.pod.guest("exec-2");

    std::fs::write(&exec.stdin, "what comes in").unwrap();
    let close = CloseIORequest {
        id: "web".into(),
        exec_id: "e".into(),
        stdin: true,
        ..Default::default()
    };
    shim.client.close_io(within(), &close).await.unwrap();

    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        guest.stdin.read_to_string(&mut text).unwrap();
        text
    });
    assert_eq!(read.await.unwrap(), "what comes in");
    shim.pod.end("exec-2", 5);
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
    ];
    assert_eq!(shim.topics(4).await, topics);
    let (_, exit) = shim.event().await;
    let exit = TaskExit::parse_from_bytes(&exit).unwrap();
    assert_eq!((exit.id.as_str(), exit.exit_status), ("e", 5));
    // The event comes first, the state follows.
    let wait = WaitRequest {
        id: "web".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    shim.client.wait(within(), &wait).await.unwrap();
    assert_eq!(shim.delete("web", "e").await.unwrap().exit_status, 5);
}

#[tokio::test]
async fn the_guests_own_processes_are_listed() {
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();

    let request = PidsRequest {
        id: "web".into(),
        ..Default::default()
    };
    let pids = shim.client.pids(within(), &request).await.unwrap();

    let pids: Vec<u32> = pids.processes.iter().map(|process| process.pid).collect();
    assert_eq!(pids, [7, 9]);
}
