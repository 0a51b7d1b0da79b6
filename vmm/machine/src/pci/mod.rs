//! The PCI root, its configuration space, and virtio devices on it.
