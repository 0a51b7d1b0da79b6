//! `/init` of the guest.

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_agent::run()
}
