//! What the end-to-end tests share: the real `hull`, pods that end with their test,
//! and a look at what is left on the host.
//!
//! The tests need KVM; `scripts/test` runs them (in the lab where there is no
//! hardware virtualisation).

#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "a test helper reports by panicking"
)]

pub mod bench;
pub mod containerd;
pub mod cri;
pub mod cri_stream;
pub mod host;
pub mod hull;
pub mod network;
pub mod pod;

use std::time::{Duration, Instant};

/// How much longer than on metal things may take here (`HULL_TIMEOUT_SCALE`).
#[must_use]
pub fn scaled(base: Duration) -> Duration {
    let scale = std::env::var("HULL_TIMEOUT_SCALE")
        .ok()
        .and_then(|value| value.parse::<u32>().ok())
        .unwrap_or(1);
    base.saturating_mul(scale.max(1))
}

/// Waits until `ready` answers, or panics with what was waited for.
///
/// # Panics
/// After `limit`, scaled.
pub fn eventually<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
    let limit = scaled(limit);
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < limit, "after {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
