//! Asks the pods of this host, each within a time.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_machine::channel::AsyncChannel;
use hull_pod::metrics::{Identity, Manager, PodMetrics, shims};
use hull_pod::state::{Liveness, Registry};
use hull_pod::supervisor::api::{Reply, Request};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Pods that are asked; others are only counted.
const PODS: usize = 4096;
/// At a time.
const AT_A_TIME: usize = 64;
/// For one that has not answered the last time: it is not waited for again.
const GLANCE: Duration = Duration::from_millis(10);

/// Upper bounds in seconds of the histogram of boots.
pub const BOOT_BOUNDS: [f64; 11] = [0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0];

/// What is known of this host's pods.
#[derive(Debug)]
pub struct Node {
    registry: Registry,
    limit: Duration,
    /// By their sockets.
    known: HashMap<PathBuf, Known>,
    boots: Boots,
}

#[derive(Debug, Default)]
struct Known {
    identity: Option<Identity>,
    /// On which an answer is still to come.
    owed: Option<AsyncChannel>,
    /// Its boot is in the histogram.
    counted: bool,
}

/// The boots of all pods that have been seen.
#[derive(Debug, Clone, Default)]
pub struct Boots {
    pub count: u64,
    pub seconds: f64,
    pub buckets: [u64; BOOT_BOUNDS.len()],
}

/// One look at all pods.
#[derive(Debug)]
pub struct Seen {
    pub pods: Vec<SeenPod>,
    /// That were not asked, as there are too many.
    pub left_out: usize,
    pub boots: Boots,
    pub took: Duration,
}

#[derive(Debug)]
pub struct SeenPod {
    pub identity: Identity,
    /// None: it did not answer.
    pub metrics: Option<PodMetrics>,
}

impl Node {
    #[must_use]
    pub fn new(registry: Registry, limit: Duration) -> Self {
        Self {
            registry,
            limit,
            known: HashMap::new(),
            boots: Boots::default(),
        }
    }

    /// Asks every pod. A pod that has not answered in time is down, and no other waits for it; the next time it is
    /// only looked whether it has answered since.
    pub async fn look(&mut self) -> Seen {
        let begun = Instant::now();
        let mut sockets = self.sockets();
        let left_out = sockets.len().saturating_sub(PODS);
        sockets.truncate(PODS);
        let mut before = std::mem::take(&mut self.known);
        let places = Arc::new(Semaphore::new(AT_A_TIME));
        let mut asking = JoinSet::new();
        for (socket, identity) in sockets {
            let mut known = before.remove(&socket).unwrap_or_default();
            if known.identity.is_none() {
                known.identity = identity;
            }
            let (places, limit) = (Arc::clone(&places), self.limit);
            asking.spawn(async move {
                // It is never closed.
                let _place = places.acquire_owned().await.ok();
                let metrics = ask(&socket, &mut known, limit).await;
                (socket, known, metrics)
            });
        }
        let mut pods = Vec::new();
        while let Some(asked) = asking.join_next().await {
            let Ok((socket, mut known, metrics)) = asked else {
                continue;
            };
            if let Some(metrics) = &metrics {
                known.identity = Some(metrics.identity.clone());
                if let Some(machine) = &metrics.machine
                    && !known.counted
                {
                    known.counted = true;
                    self.boots.add(machine.boot_seconds);
                }
            }
            pods.push(SeenPod {
                identity: known.identity.clone().unwrap_or_else(|| unknown(&socket)),
                metrics,
            });
            self.known.insert(socket, known);
        }
        pods.sort_by(|one, other| one.identity.id.cmp(&other.identity.id));
        Seen {
            pods,
            left_out,
            boots: self.boots.clone(),
            took: begun.elapsed(),
        }
    }

    /// Where pods can be asked, with what is known of them without asking.
    fn sockets(&self) -> Vec<(PathBuf, Option<Identity>)> {
        let records = self.registry.list().unwrap_or_default();
        let own = records
            .into_iter()
            // One that has ended is not of this host any more; one whose supervisor was killed is down.
            .filter(|record| record.liveness == Liveness::Alive || !record.status.phase.ended())
            .map(|record| {
                let identity = Identity {
                    manager: Manager::Hull,
                    namespace: String::new(),
                    name: record.status.name,
                    id: record.status.id.to_string(),
                };
                (record.dir.socket(), Some(identity))
            });
        let shims = std::fs::read_dir(shims(self.registry.directories().run()));
        let shims = shims.into_iter().flatten().filter_map(Result::ok);
        own.chain(shims.map(|entry| (entry.path(), None))).collect()
    }
}

impl Boots {
    fn add(&mut self, seconds: f64) {
        self.count += 1;
        self.seconds += seconds;
        if let Some(bucket) = BOOT_BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket] += 1;
        }
    }
}

/// A shim that has never answered is called what its socket is.
fn unknown(socket: &Path) -> Identity {
    let name = socket.file_stem().unwrap_or_default();
    Identity {
        manager: Manager::Containerd,
        namespace: String::new(),
        name: String::new(),
        id: name.to_string_lossy().into_owned(),
    }
}

async fn ask(socket: &Path, known: &mut Known, limit: Duration) -> Option<PodMetrics> {
    if let Some(owed) = known.owed.take() {
        match timeout(GLANCE, owed.receive::<Reply>()).await {
            Err(_) => {
                known.owed = Some(owed);
                return None;
            }
            // Of another time. It answers again, or has ended.
            Ok(_) => drop(owed),
        }
    }
    let channel = AsyncChannel::connect(socket).ok()?;
    let answer = timeout(limit, async {
        channel.send(&Request::Metrics, &[]).await?;
        channel.receive::<Reply>().await
    });
    match answer.await {
        Err(_) => {
            known.owed = Some(channel);
            None
        }
        Ok(Ok(Some((Reply::Metrics(metrics), _)))) => Some(*metrics),
        Ok(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_machine::channel::Listener;
    use hull_pod::metrics::{Endpoint, ProcessMetrics, endpoint_path};
    use hull_pod::state::Directories;

    const LIMIT: Duration = Duration::from_millis(300);

    fn node(root: &Path) -> Node {
        let directories = Directories::new(root.join("run"), root.join("data"));
        let registry = Registry::open(directories, |_, _| Ok(())).unwrap();
        Node::new(registry, LIMIT)
    }

    fn shim(root: &Path, id: &'static str) {
        let path = endpoint_path(&root.join("run"), "default", id);
        let endpoint = Endpoint::bind(&path).unwrap();
        tokio::spawn(endpoint.serve(move || PodMetrics {
            identity: Identity {
                manager: Manager::Containerd,
                namespace: "default".into(),
                name: id.into(),
                id: id.into(),
            },
            supervisor: ProcessMetrics::default(),
            restarts: 0,
            machine: None,
        }));
    }

    #[tokio::test]
    async fn who_hangs_is_waited_for_once_and_stalls_nobody() {
        let root = tempfile::tempdir().unwrap();
        let mut node = node(root.path());
        shim(root.path(), "alive");
        let deaf = endpoint_path(&root.path().join("run"), "default", "deaf");
        let _deaf = Listener::bind(&deaf).unwrap();

        let first = node.look().await;
        let second = node.look().await;

        for seen in [&first, &second] {
            let up: Vec<bool> = seen.pods.iter().map(|pod| pod.metrics.is_some()).collect();
            assert_eq!(up.iter().filter(|up| **up).count(), 1);
            assert_eq!(up.len(), 2);
        }
        assert!(first.took >= LIMIT);
        assert!(second.took < LIMIT);
    }

    #[tokio::test]
    async fn what_a_killed_shim_left_is_down_and_what_is_gone_is_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let mut node = node(root.path());
        let path = endpoint_path(&root.path().join("run"), "default", "dead");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(Listener::bind(&path).unwrap());

        let left = node.look().await;
        std::fs::remove_file(&path).unwrap();
        let gone = node.look().await;

        assert_eq!(left.pods.len(), 1);
        assert!(left.pods[0].metrics.is_none());
        assert!(gone.pods.is_empty() && node.known.is_empty());
    }

    #[test]
    fn a_boot_is_in_the_first_bucket_that_it_fits() {
        let mut boots = Boots::default();

        boots.add(0.3);
        boots.add(600.0);

        assert_eq!((boots.count, boots.buckets[2]), (2, 1));
        assert_eq!(boots.buckets.iter().sum::<u64>(), 1);
    }
}
