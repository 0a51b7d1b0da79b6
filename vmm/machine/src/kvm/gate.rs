//! The gate that every processor passes on its way into the guest. Closed, it keeps them all out.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Shared by the processors of a machine and who pauses it.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// Processors that may be in the guest.
    within: usize,
    /// How often those outside have been asked for their state.
    asked: u64,
}

impl Gate {
    /// A processor's thread begins; it goes with [`Pass`].
    pub fn pass(&self) -> Pass {
        self.state().within += 1;
        Pass(self.clone())
    }

    /// No processor enters the guest any more; those in it are the caller's to kick.
    pub fn close(&self) {
        self.state().closed = true;
    }

    /// Waits, once it is closed, until no processor is in the guest. That takes as long as a device's registers
    /// take to be read or written.
    pub fn wait_empty(&self) {
        let state = self.state();
        let empty = |state: &mut State| state.closed && state.within > 0;
        drop(
            self.0
                .changed
                .wait_while(state, empty)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Has every processor tell its state, on its own thread (see [`Pass::check`]); they stay outside. The gate is closed
    /// and empty.
    pub fn ask(&self) {
        let mut state = self.state();
        state.asked = state.asked.wrapping_add(1);
        drop(state);
        self.0.changed.notify_all();
    }

    /// Lets all processors go on.
    pub fn open(&self) {
        self.state().closed = false;
        self.0.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A processor's leave to enter the guest.
#[derive(Debug)]
pub struct Pass(Gate);

impl Pass {
    /// Waits while the gate is closed. Returns whether it was. Meanwhile `tell` is called each time that somebody asks.
    pub fn check(&self, mut tell: impl FnMut()) -> bool {
        let shared = &self.0.0;
        let mut state = self.0.state();
        if !state.closed {
            return false;
        }
        state.within -= 1;
        shared.changed.notify_all();
        let mut asked = state.asked;
        loop {
            state = shared
                .changed
                .wait_while(state, |state| state.closed && state.asked == asked)
                .unwrap_or_else(PoisonError::into_inner);
            if !state.closed {
                break;
            }
            asked = state.asked;
            drop(state);
            tell();
            state = self.0.state();
        }
        state.within += 1;
        true
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.state().within -= 1;
        self.0.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_open_gate_keeps_nobody() {
        let gate = Gate::default();

        assert!(!gate.pass().check(|| ()));
    }

    #[test]
    fn a_closed_gate_is_empty_and_stays_so_until_it_opens() {
        let gate = Gate::default();
        let passes = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                let pass = gate.pass();
                let passes = &passes;
                scope.spawn(move || {
                    while passes.load(Ordering::Relaxed) < 1_000_000 {
                        pass.check(|| ());
                        passes.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }

            gate.close();
            gate.wait_empty();
            let before = passes.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(50));
            let after = passes.load(Ordering::Relaxed);
            passes.store(1_000_000, Ordering::Relaxed);
            gate.open();

            assert_eq!(before, after);
        });
    }

    #[test]
    fn each_tells_its_state_once_for_each_time_that_it_is_asked() {
        let gate = Gate::default();
        let (told, heard) = std::sync::mpsc::channel();
        gate.close();
        thread::scope(|scope| {
            for number in 0..3 {
                let (pass, told) = (gate.pass(), told.clone());
                scope.spawn(move || pass.check(|| told.send(number).unwrap()));
            }
            gate.wait_empty();

            let rounds: Vec<Vec<i32>> = (0..2)
                .map(|_| {
                    gate.ask();
                    let mut round: Vec<_> = heard.iter().take(3).collect();
                    round.sort_unstable();
                    round
                })
                .collect();
            gate.open();

            assert_eq!(rounds, [[0, 1, 2], [0, 1, 2]]);
        });
        drop(told);
        assert!(heard.recv().is_err());
    }

    #[test]
    fn who_has_gone_is_not_waited_for() {
        let gate = Gate::default();
        drop(gate.pass());

        gate.close();

        gate.wait_empty();
    }
}
