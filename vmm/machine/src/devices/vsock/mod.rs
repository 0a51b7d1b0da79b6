//! virtio-vsock onto unix sockets.
