//! containerd's tasks and CRI's pods, with the real containerd and real virtual machines.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test reports by panicking"
)]

mod amounts;
mod leaks;
mod monitor;
mod options;
mod pods;
mod sandboxes;
mod tasks;
mod templates;
mod terminal;
mod wrong;
