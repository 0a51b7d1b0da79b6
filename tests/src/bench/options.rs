//! What is to be measured.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Measure Hull against its peers, in one run, and print medians, spreads and ratios. Started by scripts/bench.
#[derive(Debug, Parser)]
pub struct Options {
    /// One round of what is cheap: under a minute in the lab
    #[arg(long)]
    pub short: bool,
    /// How often each is measured [default: 5; with --short 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// How many idle pods there are at once
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..))]
    pub pods: u16,
    /// Write all that was measured to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure the release build in this directory, too
    #[arg(long, value_name = "TREE")]
    pub compare: Option<PathBuf>,
    /// [default: start memory clone; with --short start memory]
    groups: Vec<Group>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// From a VMM's start to init, and from a command to a container's first output
    Start,
    /// What idle pods hold
    Memory,
    /// Machines from templates and snapshots
    Clone,
    /// Throughput, packets a second and latency between host and pod
    Network,
    /// Under containerd: starts, execs and memory
    Containerd,
}

impl Options {
    #[must_use]
    pub fn rounds(&self) -> usize {
        self.rounds
            .map_or(if self.short { 1 } else { 5 }, usize::from)
    }

    /// Of what takes minutes.
    #[must_use]
    pub fn long_rounds(&self) -> usize {
        self.rounds().div_ceil(3)
    }

    #[must_use]
    pub fn groups(&self) -> Vec<Group> {
        match (self.groups.as_slice(), self.short) {
            ([], true) => vec![Group::Start, Group::Memory],
            ([], false) => vec![Group::Start, Group::Memory, Group::Clone],
            (groups, _) => groups.to_vec(),
        }
    }
}
