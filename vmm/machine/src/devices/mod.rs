//! The virtio devices. Each has the same rooms: device, queue handling, requests.

pub mod balloon;
pub mod block;
pub mod console;
#[cfg(test)]
mod driver;
#[cfg(test)]
mod driver_queue;
pub mod fs;
#[cfg(test)]
mod hostile;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;
pub mod worker;
