//! `hull rm`: removes pods that have ended, with their logs.

use hull_pod::state::StateError;

use crate::Host;
use crate::failure::Failure;
use crate::pods;

/// Remove pods that have ended, with their logs and emptyDir volumes
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(required_unless_present = "all", value_name = "POD")]
    pods: Vec<String>,
    /// All pods
    #[arg(short, long, conflicts_with = "pods")]
    all: bool,
    /// Kill what runs, and don't complain of what isn't there
    #[arg(short, long)]
    force: bool,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let registry = host.registry()?;
    let mut records = Vec::new();
    if args.all {
        records = registry.list()?;
    }
    for pod in &args.pods {
        match registry.find(pod) {
            Ok(record) => records.push(record),
            Err(StateError::NoSuchPod(_)) if args.force => {}
            Err(error) => return Err(error.into()),
        }
    }
    pods::runtime()?.block_on(async {
        let mut first_failure = None;
        for record in &records {
            match pods::remove(&registry, record, args.force).await {
                Ok(()) => println!("{}", record.status.name),
                Err(failure) => {
                    first_failure.get_or_insert(failure);
                }
            }
        }
        first_failure.map_or(Ok(()), Err)
    })
}
