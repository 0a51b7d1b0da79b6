//! `hull pause` and `hull resume`: pods that stand still, and go on.

use hull_pod::client::Client;
use hull_pod::state::Liveness;

use crate::Host;
use crate::failure::Failure;
use crate::pods;

/// Stop the processors of pods; their connections stay, and their clocks go on
#[derive(Debug, clap::Args)]
pub struct PauseArgs {
    /// Names or ids
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

/// Let paused pods go on
#[derive(Debug, clap::Args)]
#[command(visible_alias = "unpause")]
pub struct ResumeArgs {
    /// Names or ids
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

pub fn pause(host: &Host, args: &PauseArgs) -> Result<(), Failure> {
    each(host, &args.pods, async |client| client.pause().await)
}

pub fn resume(host: &Host, args: &ResumeArgs) -> Result<(), Failure> {
    each(host, &args.pods, async |client| client.resume().await)
}

/// All are looked up before anything is done to one.
fn each(
    host: &Host,
    pods: &[String],
    ask: impl AsyncFn(&Client) -> Result<(), hull_pod::client::ClientError>,
) -> Result<(), Failure> {
    let registry = host.registry()?;
    let mut records = Vec::new();
    for pod in pods {
        let record = registry.find(pod)?;
        if record.liveness == Liveness::Dead {
            return Err(Failure::Failed(format!(
                "pod {} is not running",
                record.status.name
            )));
        }
        records.push(record);
    }
    pods::runtime()?.block_on(async {
        for record in records {
            ask(&Client::connect(&record.dir)?).await?;
            println!("{}", record.status.name);
        }
        Ok(())
    })
}
