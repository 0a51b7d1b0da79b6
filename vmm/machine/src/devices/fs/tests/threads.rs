//! How many threads serve requests.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use virtiofsd::descriptor_utils::{Reader, Writer};

use super::super::pool::Threads;
use super::super::server::Session;
use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// Takes messages, and keeps them until it is opened.
#[derive(Default)]
struct Slow {
    /// Messages inside, and whether they may leave.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Slow {
    /// Whether as many messages came inside.
    fn fills(&self, count: usize, limit: Duration) -> bool {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, limit, |(inside, _)| *inside < count);
        !waited.unwrap().1.timed_out()
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

impl MessageServer for Slow {
    fn serve(&self, _: Session, _: Reader<'_>, _: Writer<'_>) -> io::Result<usize> {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |(_, open)| !*open).unwrap());
        Ok(0)
    }

    fn reset(&self) {}

    fn is_in_session(&self) -> bool {
        true
    }

    fn put_down(&self) -> io::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn take_up(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// A pool, with the guest's side of its queue.
fn pool(server: &Arc<Slow>) -> (GuestRam, DriverQueue, Pool) {
    let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x50_0000)]).unwrap();
    let requests = DriverQueue::new(&memory, 0x1_0000, 64);
    let queue = RequestQueue::new(
        requests.activate(1),
        memory.clone(),
        Arc::new(FileServerMemory::new(&memory).unwrap()),
    );
    let threads = Threads { first: 2, most: 4 };
    let server = Arc::<Slow>::clone(server);
    let pool = Pool::start("fs-test", vec![queue], threads, server).unwrap();
    (memory, requests, pool)
}

fn offer(memory: &GuestRam, requests: &mut DriverQueue) {
    let mut message = numbers(&[40, GETATTR]);
    message.resize(40, 0);
    memory.write_slice(&message, GuestAddress(REQUEST)).unwrap();
    requests.offer(&[(REQUEST, 40)], &[(ANSWER, 256)]);
    requests.kick();
}

#[test]
fn requests_that_wait_hold_up_none_until_there_are_as_many_threads_as_there_may_be() {
    let server = Arc::default();
    let (memory, mut requests, pool) = pool(&server);
    for inside in 1..=4 {
        offer(&memory, &mut requests);
        assert!(server.fills(inside, LIMIT), "{inside}");
    }

    offer(&memory, &mut requests);
    let fifth = server.fills(5, Duration::from_millis(200));
    server.open();

    assert!(!fifth);
    assert!(server.fills(5, LIMIT));
    assert_eq!(pool.threads(), 4);
}

#[test]
fn many_requests_at_once_are_served_by_all_threads() {
    let server = Arc::default();
    let (memory, mut requests, pool) = pool(&server);

    for _ in 0..8 {
        offer(&memory, &mut requests);
    }

    assert!(server.fills(4, LIMIT));
    server.open();
    assert!(server.fills(8, LIMIT));
    assert_eq!(pool.threads(), 4);
}

#[test]
fn one_request_after_the_other_needs_no_more_threads() {
    let server = Arc::<Slow>::default();
    let (memory, mut requests, pool) = pool(&server);
    server.open();

    for served in 1..=20 {
        offer(&memory, &mut requests);
        assert!(server.fills(served, LIMIT), "{served}");
        requests.wait_used();
    }

    assert!(pool.threads() <= 3, "{}", pool.threads());
}
