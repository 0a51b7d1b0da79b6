//! Hull against its peers, interleaved on one machine: what `scripts/bench` runs.
//!
//! Absolute times say nothing where the machine is emulated; ratios within one run do. Nothing here fails for a time: only
//! for what doesn't work.

mod boot;
mod build;
mod clone;
mod containerd;
mod firecracker;
mod memory;
mod network;
pub mod options;
mod peers;
mod report;
mod series;
mod start;
mod targets;

use build::Build;
use options::{Group, Options};
use report::Report;

/// Measures, and prints it all.
///
/// # Panics
/// When something that is measured doesn't work.
pub fn run(options: &Options) {
    let builds = Build::all(options);
    let mut report = Report::new(options, &builds);
    report.print_head();
    for group in options.groups() {
        match group {
            Group::Start => {
                boot::measure(options, &builds, &mut report);
                start::measure(options, &builds, &mut report);
            }
            Group::Memory => memory::measure(options, &builds, &mut report),
            Group::Clone => clone::measure(options, &builds, &mut report),
            Group::Network => network::measure(options, &mut report),
            Group::Containerd => containerd::measure(options, &mut report),
        }
    }
    report.print_targets();
    if let Some(file) = &options.json {
        report.write(file);
    }
}
