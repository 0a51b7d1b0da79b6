//! `hull kill`: a signal for a container, or for infra.

use hull_pod::client::Client;
use hull_pod::signal;
use hull_pod::state::Liveness;
use hull_pod::supervisor::api::Target;

use crate::Host;
use crate::failure::Failure;
use crate::pods;

/// Send a signal to the first process of containers, or to infra (which ends the pod)
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id
    pod: String,
    /// The container [default: every one that runs]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// The process that holds the pod's namespaces
    #[arg(long, conflicts_with = "container")]
    infra: bool,
    /// Name or number
    #[arg(short, long, default_value = "KILL", value_parser = parse_signal)]
    signal: u32,
}

fn parse_signal(text: &str) -> Result<u32, String> {
    signal::parse(text).ok_or_else(|| "no such signal".into())
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let record = host.registry()?.find(&args.pod)?;
    if record.liveness == Liveness::Dead {
        return Err(Failure::Failed(format!(
            "pod {} is not running",
            record.status.name
        )));
    }
    let targets = match (args.infra, args.container) {
        (true, _) => vec![Target::Infra],
        (false, Some(name)) => vec![Target::Container(name)],
        (false, None) => record
            .status
            .all_containers()
            .filter(|c| c.is_running())
            .map(|c| Target::Container(c.name.clone()))
            .collect(),
    };
    pods::runtime()?.block_on(async {
        let client = Client::connect(&record.dir)?;
        for target in targets {
            client.kill(target, args.signal).await?;
        }
        Ok(())
    })
}
