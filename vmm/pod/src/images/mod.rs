//! The local image store: load, list, remove, and layers unpacked once.
