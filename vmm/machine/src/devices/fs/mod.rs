//! virtio-fs: a share served from this process.
