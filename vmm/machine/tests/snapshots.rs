//! Machines that are put aside, and go on: themselves, and as clones.
//!
//! This program is the test and, in the guest, process 1, which does what it is asked over vsock. Needs root, KVM, and
//! `HULL_GUEST_DIR` with the image that `guest-image/build` makes: `scripts/with-kvm PROGRAM [FILTER]`.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of it is a test"
)]

#[path = "snapshots/clones.rs"]
mod clones;
#[path = "snapshots/guest.rs"]
mod guest;
#[path = "snapshots/host.rs"]
mod host;
#[path = "shares_and_streams/initramfs.rs"]
mod initramfs;
#[path = "snapshots/refused.rs"]
mod refused;
#[path = "shares_and_streams/vsock.rs"]
mod vsock;

use std::process::ExitCode;

/// Where the guest takes commands.
const COMMANDS: u32 = 3000;
/// Where the guest says that it is up.
const READY: u32 = 3001;

/// A test, by its name.
type Test = (&'static str, fn(&host::Template));

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::run();
    }
    let tests: Vec<Test> = clones::TESTS
        .iter()
        .chain(refused::TESTS)
        .copied()
        .collect();
    if std::env::args().any(|argument| argument == "--list") {
        for (name, _) in tests {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .unwrap_or_default();
    let Some(image) = std::env::var_os("HULL_GUEST_DIR") else {
        println!("ignored, needs HULL_GUEST_DIR and KVM (scripts/with-kvm)");
        return ExitCode::SUCCESS;
    };
    let chosen = tests.into_iter().filter(|(name, _)| name.contains(&filter));
    host::run(image.as_ref(), chosen.collect())
}
