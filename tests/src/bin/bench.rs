//! Measures Hull against its peers. Run by `scripts/bench`, which installs them.

use clap::Parser;
use hull_tests::bench::{self, options::Options};

fn main() {
    bench::run(&Options::parse());
}
