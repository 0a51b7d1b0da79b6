//! containerd's tasks and CRI's pods, with the real containerd and real virtual machines.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test reports by panicking"
)]

mod monitor;
mod options;
mod tasks;
