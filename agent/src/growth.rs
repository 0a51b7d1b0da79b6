//! Processors and memory that the machine has beyond what the kernel booted with.
//!
//! A machine that was cloned from a template, which is small, becomes its pod's size. That goes on while the pod is
//! made; only containers' programs wait for it, as many count processors and memory once, when they start.

use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::container::stats::total_memory;
use crate::error::{Doing, Error, Result};

/// As many processors as a machine can have.
const MAX_PROCESSORS: u32 = 64;
/// How long containers wait for memory. The kernel may take less than it is offered.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether memory is there: each look takes some microseconds.
const INTERVAL: Duration = Duration::from_millis(2);
/// What the kernel does with memory that comes.
const AUTO_ONLINE: &str = "/sys/devices/system/memory/auto_online_blocks";
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Has the kernel use memory that comes, for everything: in the alternative, a zone of movable pages, that memory
/// could be taken away again whole, but page tables, sockets and files' names would all have to fit into what the
/// machine booted with, and a pod much larger than its template would die for want of memory while it has plenty.
pub fn take_memory_that_comes() -> Result<()> {
    let path = Path::new(AUTO_ONLINE);
    // A kernel to which memory can't come.
    if !path.exists() {
        return Ok(());
    }
    fs::write(path, "online").doing(|| format!("writing to {AUTO_ONLINE}"))
}

/// How far the machine is on the way to its size.
#[derive(Debug)]
pub struct Growth {
    /// Bytes of memory when the agent started.
    booted_with: u64,
    /// Whether the last growth that was asked for is over.
    over: Mutex<watch::Receiver<bool>>,
}

impl Growth {
    /// `booted_with` is how many bytes of memory the kernel had before any came.
    pub fn new(booted_with: u64) -> Self {
        Self {
            booted_with,
            over: Mutex::new(watch::channel(true).1),
        }
    }

    /// Begins to use this many processors (0: as many as run) and the memory that is to come, and returns at once.
    /// Needs a runtime.
    pub fn begin(&self, processors: u32, added_mib: u32) -> Result<()> {
        if processors > MAX_PROCESSORS {
            return Err(Error::Invalid(format!(
                "{processors} processors are more than {MAX_PROCESSORS}"
            )));
        }
        let memory = self.booted_with.saturating_add(u64::from(added_mib) << 20);
        let (ended, over) = watch::channel(false);
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = over;
        tokio::spawn(async move {
            // What fails is written down, and a smaller machine than was asked for goes on.
            let started = tokio::task::spawn_blocking(move || start_processors(processors));
            if added_mib > 0 && timeout(PATIENCE, memory_of(memory)).await.is_err() {
                tracing::warn!("not all of {added_mib} MiB of memory came in time");
            }
            let _ = started.await;
            // Nobody may be interested.
            let _ = ended.send(true);
        });
        Ok(())
    }

    /// Waits until it is over.
    pub async fn over(&self) {
        let mut over = self
            .over
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        // An error is the end of the task, and so of the growth.
        let _ = over.wait_for(|over| *over).await;
    }
}

fn start_processors(count: u32) {
    let running = std::thread::available_parallelism().map_or(1, NonZero::get);
    if usize::try_from(count).is_ok_and(|count| count <= running) {
        return;
    }
    for number in 1..count {
        let path = PathBuf::from(format!("{PROCESSORS}/cpu{number}/online"));
        // To start one that runs does nothing.
        if let Err(error) = fs::write(&path, "1") {
            tracing::warn!("starting processor {number}: {error}");
        }
    }
}

async fn memory_of(bytes: u64) {
    let since = Instant::now();
    while total_memory().is_ok_and(|total| total < bytes) {
        sleep(INTERVAL).await;
    }
    tracing::debug!("memory came in {:?}", since.elapsed());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_waited_for_where_nothing_is_to_come() {
        let growth = Growth::new(0);
        growth.over().await;

        growth.begin(0, 0).unwrap();

        growth.over().await;
    }

    #[tokio::test(start_paused = true)]
    async fn memory_that_does_not_come_is_waited_for_within_reason() {
        let growth = Growth::new(total_memory().unwrap());
        let begun = Instant::now();

        growth.begin(1, 1024).unwrap();
        growth.over().await;

        assert!(begun.elapsed() >= PATIENCE);
        assert!(begun.elapsed() < PATIENCE * 2);
    }

    #[tokio::test]
    async fn memory_that_is_there_is_not_waited_for() {
        let growth = Growth::new(0);

        growth.begin(1, 1).unwrap();

        growth.over().await;
    }

    #[tokio::test]
    async fn more_processors_than_machines_have_are_refused() {
        assert!(matches!(
            Growth::new(0).begin(65, 0),
            Err(Error::Invalid(_))
        ));
    }
}
