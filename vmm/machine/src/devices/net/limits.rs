//! Rate limits: token buckets, shared by all queues of an interface that move packets the same way.
//!
//! A bucket fills at its rate up to its burst. A packet may pass as long as there is anything in it and
//! takes out all that it costs, into debt if need be: none is too long to pass ever, none is measured
//! before it is known how long it is, and over time the rate holds.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{DirectionLimits, RateLimit};

const NANOS_PER_SECOND: i128 = 1_000_000_000;
/// Shortest pause, so that packets after one come in bunches.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// Longest pause; whether that was enough is looked at again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What may go one way. Clones share it.
#[derive(Debug, Clone)]
pub struct Limiter(Option<Arc<Mutex<Buckets>>>);

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

impl Limiter {
    pub fn new(limits: DirectionLimits, now: Instant) -> Self {
        if limits.is_unlimited() {
            return Self(None);
        }
        let bucket = |limit: RateLimit| Bucket::new(limit, now);
        Self(Some(Arc::new(Mutex::new(Buckets {
            bytes: limits.bandwidth.map(bucket),
            packets: limits.packets.map(bucket),
        }))))
    }

    pub fn is_unlimited(&self) -> bool {
        self.0.is_none()
    }

    /// When the next packet may pass, if it has to wait.
    pub fn pause(&self) -> Option<Instant> {
        let mut buckets = self
            .0
            .as_ref()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let Buckets { bytes, packets } = &mut *buckets;
        [bytes, packets]
            .into_iter()
            .filter_map(|bucket| bucket.as_mut()?.pause(now))
            .max()
            .map(|pause| now + pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE))
    }

    /// A packet whose frame has so many bytes has passed.
    pub fn charge(&self, bytes: usize) {
        let Some(buckets) = &self.0 else {
            return;
        };
        let mut buckets = buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = &mut buckets.bytes {
            bucket.charge(bytes);
        }
        if let Some(bucket) = &mut buckets.packets {
            bucket.charge(1);
        }
    }
}

/// Tokens are counted in billionths, so that a rate per second is a whole number of them each nanosecond.
#[derive(Debug)]
struct Bucket {
    per_second: i128,
    capacity: i128,
    level: i128,
    filled: Instant,
}

impl Bucket {
    fn new(limit: RateLimit, now: Instant) -> Self {
        let capacity = i128::from(limit.burst.max(1)) * NANOS_PER_SECOND;
        Self {
            per_second: i128::from(limit.per_second.get()),
            capacity,
            level: capacity,
            filled: now,
        }
    }

    fn pause(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.filled).as_nanos();
        let gained = i128::try_from(passed)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.per_second);
        self.level = self.level.saturating_add(gained).min(self.capacity);
        self.filled = now;
        if self.level > 0 {
            return None;
        }
        let nanos = -self.level / self.per_second + 1;
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }

    fn charge(&mut self, tokens: usize) {
        let tokens = i128::try_from(tokens).unwrap_or(i128::MAX);
        self.level = self
            .level
            .saturating_sub(tokens.saturating_mul(NANOS_PER_SECOND));
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    fn bucket(per_second: u64, burst: u64) -> (Bucket, Instant) {
        let now = Instant::now();
        let limit = RateLimit {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst,
        };
        (Bucket::new(limit, now), now)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let (mut bucket, now) = bucket(1000, 100);

        let first = bucket.pause(now);
        bucket.charge(100);
        let empty = bucket.pause(now).unwrap();
        let later = bucket.pause(now + Duration::from_millis(1));

        assert_eq!(first, None);
        assert!(empty <= Duration::from_millis(1));
        assert_eq!(later, None);
    }

    #[test]
    fn a_packet_longer_than_the_burst_passes_and_is_paid_for() {
        let (mut bucket, now) = bucket(1000, 1);

        bucket.charge(1501);
        let pause = bucket.pause(now).unwrap();

        assert_eq!(pause.as_millis(), 1500);
        assert_eq!(bucket.pause(now + pause), None);
    }

    #[test]
    fn a_long_pause_saves_no_more_than_the_burst() {
        let (mut bucket, now) = bucket(u64::MAX, 10);
        let later = now + Duration::from_secs(1 << 40);

        bucket.pause(later);
        bucket.charge(10);

        assert!(bucket.pause(later).is_some());
    }

    #[test]
    fn any_limit_can_be_had() {
        let (mut bucket, now) = bucket(1, u64::MAX);

        bucket.charge(usize::MAX);
        bucket.charge(usize::MAX);

        assert!(bucket.pause(now).is_some());
    }

    #[test]
    fn of_two_limits_the_tighter_holds() {
        let rate = |per_second| RateLimit {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: 1,
        };
        let limits = DirectionLimits {
            bandwidth: Some(rate(1_000_000)),
            packets: Some(rate(1)),
        };
        let limiter = Limiter::new(limits, Instant::now());

        limiter.charge(1);
        limiter.charge(1);

        let due = limiter.pause().unwrap();
        assert!(due > Instant::now() + Duration::from_millis(500));
    }
}
