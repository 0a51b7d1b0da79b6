//! Takes a lock on a file without waiting, says `locked`, and holds it until it is killed.
//!
//! Usage: `lock flock|posix FILE`. Exit status 3: somebody else has it.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test helper reports by panicking"
)]

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock, flock};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().expect("flock or posix");
    let path = arguments.next().expect("a file");
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("the file");
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    let locked = match kind.as_str() {
        "flock" => flock(&file, exclusive),
        "posix" => fcntl_lock(&file, exclusive),
        _ => panic!("{kind}: flock or posix"),
    };
    match locked {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::ACCESS) => return ExitCode::from(3),
        Err(error) => panic!("{kind}: {error}"),
    }
    println!("locked");
    std::io::stdout().flush().expect("standard output");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
