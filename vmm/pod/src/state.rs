//! A pod's directories and its state on disk.
