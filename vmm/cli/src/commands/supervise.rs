//! `hull supervise`: the process behind a pod. Started by `hull run`.

use std::io;

use hull_pod::state::PodId;
use hull_pod::supervisor;
use tracing_subscriber::EnvFilter;

use crate::Host;
use crate::failure::Failure;

/// Supervise a pod (started by `hull run`)
#[derive(Debug, clap::Args)]
pub struct Args {
    id: String,
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let id = PodId::try_from(args.id).map_err(Failure::Input)?;
    let configuration = host.configuration()?;
    let filter = EnvFilter::try_from_env("HULL_LOG")
        .unwrap_or_else(|_| EnvFilter::new(configuration.log_level.to_string()));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    supervisor::supervise(&host.directories, &id, configuration)
        .inspect_err(supervisor::report)
        .map_err(Failure::from)
}
