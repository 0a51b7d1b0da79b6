//! A pod: a machine, its infra namespaces and its containers.

pub mod agent;
pub mod client;
pub mod configuration;
pub mod events;
pub mod footprint;
pub mod images;
pub mod logs;
pub mod manifest;
pub mod metrics;
pub mod network;
pub mod networks;
pub mod oci;
pub mod signal;
pub mod snapshots;
pub mod state;
pub mod supervisor;
pub mod templates;
pub mod text;
pub mod timeline;
pub mod volumes;
