//! Whatever asks a command in the foreground to end.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// As a shell says that Ctrl-C ended it.
pub const INTERRUPTED: u8 = 130;

/// From the first moment on none of them ends the process.
pub struct Interrupts([Signal; 3]);

impl Interrupts {
    pub fn new() -> Result<Self, Failure> {
        let watch = |kind| signal(kind).map_err(|e| Failure::io("watching signals", e));
        Ok(Self([
            watch(SignalKind::interrupt())?,
            watch(SignalKind::terminate())?,
            watch(SignalKind::hangup())?,
        ]))
    }

    pub async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
