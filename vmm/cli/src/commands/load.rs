//! `hull load`: images from files.

use std::path::PathBuf;

use hull_pod::images::{Progress as Step, Store};

use crate::Host;
use crate::failure::Failure;
use crate::progress::Progress;

/// Load images from OCI layouts, OCI archives or Docker archives
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files or directories
    #[arg(required = true, value_name = "FILE|DIR")]
    paths: Vec<PathBuf>,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let _ = host.registry()?;
    let store = Store::open(host.directories.data())?;
    for path in &args.paths {
        let mut progress = Progress::new();
        let mut layer = (String::new(), 0);
        let loaded = store.load(path, &mut |step| match step {
            Step::Layer {
                index,
                count,
                digest,
                size,
            } => {
                let short: String = digest.chars().take(19).collect();
                layer = (format!("layer {index}/{count} {short}"), size);
                progress.bytes(&layer.0, 0, size);
            }
            Step::Bytes(done) => progress.bytes(&layer.0, done, layer.1),
            Step::Present | Step::Tagged(_) => {}
        })?;
        progress.finish();
        for image in loaded {
            println!("Loaded image: {}", image.reference.unwrap_or(image.id));
        }
    }
    Ok(())
}
