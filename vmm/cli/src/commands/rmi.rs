//! `hull rmi`: images away.

use hull_pod::images::Store;

use crate::Host;
use crate::failure::Failure;

/// Remove images
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let _ = host.registry()?;
    let store = Store::open(host.directories.data())?;
    for image in &args.images {
        let removed = store.remove(image)?;
        for name in removed.untagged {
            println!("Untagged: {name}");
        }
        if let Some(id) = removed.deleted {
            println!("Deleted: {id}");
        }
    }
    Ok(())
}
