//! One pod, from its machine to its last container: a process of its own for each.
//!
//! The recipe is [`Pod::live`]. Everything made on the way belongs to the process: its mounts to
//! its mount namespace, the machine to its control socket, so that a supervisor that is killed
//! leaves files, and `hull gc` removes those.

pub mod api;
mod aside;
mod backoff;
mod boot;
mod console;
mod container;
mod disks;
mod exec;
mod failure;
mod guest;
mod installation;
mod join;
mod limits;
mod machine;
mod network;
mod output;
mod pause;
mod pod;
mod record;
mod server;
mod stop;
mod template;
mod work;

pub use boot::{Boot, Launched, Met, PassedOver, Recipe, Rejected};
pub use console::Console;
pub use disks::{Disks, DisksError, Inserted, MAX_SLOTS};
pub use failure::PodFailure;
pub use guest::Guest;
pub use installation::{Installation, InstallationError};
pub use limits::Limits;
pub use network::{HostNetwork, PodNetwork, Queues, RewireError};
pub use template::{MAKE_TEMPLATE, Maker, Order, Shelf, Wanted, make_ordered};

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use hull_machine::channel::{AsyncChannel, Channel, ChannelError, Listener, SocketError};
use hull_machine::client::SnapshotFiles;
use rustix::fs::Mode;
use tokio::signal::unix::{SignalKind, signal};

use crate::configuration::Configuration;
use crate::manifest::PodManifest;
use crate::networks::{Attachment, NetworkError};
use crate::oci;
use crate::snapshots::Restored;
use crate::state::{Directories, PodId, StateError, read_record};
use crate::text::chain;
use crate::timeline::{Place, Recorder};
use crate::volumes::VolumeError;
use api::Request;
use aside::Aside;
use pause::Pause;
pub(crate) use pod::PodContext;
pub use pod::TENANT;
use pod::{Changes, Pod};
use record::Record;
use server::Service;
use stop::Stop;

/// The environment of a supervisor's process, which sits beside its pod for as long as that lives. By itself the C
/// library has a heap for each thread, and each keeps what its thread once needed (`mallopt(3)`).
pub const ENVIRONMENT: [(&str, &str); 1] = [("MALLOC_ARENA_MAX", "1")];

/// A manifest is never longer than this once it has been read.
const MANIFEST_MAX: u64 = 16 << 20;

/// Why a supervisor did not even begin.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("this command is started by `hull run`, not by hand")]
    NotStarted,
    #[error("talking to hull run")]
    Channel(#[from] ChannelError),
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("mounts of its own")]
    Namespace(#[source] VolumeError),
    #[error("the pod's files")]
    State(#[from] StateError),
    #[error("the pod's socket")]
    Socket(#[from] SocketError),
    #[error("the pod's network")]
    Network(#[from] NetworkError),
    #[error("reading the pod's manifest")]
    Manifest(#[source] serde_json::Error),
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> SupervisorError {
    move |source| SupervisorError::Io { doing, source }
}

/// Runs the supervisor of a pod that has been claimed. Its standard input is one end of a
/// [`Channel`] on which [`Request::Start`] comes with the pod's lock; its starter is its first client.
///
/// # Errors
/// When it can't begin. What happens to the pod after that is in its state.
pub fn supervise(
    directories: &Directories,
    id: &PodId,
    configuration: Configuration,
) -> Result<(), SupervisorError> {
    let Start {
        channel,
        lock,
        requested,
        restored,
    } = take_over()?;
    let recorder = Recorder::begin(Some(requested));
    recorder.ended(Place::Hull, "check, claim and start", requested);
    // Never closed: who finds the lock free finds no supervisor.
    let _ = OwnedFd::from(lock).into_raw_fd();
    let host_mounts = File::open("/proc/thread-self/ns/mnt")
        .map_err(io_error("opening the host's mount namespace"))?
        .into();
    let maker = Arc::new(Maker::here().map_err(io_error("opening the host's namespaces"))?);
    crate::volumes::enter_private_namespace().map_err(SupervisorError::Namespace)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("starting tasks"))?;
    let result = runtime.block_on(serve(
        directories,
        id,
        configuration,
        channel,
        Origin { host_mounts, maker },
        restored,
        recorder,
    ));
    // A log that waits for its disk must not hold up the end.
    runtime.shutdown_background();
    result
}

/// What a supervisor begins with.
struct Start {
    channel: Channel,
    lock: File,
    requested: u64,
    restored: Option<Restored>,
}

/// What the supervisor came from, for what outlives its pod.
struct Origin {
    host_mounts: OwnedFd,
    maker: Arc<Maker>,
}

/// Takes the starter's channel, and over it the pod's lock.
fn take_over() -> Result<Start, SupervisorError> {
    let stdin = io::stdin();
    let channel = Channel::new(
        stdin
            .as_fd()
            .try_clone_to_owned()
            .map_err(io_error("taking the starter's socket"))?,
    );
    let null = File::open("/dev/null").map_err(io_error("opening /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|e| io_error("closing standard input")(e.into()))?;
    let received = channel.receive::<Request>();
    let Ok(Some((
        Request::Start {
            requested,
            restored,
        },
        descriptors,
    ))) = received
    else {
        return Err(received
            .err()
            .map_or(SupervisorError::NotStarted, SupervisorError::from));
    };
    let mut descriptors = descriptors.into_iter();
    let lock = descriptors.next().ok_or(SupervisorError::NotStarted)?;
    // The channel has checked that there are as many as the request says.
    let restored = match (restored, descriptors.next(), descriptors.next()) {
        (Some(size), Some(state), Some(memory)) => Some(Restored {
            size,
            machine: SnapshotFiles { state, memory },
        }),
        _ => None,
    };
    // Modes are meant as they are written, whatever the user's mask.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    Ok(Start {
        channel,
        lock: lock.into(),
        requested,
        restored,
    })
}

async fn serve(
    directories: &Directories,
    id: &PodId,
    configuration: Configuration,
    starter: Channel,
    origin: Origin,
    restored: Option<Restored>,
    recorder: Recorder,
) -> Result<(), SupervisorError> {
    let Origin { host_mounts, maker } = origin;
    let beginning = recorder.step("begin");
    let dir = directories.pod(id);
    let manifest = read_manifest(&dir.manifest())?;
    let mut status = read_record(dir.clone())?.status;
    status.supervisor_pid = Some(std::process::id());
    status.network = Attachment::open(directories, &dir)?.map(|attachment| attachment.status());
    let record = Arc::new(Record::new(dir.clone(), status, recorder.clone())?);
    let manifest = Arc::new(manifest);
    let (size, restored) = match restored {
        Some(restored) => (restored.size, Some(restored.machine)),
        None => (oci::machine_size(&manifest, configuration.sizing), None),
    };
    let stop = Stop::new(manifest.termination_grace_period());
    let pause = Arc::new(Pause::new(Arc::clone(&record), stop.clone()));
    let service = Arc::new(Service {
        aside: Aside {
            changes: Changes::default(),
            pause: Arc::clone(&pause),
            record: Arc::clone(&record),
            manifest: Arc::clone(&manifest),
            size,
            directories: directories.clone(),
        },
        record: Arc::clone(&record),
        stop: stop.clone(),
        limits: Limits::of(&configuration),
        agent: OnceLock::new(),
        meter: OnceLock::new(),
        pause,
        joins: OnceLock::new(),
    });

    let listener = Listener::bind(&dir.socket())?;
    tokio::spawn(Arc::clone(&service).listen(listener));
    let starter = AsyncChannel::new(starter).map_err(io_error("watching the starter's socket"))?;
    let first = Arc::clone(&service);
    tokio::spawn(async move { first.client(starter).await });
    tokio::spawn(stop_on_sigterm(stop.clone())?);
    tokio::spawn(recorder.keep(dir.timeline()));
    drop(beginning);

    Pod {
        directories: directories.clone(),
        configuration,
        host_mounts,
        maker,
        size,
        restored,
        manifest,
        record,
        stop,
        service,
    }
    .run()
    .await;
    Ok(())
}

/// A host that shuts down asks in this way.
fn stop_on_sigterm(stop: Stop) -> Result<impl Future<Output = ()>, SupervisorError> {
    let mut sigterm = signal(SignalKind::terminate()).map_err(io_error("watching signals"))?;
    Ok(async move {
        while sigterm.recv().await.is_some() {
            stop.request(None);
        }
    })
}

fn read_manifest(path: &std::path::Path) -> Result<PodManifest, SupervisorError> {
    use io::Read;
    let mut content = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MANIFEST_MAX).read_to_end(&mut content))
        .map_err(|e| StateError::io("read", path, e))?;
    serde_json::from_slice(&content).map_err(SupervisorError::Manifest)
}

/// Says in the supervisor's own log why it did not begin.
pub fn report(error: &SupervisorError) {
    tracing::error!(error = chain(error), "the supervisor did not begin");
}
