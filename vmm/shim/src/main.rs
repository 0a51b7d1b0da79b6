//! containerd's task API over a pod.

mod arguments;
mod bundle;
mod events;
mod failure;
mod machine;
mod mounts;
mod pod;
mod service;
mod spec;
mod streams;
mod tasks;

fn main() {}
