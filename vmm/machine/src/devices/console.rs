//! virtio console.
