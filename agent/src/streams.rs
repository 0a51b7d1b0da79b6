//! Stdio connections that have arrived and wait for the call that names them.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_protocol::STREAM_MAGIC;
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::endpoint::Endpoint;
use crate::error::{Error, Result};

/// Connections that wait at a time, headers still to come included.
const MAX_WAITING: usize = 256;
/// How long a connection may wait for its call, and a call for its connections: longer than either takes on a host that is
/// busy. Before that the host's own limit ends the call.
const UNCLAIMED: Duration = Duration::from_secs(600);
const ARRIVAL: Duration = Duration::from_secs(600);

/// Streams by their number.
#[derive(Debug)]
pub struct Streams {
    waiting: Mutex<HashMap<u64, Waiting>>,
    arrived: Notify,
    places: Arc<Semaphore>,
}

#[derive(Debug)]
struct Waiting {
    endpoint: Endpoint,
    _place: OwnedSemaphorePermit,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            waiting: Mutex::default(),
            arrived: Notify::new(),
            places: Arc::new(Semaphore::new(MAX_WAITING)),
        }
    }
}

impl Streams {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new connection: reads its header, and keeps it until it is claimed
    /// or its time is up. Beyond the limit it is closed at once.
    pub fn accept(self: &Arc<Self>, endpoint: Endpoint) {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            tracing::warn!("a stream was refused: {MAX_WAITING} wait already");
            return;
        };
        let streams = Arc::clone(self);
        tokio::spawn(async move {
            let mut endpoint = endpoint;
            let number = match tokio::time::timeout(ARRIVAL, header(&mut endpoint)).await {
                Ok(Ok(number)) => number,
                Ok(Err(error)) => return tracing::warn!("a stream's header: {error}"),
                Err(_) => return tracing::warn!("a stream sent no header"),
            };
            if !streams.park(number, endpoint, place) {
                return tracing::warn!("stream {number} was opened twice");
            }
            tokio::time::sleep(UNCLAIMED).await;
            // A number is used once, so this is the same stream or none.
            streams.waiting().remove(&number);
        });
    }

    fn park(&self, number: u64, endpoint: Endpoint, place: OwnedSemaphorePermit) -> bool {
        let mut waiting = self.waiting();
        if waiting.contains_key(&number) {
            return false;
        }
        waiting.insert(
            number,
            Waiting {
                endpoint,
                _place: place,
            },
        );
        drop(waiting);
        self.arrived.notify_waiters();
        true
    }

    /// The stream of that number, waiting a while for it; 0 names none.
    pub async fn claim(&self, number: u64) -> Result<Option<Endpoint>> {
        if number == 0 {
            return Ok(None);
        }
        let arrival = async {
            loop {
                let next = self.arrived.notified();
                if let Some(found) = self.waiting().remove(&number) {
                    return found.endpoint;
                }
                next.await;
            }
        };
        match tokio::time::timeout(ARRIVAL, arrival).await {
            Ok(endpoint) => Ok(Some(endpoint)),
            Err(_) => Err(Error::StreamMissing(number)),
        }
    }
}

async fn header(endpoint: &mut Endpoint) -> io::Result<u64> {
    let mut magic = [0; STREAM_MAGIC.len()];
    endpoint.read_exact(&mut magic).await?;
    if magic != STREAM_MAGIC {
        return Err(io::ErrorKind::InvalidData.into());
    }
    endpoint.read_u64_le().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Endpoint, Endpoint) {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (Endpoint::new(a).unwrap(), Endpoint::new(b).unwrap())
    }

    async fn opened(streams: &Arc<Streams>, number: u64) -> Endpoint {
        let (ours, theirs) = pair();
        streams.accept(theirs);
        ours.write_all(&STREAM_MAGIC).await.unwrap();
        ours.write_all(&number.to_le_bytes()).await.unwrap();
        ours
    }

    #[tokio::test]
    async fn a_stream_is_claimed_by_its_number_with_what_follows_the_header() {
        let streams = Arc::new(Streams::default());
        let _other = opened(&streams, 6).await;
        let ours = opened(&streams, 7).await;
        ours.write_all(b"hello").await.unwrap();

        let claimed = streams.claim(7).await.unwrap().unwrap();

        let mut buffer = [0; 16];
        let count = claimed.read(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..count], b"hello");
    }

    #[tokio::test]
    async fn a_claim_waits_for_a_stream_that_comes_later() {
        let streams = Arc::new(Streams::default());
        let waiting = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.claim(3).await.unwrap().is_some() }
        });
        tokio::task::yield_now().await;
        let _ours = opened(&streams, 3).await;
        assert!(waiting.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_stream_is_an_error_and_zero_is_none() {
        let streams = Streams::default();
        assert!(streams.claim(0).await.unwrap().is_none());
        assert!(matches!(
            streams.claim(9).await,
            Err(Error::StreamMissing(9))
        ));
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_are_closed() {
        let streams = Arc::new(Streams::default());
        let mut held = Vec::new();
        for _ in 0..MAX_WAITING {
            let (ours, theirs) = pair();
            streams.accept(theirs);
            held.push(ours);
        }
        let (ours, theirs) = pair();
        streams.accept(theirs);
        assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_wrong_header_closes_the_connection() {
        let streams = Arc::new(Streams::default());
        let (ours, theirs) = pair();
        streams.accept(theirs);
        ours.write_all(b"GET / HTTP/1").await.unwrap();
        // Unread bytes make the close a reset.
        let closed = ours.read(&mut [0]).await;
        assert!(closed.is_err() || closed.is_ok_and(|count| count == 0));
        assert!(streams.waiting().is_empty());
    }
}
