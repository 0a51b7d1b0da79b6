//! One virtual machine, jailed.

fn main() {}
