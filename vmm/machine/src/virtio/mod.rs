//! Virtio: what a device is, and the registers by which a driver brings it to life.

pub mod buffers;
pub mod device;
mod queues;
mod serve;
mod status;
pub mod transport;
