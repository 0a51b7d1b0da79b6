//! virtio rng.
