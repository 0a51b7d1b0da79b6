//! Hull end to end: real manifests, real virtual machines, and what is left afterwards.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test reports by panicking"
)]

mod attach;
mod bandwidth;
mod failures;
mod guests;
mod images;
mod isolation;
mod late_network;
mod leftovers;
mod load;
mod log_shipping;
mod manifests;
mod mesh;
mod netfilter;
mod pause;
mod pjdfstest;
mod pod_files;
mod pod_rules;
mod ports;
mod run;
mod snapshot;
mod streams;
mod templates;
mod timeline;
mod volumes;
mod wordpress;
