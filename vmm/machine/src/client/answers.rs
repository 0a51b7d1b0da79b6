//! What `hull-vmm` was asked, and has not answered yet.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

type Waiting<E, T> = HashMap<u64, oneshot::Sender<Result<T, E>>>;

/// Requests of one kind that wait for their answer.
#[derive(Debug)]
pub(super) struct Answers<E, T = ()> {
    next: AtomicU64,
    waiting: Mutex<Waiting<E, T>>,
}

impl<E, T> Default for Answers<E, T> {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }
}

impl<E, T> Answers<E, T> {
    pub(super) fn begin(self: &Arc<Self>) -> Pending<E, T> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.waiting().insert(id, sender);
        Pending {
            id,
            answers: Arc::clone(self),
            receiver,
        }
    }

    /// An id that nobody waits for was given up by the caller, or made up by `hull-vmm`.
    pub(super) fn finish(&self, id: u64, result: Result<T, E>) {
        if let Some(waiter) = self.waiting().remove(&id) {
            // A caller that has just gone away drops what it asked for as well.
            let _ = waiter.send(result);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<E, T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the request when its caller goes away.
#[derive(Debug)]
pub(super) struct Pending<E, T = ()> {
    pub(super) id: u64,
    answers: Arc<Answers<E, T>>,
    receiver: oneshot::Receiver<Result<T, E>>,
}

impl<E, T> Pending<E, T> {
    pub(super) async fn answer(mut self) -> Option<Result<T, E>> {
        (&mut self.receiver).await.ok()
    }
}

impl<E, T> Drop for Pending<E, T> {
    fn drop(&mut self) {
        self.answers.waiting().remove(&self.id);
    }
}
