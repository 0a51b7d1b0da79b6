//! The shim itself: a pod's supervisor that containerd asks.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hull_pod::configuration::{Configuration, ConfigurationError};
use hull_pod::network::{Namespace, WiringError};
use hull_pod::supervisor::{Limits, Maker};
use hull_pod::volumes::{VolumeError, enter_private_namespace};
use rustix::fs::Mode;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::arguments::Arguments;
use crate::bundle::{self, Bundle, BundleError};
use crate::cgroup;
use crate::events::{Events, Target};
use crate::host::Host;
use crate::machine::MachinePod;
use crate::metrics;
use crate::options;
use crate::service::services;
use crate::start::{READY, TTRPC_ADDRESS};
use crate::tasks::Tasks;
use crate::templates;

/// For the last events.
const FLUSH: Duration = Duration::from_secs(5);
/// For the kernel's out-of-memory killer: a little before containerd itself.
const OOM_STEP: i32 = 1;
const OOM_MAX: i32 = 1000;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the pod's network namespace")]
    Namespace(#[from] WiringError),
    #[error("mounts of its own")]
    Mounts(#[from] VolumeError),
    #[error("serving")]
    Server(#[from] ttrpc::Error),
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { doing, source }
}

/// Serves on the listening socket that is standard input, until the pod is deleted. Says [`READY`] on standard output
/// when it has begun.
///
/// # Errors
/// When it can't begin.
pub fn serve(arguments: &Arguments) -> Result<(), ServeError> {
    let listener = take_over()?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    let directory = std::env::current_dir().map_err(io_error("finding the bundle"))?;
    let configuration = Configuration::load(options::configuration_of_the_shim().as_deref())?;
    let level = if arguments.debug {
        LevelFilter::DEBUG
    } else {
        configuration.log_level
    };
    log_to(&directory.join("log"), level)?;
    raise_oom_score();
    let bundle = Bundle::read(&directory)?;
    let host = Host::here().map_err(io_error("opening the host's namespaces"))?;
    let maker = Maker::here().map_err(io_error("opening the host's namespaces"))?;
    if let Some(cgroup) = cgroup::of(&bundle.spec)
        && let Err(error) = cgroup::enter(&cgroup)
    {
        // The pod runs all the same, and is counted where containerd is.
        tracing::warn!(%error, cgroup = %cgroup.display(), "entering the pod's cgroup");
    }
    let namespace = match bundle.network() {
        bundle::Namespace::Path(path) => Some(Namespace::open(&path)?),
        bundle::Namespace::New => Some(Namespace::create()?),
        // Said when the container is made: only then does containerd show it to anybody.
        bundle::Namespace::Host => None,
    };
    if let Some(namespace) = &namespace {
        // For those who look for the pod's network by the pid that they are told.
        namespace.enter()?;
    }
    enter_private_namespace()?;
    std::fs::write(directory.join("shim.pid"), std::process::id().to_string())
        .map_err(io_error("writing shim.pid"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(io_error("starting tasks"))?;
    let pod = Arc::new(MachinePod::new(
        configuration.clone(),
        namespace,
        templates::tenant(arguments, &bundle),
        Arc::new(maker),
    ));
    let measured = metrics::serve(
        arguments,
        metrics::identity(arguments, &bundle),
        Arc::clone(&pod),
    );
    let limits = Limits::of(&configuration);
    let served = runtime.block_on(async {
        tokio::select! {
            served = run(arguments, pod, listener, host, limits) => served,
            () = measured => Ok(()),
        }
    });
    if let Some(socket) = socket {
        // Who finds it later would find nobody.
        let _ = std::fs::remove_file(socket);
    }
    // What waits for a disk or a FIFO must not hold up the end.
    runtime.shutdown_background();
    served
}

/// Takes the socket, and leaves containerd's session.
fn take_over() -> Result<UnixListener, ServeError> {
    let listener = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(io_error("taking the socket"))?;
    let null = File::open("/dev/null").map_err(io_error("opening /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|e| io_error("closing standard input")(e.into()))?;
    // Fails for who leads one already.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let listener = UnixListener::from(listener);
    listener
        .set_nonblocking(true)
        .map_err(io_error("taking the socket"))?;
    Ok(listener)
}

/// Logs go to containerd, which reads this FIFO and prints them. It is open for reading, too, so that there is no
/// broken pipe while containerd is restarted; what it doesn't read is lost.
fn log_to(path: &Path, level: LevelFilter) -> Result<(), ServeError> {
    let open = |path: &Path| {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(path)
    };
    let log = open(path)
        .or_else(|_| open(Path::new("/dev/null")))
        .map_err(io_error("opening the log"))?;
    // For panics, and for what hull-vmm says.
    rustix::stdio::dup2_stderr(&log).map_err(|e| io_error("opening the log")(e.into()))?;
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(level)
        .with_writer(Arc::new(log))
        .init();
    Ok(())
}

/// The kernel may refuse it, for the score of a containerd that may not be killed can't be told from outside.
fn raise_oom_score() {
    const FILE: &str = "/proc/self/oom_score_adj";
    let raised = std::fs::read_to_string(FILE).and_then(|text| {
        let score: i32 = text.trim().parse().map_err(io::Error::other)?;
        std::fs::write(FILE, (score + OOM_STEP).min(OOM_MAX).to_string())
    });
    if let Err(error) = raised {
        tracing::debug!(%error, "oom_score_adj");
    }
}

async fn run(
    arguments: &Arguments,
    pod: Arc<MachinePod>,
    listener: UnixListener,
    host: Host,
    limits: Limits,
) -> Result<(), ServeError> {
    let events = Events::new(Target {
        namespace: arguments.namespace.clone(),
        socket: std::env::var(TTRPC_ADDRESS).unwrap_or_default(),
        address: arguments.address.clone(),
        binary: arguments.publish_binary.clone(),
    });
    let tasks = Tasks::new(pod, host, events.clone(), limits);
    let listener = Listener::try_from(listener).map_err(io_error("taking the socket"))?;
    let mut server = Server::new()
        .register_service(services(&tasks))
        .add_listener(listener);
    server.start().await?;
    say_ready().map_err(io_error("telling that it serves"))?;
    let mut sigterm = signal(SignalKind::terminate()).map_err(io_error("watching signals"))?;
    tokio::select! {
        () = tasks.done() => {}
        // A host that shuts down asks in this way.
        _ = sigterm.recv() => tasks.shut_down(true).await,
    }
    events.flush(FLUSH).await;
    server.shutdown().await?;
    Ok(())
}

fn say_ready() -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(READY.as_bytes())?;
    stdout.flush()?;
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}
