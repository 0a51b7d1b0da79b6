//! `hull wait`: until pods are done.

use hull_pod::client::Client;
use hull_pod::state::{Liveness, PodRecord, PodStatus};

use crate::Host;
use crate::failure::Failure;
use crate::pods;

/// Wait until every container of the pods has ended for good, and print the pods' exit codes
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let registry = host.registry()?;
    let records = args
        .pods
        .iter()
        .map(|pod| registry.find(pod))
        .collect::<Result<Vec<_>, _>>()?;
    pods::runtime()?.block_on(async {
        for record in &records {
            println!("{}", wait(record).await?.exit_code());
        }
        Ok(())
    })
}

async fn wait(record: &PodRecord) -> Result<PodStatus, Failure> {
    if record.liveness == Liveness::Alive
        && let Ok(client) = Client::connect(&record.dir)
    {
        client.follow().await?;
        while let Some(status) = client.changed().await? {
            if status.completed || status.phase.ended() {
                return Ok(status);
            }
        }
    }
    // Its last state; or what is known, when it has been removed.
    Ok(record
        .reread()
        .map_or_else(|_| record.status.clone(), |r| r.status))
}
