//! Hull end to end: real manifests, real virtual machines, and what is left afterwards.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test reports by panicking"
)]

mod attach;
mod failures;
mod guests;
mod images;
mod load;
mod manifests;
mod pause;
mod pjdfstest;
mod pod_rules;
mod run;
mod streams;
mod volumes;
