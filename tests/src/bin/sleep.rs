//! Sleeps for as many seconds as its argument says, whatever the program's file is called.
//!
//! pjdfstest runs a copy of `sleep` under a random name, and busybox, which looks at its
//! name to know what to do, ends at once.

use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let Some(seconds) = seconds else {
        eprintln!("usage: sleep SECONDS");
        return ExitCode::from(2);
    };
    std::thread::sleep(Duration::from_secs(seconds));
    ExitCode::SUCCESS
}
