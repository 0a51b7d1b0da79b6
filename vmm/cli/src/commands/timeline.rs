//! `hull timeline`: how a pod started, moment by moment.

mod trace;
mod waterfall;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use hull_pod::timeline::Timeline;

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format as ValueFormat, print_text, print_value};
use crate::terminal;

/// Show how a pod started: when it came how far, and what took how long
///
/// A timeline is written when the pod's first container has printed something, or 10 seconds after it was started, or
/// at the pod's end; and kept until the pod is removed. A pod of containerd's has it in its bundle:
/// /run/containerd/io.containerd.runtime.v2.task/NAMESPACE/ID.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id; or a path (with a slash) of a timeline.json or of the directory that it is in
    #[arg(value_name = "POD|PATH")]
    pod: String,
    /// Instead of a waterfall. trace: for chrome://tracing and Perfetto
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Json,
    Yaml,
    Trace,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let (name, path) = find(host, &args.pod)?;
    let timeline = Timeline::read(&path)?;
    match args.output {
        Some(Format::Json) => print_value(&timeline, ValueFormat::Json),
        Some(Format::Yaml) => print_value(&timeline, ValueFormat::Yaml),
        Some(Format::Trace) => print_value(&trace::events(&name, &timeline), ValueFormat::Json),
        None => {
            let columns = terminal::size().map_or(waterfall::WIDE, |size| size.columns);
            print_text(&waterfall::draw(&name, &timeline, columns.into()))
        }
    }
}

/// What to call it, and where it is.
fn find(host: &Host, pod: &str) -> Result<(String, PathBuf), Failure> {
    if pod.contains('/') {
        return Ok((pod.to_owned(), Path::new(pod).to_owned()));
    }
    let record = host.registry()?.find(pod)?;
    Ok((record.status.name, record.dir.timeline()))
}
