//! A socket at which a shim is asked for its metrics, and for nothing else.
//!
//! It speaks as a pod's supervisor does ([`crate::supervisor::api`]): [`Request::Metrics`], and nothing besides.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hull_machine::channel::{AsyncChannel, ChannelError, Listener, SocketError};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::PodMetrics;
use crate::state::{StateError, private_dir};
use crate::supervisor::api::{Refusal, Reply, Request};
use crate::text::chain;

/// Who asks at a time. More wait to be accepted.
const CLIENTS: usize = 4;
/// See [`crate::supervisor`].
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const SUFFIX: &str = "sock";

#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error(transparent)]
    Directory(#[from] StateError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("removing {}", path.display())]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The directory of all shims' sockets, below the run directory.
#[must_use]
pub fn shims(run: &Path) -> PathBuf {
    run.join("shims")
}

/// The socket of the pod `id` in containerd's `namespace`. Of one length, as a socket's path must be short.
#[must_use]
pub fn path(run: &Path, namespace: &str, id: &str) -> PathBuf {
    let mut name = String::new();
    for byte in &Sha256::digest([namespace, id].join("/"))[..16] {
        name.push_str(&format!("{byte:02x}"));
    }
    shims(run).join(name).with_extension(SUFFIX)
}

/// A listening socket, which goes with it.
#[derive(Debug)]
pub struct Endpoint {
    listener: Listener,
    path: PathBuf,
}

impl Endpoint {
    /// Listens at a path of [`path`]; what a dead one has left there goes. Directories are made private.
    ///
    /// # Errors
    /// See [`EndpointError`].
    pub fn bind(path: &Path) -> Result<Self, EndpointError> {
        if let Some(directory) = path.parent() {
            if let Some(run) = directory.parent() {
                private_dir(run)?;
            }
            private_dir(directory)?;
        }
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(EndpointError::Remove {
                    path: path.to_owned(),
                    source,
                });
            }
            _ => {}
        }
        Ok(Self {
            listener: Listener::bind(path)?,
            path: path.to_owned(),
        })
    }

    /// Answers with what `measure` says, which may block, until the future is dropped.
    pub async fn serve(self, measure: impl Fn() -> PodMetrics + Send + Sync + 'static) {
        let measure = Arc::new(measure);
        let places = Arc::new(Semaphore::new(CLIENTS));
        loop {
            // It is never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok();
            match self.listener.accept().await {
                Ok(channel) => {
                    let measure = Arc::clone(&measure);
                    tokio::spawn(async move {
                        if let Err(error) = converse(&channel, measure).await {
                            tracing::debug!(error = chain(&error), "who asks for metrics");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "accepting who asks for metrics");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Who finds it later would find nobody.
        let _ = fs::remove_file(&self.path);
    }
}

async fn converse<M>(channel: &AsyncChannel, measure: Arc<M>) -> Result<(), ChannelError>
where
    M: Fn() -> PodMetrics + Send + Sync + 'static,
{
    while let Some((request, _)) = channel.receive::<Request>().await? {
        let reply = match request {
            Request::Metrics => {
                let measure = Arc::clone(&measure);
                match tokio::task::spawn_blocking(move || measure()).await {
                    Ok(metrics) => Reply::Metrics(Box::new(metrics)),
                    Err(error) => refused(error.to_string()),
                }
            }
            _ => refused("this socket answers for metrics alone; ask containerd".into()),
        };
        channel.send(&reply, &[]).await?;
    }
    Ok(())
}

fn refused(message: String) -> Reply {
    Reply::Refused {
        kind: Refusal::Failed,
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Identity, Manager, ProcessMetrics};

    fn metrics() -> PodMetrics {
        PodMetrics {
            identity: Identity {
                manager: Manager::Containerd,
                namespace: "default".into(),
                name: "web".into(),
                id: "abc".into(),
            },
            supervisor: ProcessMetrics::default(),
            restarts: 0,
            machine: None,
        }
    }

    #[test]
    fn a_path_is_one_pods_alone_and_short() {
        let run = Path::new("/run/hull");
        let long = "x".repeat(200);

        assert_ne!(path(run, "a", "b"), path(run, "a", "c"));
        assert_ne!(path(run, "a", "b"), path(run, "b", "b"));
        assert!(path(run, &long, &long).as_os_str().len() < 108);
        assert!(path(run, "../..", "/").starts_with("/run/hull/shims"));
    }

    #[tokio::test]
    async fn it_answers_for_metrics_alone_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let path = path(&root.path().join("run"), "default", "abc");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "stale").unwrap();

        let endpoint = Endpoint::bind(&path).unwrap();
        let serving = tokio::spawn(endpoint.serve(metrics));
        let channel = AsyncChannel::connect(&path).unwrap();
        let mut answers = Vec::new();
        for request in [Request::Pause, Request::Metrics] {
            channel.send(&request, &[]).await.unwrap();
            answers.push(channel.receive::<Reply>().await.unwrap().unwrap().0);
        }
        serving.abort();
        let _ = serving.await;

        assert!(matches!(answers[0], Reply::Refused { .. }));
        assert_eq!(answers[1], Reply::Metrics(Box::new(metrics())));
        assert!(!path.exists());
    }
}
