//! Process 1 of the guest: infra namespaces and containers.
//!
//! One binary with four roles: process 1 ([`run`]), helpers that make processes
//! ([`helper`]), infra, which a helper becomes, and what the kernel asks for a module
//! ([`modules`]).

mod boot;
mod container;
pub mod endpoint;
mod entropy;
pub mod error;
mod growth;
mod helper;
mod message;
mod modules;
mod network;
mod pod;
mod process;
pub mod server;
mod service;
mod stdio;
mod streams;
mod vsock;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use server::Agent;
use tracing::level_filters::LevelFilter;

pub use container::cgroup::set_up as set_up_cgroups;

/// The agent's own directory.
pub const RUN: &str = "/run/hull";

/// Threads for what may block on a file system.
const BLOCKING_THREADS: usize = 64;
const WORKERS: usize = 2;

/// Takes the role that the process was started for.
pub fn run() -> ExitCode {
    if let Some(code) = run_helper() {
        return code;
    }
    if std::process::id() != 1 {
        eprintln!("hull-agent is process 1 of a hull guest and can't be run otherwise.");
        return ExitCode::from(2);
    }
    // A return would be an exit of process 1: all ends in a power-off or a panic,
    // and the panic of process 1 is the kernel's.
    init()
}

/// Runs helpers, if the process was started for them.
pub fn run_helper() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    let name = Path::new(&name).file_name()?.to_str()?;
    if name == modules::HELPER_NAME {
        return Some(modules::main());
    }
    helper::main(name)
}

fn init() -> ! {
    let started = service::boot_time();
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("hull-agent: {panic}");
        // Not only the thread that panicked: half an agent is worse than none.
        std::process::abort();
    }));
    if let Err(error) = boot::boot() {
        boot::report(&error);
        boot::power_off();
    }
    log_to_console();
    match runtime().and_then(|runtime| {
        runtime
            .block_on(serve(started))
            .map_err(std::io::Error::other)
    }) {
        Ok(()) => {}
        Err(error) => eprintln!("hull-agent: {error}"),
    }
    boot::power_off()
}

async fn serve(started: Duration) -> error::Result<()> {
    let agent = Arc::new(Agent::start(PathBuf::from(RUN), started).await?);
    let served = tokio::select! {
        served = vsock::serve(Arc::clone(&agent)) => served,
        () = agent.shutdown.notified() => Ok(()),
    };
    agent.pod.end().await;
    served
}

/// The agent's runtime.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
}

fn log_to_console() {
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::INFO)
        .with_ansi(false)
        .without_time()
        .with_writer(std::io::stderr)
        .init();
}
