//! Blocking work on the host, beside a machine that boots.

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::failure::PodFailure;

/// What has been begun. It goes on when nobody waits for its outcome any more, so that whoever takes down what it
/// makes has to wait for its end.
#[derive(Debug, Default)]
pub struct Work(Vec<JoinHandle<()>>);

impl Work {
    /// Begins something on a thread of its own.
    pub fn begin<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> Result<T, PodFailure> + Send + 'static,
    ) -> Outcome<T> {
        let (done, outcome) = oneshot::channel();
        self.0.push(tokio::task::spawn_blocking(move || {
            // What nobody waits for any more is dropped here.
            let _ = done.send(work());
        }));
        Outcome(outcome)
    }

    /// Waits until nothing is under way.
    pub async fn finished(&mut self) {
        for work in self.0.drain(..) {
            // A panic aborts the process.
            let _ = work.await;
        }
    }
}

/// How one of it goes.
#[derive(Debug)]
pub struct Outcome<T>(oneshot::Receiver<Result<T, PodFailure>>);

impl<T> Outcome<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// That of the work.
    pub async fn wait(self) -> Result<T, PodFailure> {
        // Work that was begun says how it went, unless the process ends.
        self.0.await.unwrap_or(Err(PodFailure::Stopped))
    }
}
