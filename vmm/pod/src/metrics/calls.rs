//! How long calls of the guest's agent take.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Upper bounds in seconds of a histogram's buckets; what took longer is in none of them.
pub const CALL_BOUNDS: [f64; 13] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0,
];

/// All calls of one name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CallMetrics {
    pub call: String,
    pub count: u64,
    /// Those that the agent refused, or did not answer.
    pub failed: u64,
    pub seconds: f64,
    /// How many are in each of [`CALL_BOUNDS`]' buckets, and in none before it.
    pub buckets: Vec<u64>,
}

/// Counts the calls of one agent. There are as many names as the protocol has.
#[derive(Debug, Default)]
pub struct Calls(Mutex<BTreeMap<&'static str, Histogram>>);

#[derive(Debug, Default)]
struct Histogram {
    count: u64,
    failed: u64,
    seconds: f64,
    buckets: [u64; CALL_BOUNDS.len()],
}

impl Calls {
    pub fn record(&self, call: &'static str, took: Duration, succeeded: bool) {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let histogram = calls.entry(call).or_default();
        let seconds = took.as_secs_f64();
        histogram.count += 1;
        histogram.failed += u64::from(!succeeded);
        histogram.seconds += seconds;
        let bucket = CALL_BOUNDS.iter().position(|bound| seconds <= *bound);
        if let Some(bucket) = bucket {
            histogram.buckets[bucket] += 1;
        }
    }

    #[must_use]
    pub fn read(&self) -> Vec<CallMetrics> {
        let calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        calls
            .iter()
            .map(|(call, histogram)| CallMetrics {
                call: (*call).into(),
                count: histogram.count,
                failed: histogram.failed,
                seconds: histogram.seconds,
                buckets: histogram.buckets.to_vec(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_in_the_first_bucket_that_it_fits() {
        let calls = Calls::default();

        calls.record("Exec", Duration::from_millis(1), true);
        calls.record("Exec", Duration::from_millis(30), false);
        calls.record("Exec", Duration::from_secs(60), true);

        let read = calls.read();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].count, read[0].failed), (3, 1));
        assert_eq!(read[0].buckets[..6], [1, 0, 0, 0, 0, 1]);
        assert_eq!(read[0].buckets.iter().sum::<u64>(), 2);
        assert!((read[0].seconds - 60.031).abs() < 1e-9);
    }
}
