//! That the pod, or one container of it, is to end, and until when they have time for it.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// None until somebody asks.
type Deadline = watch::Sender<Option<Instant>>;

/// Whether, and by when. Asked for by anybody at any time, seen by all who wait for something.
#[derive(Debug, Clone)]
pub struct Stop {
    deadline: Deadline,
    /// `terminationGracePeriodSeconds`.
    grace: Duration,
    /// Whose end is this one's, too.
    outer: Option<Deadline>,
}

impl Stop {
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self {
            deadline: watch::Sender::new(None),
            grace,
            outer: None,
        }
    }

    /// For a part of what this one is for: it ends with the whole, or before it.
    #[must_use]
    pub fn part(&self) -> Self {
        Self {
            outer: Some(self.deadline.clone()),
            ..Self::new(self.grace)
        }
    }

    /// Asks for the end. Asked again, the earlier deadline holds.
    pub fn request(&self, grace: Option<Duration>) {
        // A bound, because an Instant in a million years can't be had.
        let grace = grace
            .unwrap_or(self.grace)
            .min(Duration::from_secs(10 * 365 * 86_400));
        let asked = Instant::now() + grace;
        self.deadline.send_modify(|deadline| {
            *deadline = Some(deadline.map_or(asked, |earlier| earlier.min(asked)));
        });
    }

    #[must_use]
    pub fn is_requested(&self) -> bool {
        let asked = |deadline: &Deadline| deadline.borrow().is_some();
        asked(&self.deadline) || self.outer.as_ref().is_some_and(asked)
    }

    /// Until somebody asks.
    pub async fn requested(&self) {
        either(&self.deadline, self.outer.as_ref(), asked).await;
    }

    /// Until the time is up, which may come earlier than it looked at first.
    pub async fn deadline(&self) {
        either(&self.deadline, self.outer.as_ref(), passed).await;
    }
}

async fn either(own: &Deadline, outer: Option<&Deadline>, wait: impl AsyncFn(&Deadline)) {
    match outer {
        None => wait(own).await,
        Some(outer) => tokio::select! {
            () = wait(own) => {}
            () = wait(outer) => {}
        },
    }
}

async fn asked(deadline: &Deadline) {
    // The sender is the caller's, so this can't fail.
    let _ = deadline.subscribe().wait_for(Option::is_some).await;
}

async fn passed(deadline: &Deadline) {
    let mut receiver = deadline.subscribe();
    loop {
        let deadline = *receiver.borrow_and_update();
        match deadline {
            Some(at) => tokio::select! {
                () = sleep_until(at) => return,
                _ = receiver.changed() => {}
            },
            None => {
                let _ = receiver.changed().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[tokio::test]
    async fn the_second_request_shortens_the_grace() {
        let stop = Stop::new(Duration::from_secs(3600));
        stop.request(None);
        let waiting = stop.clone();
        let waits = tokio::spawn(async move { waiting.deadline().await });

        stop.request(Some(Duration::ZERO));

        timeout(Duration::from_secs(5), waits)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_later_request_does_not_lengthen_it() {
        let stop = Stop::new(Duration::ZERO);
        stop.request(None);

        stop.request(Some(Duration::from_secs(3600)));

        timeout(Duration::from_secs(5), stop.deadline())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_part_ends_with_the_whole_and_not_the_other_way_round() {
        let whole = Stop::new(Duration::from_secs(3600));
        let (one, other) = (whole.part(), whole.part());

        one.request(Some(Duration::ZERO));

        let limit = Duration::from_secs(5);
        timeout(limit, one.deadline()).await.unwrap();
        assert!(!whole.is_requested() && !other.is_requested());

        whole.request(Some(Duration::ZERO));

        timeout(limit, other.requested()).await.unwrap();
        timeout(limit, other.deadline()).await.unwrap();
        assert!(other.is_requested());
    }

    #[tokio::test]
    async fn nothing_ends_before_it_is_asked_to() {
        let stop = Stop::new(Duration::ZERO);

        assert!(
            timeout(Duration::from_millis(20), stop.requested())
                .await
                .is_err()
        );
        assert!(
            timeout(Duration::from_millis(20), stop.deadline())
                .await
                .is_err()
        );
    }
}
