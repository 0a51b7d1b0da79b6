//! `hull stop`: ends pods in order.

use hull_pod::state::{Liveness, PodRecord};

use crate::Host;
use crate::failure::Failure;
use crate::pods;

/// Stop pods: SIGTERM to every container, SIGKILL after the grace period, then the machine
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(required_unless_present = "all", value_name = "POD")]
    pods: Vec<String>,
    /// All running pods
    #[arg(short, long, conflicts_with = "pods")]
    all: bool,
    /// Seconds between SIGTERM and SIGKILL [default: the manifest's terminationGracePeriodSeconds]
    #[arg(
        short,
        long = "time",
        value_name = "SECONDS",
        visible_alias = "grace-period"
    )]
    time: Option<u64>,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let registry = host.registry()?;
    let records = if args.all {
        let mut records = registry.list()?;
        records.retain(|r| r.liveness == Liveness::Alive);
        records
    } else {
        args.pods
            .iter()
            .map(|pod| registry.find(pod))
            .collect::<Result<_, _>>()?
    };
    pods::runtime()?.block_on(stop_all(&records, args.time))
}

/// All at once; one that fails does not hold up the others.
async fn stop_all(records: &[PodRecord], time: Option<u64>) -> Result<(), Failure> {
    let mut asked = Vec::new();
    for record in records.iter().filter(|r| r.liveness == Liveness::Alive) {
        if let Ok(client) = hull_pod::client::Client::connect(&record.dir) {
            client.stop(time).await?;
            asked.push(client);
        }
    }
    let mut first_failure = None;
    for record in records {
        match pods::stop(record, time).await {
            Ok(()) => println!("{}", record.status.name),
            Err(failure) => {
                first_failure.get_or_insert(failure);
            }
        }
    }
    first_failure.map_or(Ok(()), Err)
}
