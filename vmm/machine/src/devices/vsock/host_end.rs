//! The host's end of a connection: a stream socket that never blocks, and what it could not take yet.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::SendFlags;
use vm_memory::VolatileSlice;

use super::{packet, volatile_io};

/// A socket, and data of the guest on its way into it.
#[derive(Debug)]
pub(super) struct HostEnd {
    stream: UnixStream,
    /// What the socket had no room for. At most the buffer that the guest was told of.
    waiting: VecDeque<u8>,
    /// There may be something to read. Set by an event, cleared by a read that finds less than it could take.
    readable: bool,
    /// There may be room to write, likewise.
    writable: bool,
    /// The other end sends no more: there will be no event for what is left to read.
    ending: bool,
    shut_write: bool,
    shut_read: bool,
}

impl HostEnd {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            waiting: VecDeque::new(),
            readable: false,
            writable: true,
            ending: false,
            shut_write: false,
            shut_read: false,
        }
    }

    pub(super) fn on_readable(&mut self) {
        self.readable = true;
    }

    pub(super) fn on_writable(&mut self) {
        self.writable = true;
    }

    pub(super) fn on_ending(&mut self) {
        self.ending = true;
        self.readable = true;
    }

    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Gives up what waits.
    pub(super) fn discard_waiting(&mut self) {
        self.waiting = VecDeque::new();
    }

    /// Reads into guest memory. `None` when there is nothing now; 0 at the end of the stream.
    pub(super) fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<Option<usize>> {
        let wanted = packet::total(into);
        match volatile_io::receive(&self.stream, into) {
            Ok(count) => {
                if count < wanted && !self.ending {
                    self.readable = false;
                }
                Ok(Some(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes guest memory, and keeps what there is no room for. Returns how many bytes have been written, of
    /// these and of those that waited.
    pub(super) fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let flushed = self.flush()?;
        let mut sent = 0;
        if self.writable && self.waiting.is_empty() {
            sent = unless_full(volatile_io::send(&self.stream, from), &mut self.writable)?;
        }
        let mut skip = sent;
        for slice in from {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            if let Ok(rest) = slice.offset(skipped) {
                let mut bytes = vec![0; rest.len()];
                rest.copy_to(&mut bytes);
                self.waiting.extend(bytes);
            }
        }
        Ok(flushed + sent)
    }

    /// Writes what waits, as far as there is room. Returns how many bytes.
    pub(super) fn flush(&mut self) -> io::Result<usize> {
        let mut flushed = 0;
        while self.writable && !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let sent = rustix::net::send(&self.stream, first, flags).map_err(io::Error::from);
            let count = unless_full(sent, &mut self.writable)?;
            self.waiting.drain(..count);
            flushed += count;
        }
        if self.waiting.is_empty() {
            // A connection that waited once doesn't keep its buffer for ever.
            self.waiting = VecDeque::new();
        }
        Ok(flushed)
    }

    /// Nothing more will be written: the other end sees the end of the stream, after what waits.
    pub(super) fn finish_writing(&mut self) {
        if self.waiting.is_empty() && !self.shut_write {
            self.shut_write = true;
            // It fails only if the other end is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Nothing more will be read: the other end can't write any more.
    pub(super) fn stop_reading(&mut self) {
        if !self.shut_read {
            self.shut_read = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }
}

impl AsFd for HostEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Takes a full socket for nothing written, and notes it.
fn unless_full(written: io::Result<usize>, writable: &mut bool) -> io::Result<usize> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            *writable = false;
            Ok(0)
        }
        other => other,
    }
}
