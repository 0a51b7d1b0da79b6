//! Hull end to end: real manifests, real virtual machines, and what is left afterwards.

mod failures;
mod images;
mod load;
mod manifests;
mod pod_rules;
mod run;
mod streams;
mod volumes;
