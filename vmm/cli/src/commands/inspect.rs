//! `hull inspect`: all that is known of a pod.

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, print_value};
use crate::pods::{as_kubernetes, list};

/// Show all that is known of pods: manifest and status, as Kubernetes writes them
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    #[command(flatten)]
    output: crate::output::OutputArgs,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let registry = host.registry()?;
    let items = args
        .pods
        .iter()
        .map(|pod| as_kubernetes(&registry.find(pod)?))
        .collect::<Result<_, Failure>>()?;
    print_value(
        &list(items, false),
        args.output.output.unwrap_or(Format::Json),
    )
}
