//! Follows a container's log across restarts, until the container or its pod has ended.

use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

use super::read::{LogOptions, LogReader};
use super::{LogLine, instances};
use crate::state::{Liveness, PodDir, StateError, read_record};

/// How often a supervisor's death is looked for; everything else wakes the reader.
const LIVENESS: Duration = Duration::from_secs(1);

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    On,
    Stop,
}

/// Calls `each` with the wanted lines of a container and then with each new one, until it
/// answers [`Follow::Stop`], or the container has ended for good and all is read. Blocks.
///
/// `idle` is called whenever there is nothing new, at least each second.
///
/// # Errors
/// When a log can't be read.
pub fn follow(
    dir: &PodDir,
    container: &str,
    options: LogOptions,
    mut each: impl FnMut(LogLine) -> Follow,
    mut idle: impl FnMut() -> Follow,
) -> Result<(), StateError> {
    let logs = dir.container_logs(container);
    let watch = Watch::new()?;
    watch.add(dir.run())?;
    let mut current: Option<(u32, LogReader)> = None;
    let mut watching_logs = false;
    loop {
        // Watch, then state, then log: what comes after any of these wakes the next poll, and a
        // state that says "ended" is older than the log's last line is not.
        if !watching_logs {
            watching_logs = watch.add(&logs).is_ok();
        }
        let ended = ended(dir, container);
        loop {
            if let Some((_, reader)) = &mut current {
                while let Some(line) = reader.next()? {
                    if each(line) == Follow::Stop {
                        return Ok(());
                    }
                }
            }
            let Some(next) = next_instance(&logs, current.as_ref().map(|c| c.0), options) else {
                break;
            };
            let mut reader = LogReader::open(&logs, next)?;
            if current.is_none() {
                reader.start_at(&options)?;
            }
            current = Some((next, reader));
        }
        if ended || idle() == Follow::Stop {
            return Ok(());
        }
        watch.wait(LIVENESS)?;
    }
}

/// The newest start to begin with, unless all are wanted; after that, one after the other.
fn next_instance(logs: &Path, current: Option<u32>, options: LogOptions) -> Option<u32> {
    let found = instances(logs);
    match current {
        None if options.from_first => found.first().copied(),
        None => found.last().copied(),
        Some(current) => found.into_iter().find(|n| *n > current),
    }
}

/// Whether no further line can come.
fn ended(dir: &PodDir, container: &str) -> bool {
    match read_record(dir.clone()) {
        Ok(pod) => {
            pod.liveness == Liveness::Dead
                || pod.status.phase.ended()
                || pod.status.container(container).is_none_or(|c| c.finished)
        }
        // Removed.
        Err(_) => true,
    }
}

/// Wakes when something in a directory changes.
struct Watch(rustix::fd::OwnedFd);

impl Watch {
    fn new() -> Result<Self, StateError> {
        inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map(Self)
            .map_err(|e| StateError::io("watch", "inotify", e))
    }

    fn add(&self, dir: &Path) -> Result<(), StateError> {
        let flags = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::ONLYDIR;
        inotify::add_watch(&self.0, dir, flags)
            .map(drop)
            .map_err(|e| StateError::io("watch", dir, e))
    }

    fn wait(&self, limit: Duration) -> Result<(), StateError> {
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(1),
            tv_nsec: limit.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(StateError::io("watch", "inotify", e)),
        }
        // What changed doesn't matter, everything is looked at again.
        let mut events = [0u8; 4096];
        while rustix::io::read(&self.0, &mut events[..]).is_ok_and(|n| n > 0) {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::{LogWriter, StreamName};
    use crate::state::{Claim, ContainerStatus, Directories, Registry, write_status};

    fn pod(root: &Path) -> Claim {
        let registry = Registry::open(
            Directories::new(root.join("run"), root.join("data")),
            |_, _| Ok(()),
        )
        .unwrap();
        let containers = vec![ContainerStatus::new("main", "busybox")];
        registry
            .claim("web", "Always", vec![], containers, None)
            .unwrap()
    }

    #[test]
    fn follows_across_restarts_to_the_end() {
        let root = tempfile::tempdir().unwrap();
        let mut claim = pod(root.path());
        let dir = claim.dir.clone();
        let logs = dir.container_logs("main");
        let follower = std::thread::spawn(move || {
            let mut lines = Vec::new();
            follow(
                &dir,
                "main",
                LogOptions {
                    from_first: true,
                    ..LogOptions::default()
                },
                |line| {
                    lines.push(String::from_utf8(line.text).unwrap());
                    Follow::On
                },
                || Follow::On,
            )
            .unwrap();
            lines
        });

        let mut first = LogWriter::create(&logs, 0).unwrap();
        first.write(StreamName::Stdout, b"one\n").unwrap();
        first.write(StreamName::Stdout, b"two\n").unwrap();
        let mut second = LogWriter::create(&logs, 1).unwrap();
        second.write(StreamName::Stdout, b"three\n").unwrap();
        claim.status.containers[0].finished = true;
        write_status(&claim.dir, &claim.status).unwrap();

        assert_eq!(follower.join().unwrap(), ["one\n", "two\n", "three\n"]);
    }

    #[test]
    fn ends_when_the_supervisor_is_dead() {
        let root = tempfile::tempdir().unwrap();
        let claim = pod(root.path());
        let dir = claim.dir.clone();
        let mut log = LogWriter::create(&dir.container_logs("main"), 0).unwrap();
        log.write(StreamName::Stdout, b"last\n").unwrap();
        drop(claim);

        let mut lines = 0;
        follow(
            &dir,
            "main",
            LogOptions::default(),
            |_| {
                lines += 1;
                Follow::On
            },
            || Follow::On,
        )
        .unwrap();

        assert_eq!(lines, 1);
    }
}
