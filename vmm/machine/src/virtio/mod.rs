//! Virtio: what a device is, apart from its transport.

pub mod device;
