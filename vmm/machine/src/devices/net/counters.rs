//! What was lost, and why.

use std::sync::atomic::{AtomicU64, Ordering};

/// Packets and buffers that were dropped, of all queue pairs.
#[derive(Debug, Default)]
pub struct Counters {
    /// Of the driver's: a chain or header that makes no sense.
    pub malformed: AtomicU64,
    /// Of the driver's: there is no tap, or it does not take the packet.
    pub unsent: AtomicU64,
    /// Of the host's: longer than the buffers that the driver has, or nothing that it takes.
    pub unwanted: AtomicU64,
    /// Buffers for packets that can't take one.
    pub useless: AtomicU64,
}

/// Counts one.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
