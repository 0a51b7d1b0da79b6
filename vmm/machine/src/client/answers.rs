//! Requests that wait for `hull-vmm`'s answers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Requests of one kind, and who waits for the answer of each.
#[derive(Debug)]
pub struct Answers<T> {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<T>>>,
}

impl<T> Default for Answers<T> {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }
}

impl<T> Answers<T> {
    pub fn begin(self: &Arc<Self>) -> Pending<T> {
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
    pub fn finish(&self, id: u64, answer: T) {
        if let Some(waiter) = self.waiting().remove(&id) {
            // A caller that has just gone away drops what it asked for as well.
            let _ = waiter.send(answer);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<T>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the request when its caller goes away.
#[derive(Debug)]
pub struct Pending<T> {
    pub id: u64,
    answers: Arc<Answers<T>>,
    receiver: oneshot::Receiver<T>,
}

impl<T> Pending<T> {
    pub async fn answer(mut self) -> Option<T> {
        (&mut self.receiver).await.ok()
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        self.answers.waiting().remove(&self.id);
    }
}
