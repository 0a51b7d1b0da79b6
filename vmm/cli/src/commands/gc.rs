//! `hull gc`: removes what killed supervisors left behind, and templates that nothing begins with.

use hull_pod::templates::Templates;

use crate::Host;
use crate::failure::Failure;

/// Remove what is left of pods whose supervisor was killed
///
/// Templates that no pod can begin with any more, too.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Pods that ended in order, too, with their logs
    #[arg(short, long)]
    all: bool,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    for id in host.registry()?.collect_garbage(args.all)? {
        println!("{id}");
    }
    Ok(Templates::open(host.directories.data())?.tidy()?)
}
