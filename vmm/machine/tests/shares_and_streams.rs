//! Shares and vsock as a Linux guest has them.
//!
//! This program is both sides: on the host it starts `hull-vmm` with itself as the guest's `/init`, and as process 1
//! of the guest it mounts the shares, uses them, and serves vsock ports, and says on the console what went
//! wrong. Needs root, KVM, and `HULL_GUEST_DIR` with the images that `guest-image/build` makes:
//! `scripts/with-kvm PROGRAM`; without them it does nothing.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of it is a test"
)]

#[path = "shares_and_streams/files.rs"]
mod files;
#[path = "shares_and_streams/guest.rs"]
mod guest;
#[path = "shares_and_streams/host.rs"]
mod host;
#[path = "shares_and_streams/initramfs.rs"]
mod initramfs;
#[path = "shares_and_streams/vsock.rs"]
mod vsock;

use std::process::ExitCode;

/// Where both sides meet.
mod ports {
    /// Of the host: the guest says that it is up, and how its files fared.
    pub const READY: u32 = 1024;
    /// Of the guest: gives back what it gets, until it gets no more.
    pub const ECHO: u32 = 2000;
    /// Of the guest: takes all, then says how many bytes that was.
    pub const SINK: u32 = 2001;
    /// Of the guest: told a number, sends as many bytes.
    pub const SOURCE: u32 = 2002;
    /// Of the guest: powers off.
    pub const END: u32 = 2003;
    /// Of either side: nobody listens.
    pub const NOBODY: u32 = 9999;
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        guest::run();
    }
    if std::env::args().any(|argument| argument == "--list") {
        println!("shares_and_streams: test");
        return ExitCode::SUCCESS;
    }
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    match std::env::var_os("HULL_GUEST_DIR") {
        Some(image) => host::run(image.as_ref(), &filter.unwrap_or_default()),
        None => {
            println!("ignored, needs HULL_GUEST_DIR and KVM (scripts/with-kvm)");
            ExitCode::SUCCESS
        }
    }
}
