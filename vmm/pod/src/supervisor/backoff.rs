//! How long to wait before a container is started again.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// Who has run for so long starts anew.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// As Kubernetes does it: at once, then 10 s, doubling up to 5 minutes.
#[derive(Debug, Default)]
pub struct Backoff {
    last: Option<Duration>,
}

impl Backoff {
    /// The wait before the next start of a container that has now ended, after `ran`.
    pub fn next(&mut self, ran: Duration) -> Duration {
        if ran >= FORGIVEN_AFTER {
            self.last = None;
        }
        let next = match self.last {
            None => Duration::ZERO,
            Some(Duration::ZERO) => FIRST,
            Some(last) => last.saturating_mul(2).min(LONGEST),
        };
        self.last = Some(next);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_immediate_and_then_it_doubles() {
        let mut backoff = Backoff::default();

        let seconds: Vec<u64> = (0..8)
            .map(|_| backoff.next(Duration::from_secs(1)).as_secs())
            .collect();

        assert_eq!(seconds, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn ten_good_minutes_are_a_new_start() {
        let mut backoff = Backoff::default();
        backoff.next(Duration::ZERO);
        backoff.next(Duration::ZERO);

        assert_eq!(backoff.next(Duration::from_secs(600)), Duration::ZERO);
    }
}
