//! virtio block.
