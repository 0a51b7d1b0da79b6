//! `hull completion`: what a shell needs to complete our command line.

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use crate::Cli;
use crate::failure::Failure;
use crate::output::print_text;

/// Print a shell's completion script, for example: source <(hull completion bash)
#[derive(Debug, clap::Args)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    generate(args.shell, &mut Cli::command(), "hull", &mut script);
    print_text(&String::from_utf8_lossy(&script))
}
