//! `hull supervise`: the process behind a pod. Started by `hull run`.

use std::io;

use hull_pod::state::PodId;
use hull_pod::supervisor;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::prelude::*;

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
    // Not the library's filter from the environment, which brings regular expressions.
    let filter = std::env::var("HULL_LOG")
        .ok()
        .and_then(|filter| filter.parse::<Targets>().ok())
        .unwrap_or_else(|| Targets::new().with_default(configuration.log_level));
    let log = fmt::layer().with_writer(io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(log).with(filter).init();
    supervisor::supervise(&host.directories, &id, configuration)
        .inspect_err(supervisor::report)
        .map_err(Failure::from)
}
