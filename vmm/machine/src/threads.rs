//! Every thread of `hull-vmm` starts here, inside the filter of its class.
//!
//! A thread inherits the filters and capabilities of the one that makes it, and the
//! guest makes threads: its writes to a device's registers, on a virtual processor's
//! thread, start the device. So once [`confine`]d, all threads come from one, the
//! nursery, which never sees anything of the guest, and each then takes the filter of
//! its own class. Threads share their memory, so this bounds what a thread can be
//! misled to do, not what code that runs in the process can: that is the jail's part.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::JoinHandle;

use rustix::thread::CapabilitySet;
use seccompiler::BpfProgram;

use crate::jail::seccomp::{self, Scope};
use crate::jail::{FILE_SERVER_CAPABILITIES, set_capabilities};

/// What a thread does, and so which system calls and capabilities it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// Runs a virtual processor.
    Vcpu,
    /// Serves one device's queues: epoll, eventfds, reads and writes on descriptors it has.
    Device,
    /// Serves the memory device: what a device's thread does, without I/O, and memory for the guest.
    Memory,
    /// Serves file system requests: the only class with file system calls and capabilities.
    FileSystem,
    /// The main thread, once the machine runs: the control channel.
    Control,
}

impl ThreadClass {
    fn capabilities(self) -> CapabilitySet {
        match self {
            Self::FileSystem => FILE_SERVER_CAPABILITIES,
            Self::Vcpu | Self::Device | Self::Memory | Self::Control => CapabilitySet::empty(),
        }
    }
}

/// Why a process or thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("starting the thread that starts threads")]
    Nursery(#[source] io::Error),
    #[error("the process is confined already")]
    Twice,
    #[error("the allocator can't be told to keep to one heap")]
    Heap,
    #[error("dropping the thread's capabilities")]
    Capabilities(#[source] io::Error),
    #[error("installing the thread's seccomp filter")]
    Filter(#[from] seccompiler::Error),
}

/// The calling thread's way to become a [`ThreadClass::Control`] thread.
#[derive(Debug)]
#[must_use = "the calling thread has no filter yet"]
pub struct Unconfined(BpfProgram);

impl Unconfined {
    /// Leaves the calling thread what [`ThreadClass::Control`] has.
    ///
    /// # Errors
    /// When the kernel refuses; the process must end then.
    pub fn confine(self) -> Result<(), ConfineError> {
        restrict(ThreadClass::Control, &self.0)
    }
}

static NURSERY: OnceLock<Sender<Order>> = OnceLock::new();

struct Order {
    class: ThreadClass,
    name: String,
    body: Box<dyn FnOnce() + Send>,
    reply: SyncSender<io::Result<JoinHandle<()>>>,
}

/// From here on [`spawn`] confines. Call it in the jail, from the only thread, which itself goes on as it is.
///
/// # Errors
/// When it can't; the process must end then.
pub fn confine() -> Result<Unconfined, ConfineError> {
    share_one_heap()?;
    let nursery = Nursery {
        own: seccomp::program(Scope::Nursery),
        vcpu: seccomp::program(Scope::Class(ThreadClass::Vcpu)),
        device: seccomp::program(Scope::Class(ThreadClass::Device)),
        memory: seccomp::program(Scope::Class(ThreadClass::Memory)),
        file_system: seccomp::program(Scope::Class(ThreadClass::FileSystem)),
        control: seccomp::program(Scope::Class(ThreadClass::Control)),
    };
    let control = nursery.control.clone();
    let (orders, received) = mpsc::channel();
    NURSERY.set(orders).map_err(|_| ConfineError::Twice)?;
    let (ready, installed) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("nursery".into())
        .spawn(move || {
            let filter = seccompiler::apply_filter(&nursery.own);
            let failed = filter.is_err();
            // The caller waits for it.
            drop(ready.send(filter));
            if !failed {
                nursery.run(&received);
            }
        })
        .map_err(ConfineError::Nursery)?;
    installed
        .recv()
        .map_err(|error| ConfineError::Nursery(io::Error::other(error)))??;
    Ok(Unconfined(control))
}

/// Keeps all threads to the process's first heap.
///
/// glibc gives threads heaps of their own, and looks into `/proc/sys/vm/overcommit_memory` when the first of
/// those shrinks: a call for which a filter kills.
fn share_one_heap() -> Result<(), ConfineError> {
    // SAFETY: it sets a number of the allocator's, before there is a second thread.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        1 => Ok(()),
        _ => Err(ConfineError::Heap),
    }
}

/// Starts a named thread, drops what its class doesn't need, installs its seccomp filter, and runs `body`.
///
/// `name` is cut to 15 bytes by the kernel. A thread whose filter can't be installed panics.
/// In a process that is not [`confine`]d, as that of a device's tests, it starts as it is.
///
/// # Errors
/// When the thread can't be made.
pub fn spawn(
    class: ThreadClass,
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let Some(nursery) = NURSERY.get() else {
        return std::thread::Builder::new().name(name.into()).spawn(body);
    };
    let (reply, thread) = mpsc::sync_channel(1);
    let order = Order {
        class,
        name: name.to_owned(),
        body: Box::new(body),
        reply,
    };
    nursery.send(order).map_err(|_| gone())?;
    thread.recv().map_err(|_| gone())?
}

fn gone() -> io::Error {
    io::Error::other("the thread that starts threads is gone")
}

/// The filters, and the thread that has the right to install them.
struct Nursery {
    own: BpfProgram,
    vcpu: BpfProgram,
    device: BpfProgram,
    memory: BpfProgram,
    file_system: BpfProgram,
    control: BpfProgram,
}

impl Nursery {
    /// Never ends: the sender is a static.
    fn run(self, orders: &Receiver<Order>) {
        for order in orders {
            let thread = self.start(order.class, order.name, order.body);
            // Whoever asked waits for it.
            drop(order.reply.send(thread));
        }
    }

    fn start(
        &self,
        class: ThreadClass,
        name: String,
        body: Box<dyn FnOnce() + Send>,
    ) -> io::Result<JoinHandle<()>> {
        let filter = match class {
            ThreadClass::Vcpu => &self.vcpu,
            ThreadClass::Device => &self.device,
            ThreadClass::Memory => &self.memory,
            ThreadClass::FileSystem => &self.file_system,
            ThreadClass::Control => &self.control,
        }
        .clone();
        std::thread::Builder::new().name(name).spawn(move || {
            if let Err(error) = restrict(class, &filter) {
                panic!("a thread can't be confined: {error}: {:?}", source(&error));
            }
            drop(filter);
            body();
        })
    }
}

fn source(error: &ConfineError) -> Option<String> {
    std::error::Error::source(error).map(ToString::to_string)
}

fn restrict(class: ThreadClass, filter: &BpfProgram) -> Result<(), ConfineError> {
    set_capabilities(class.capabilities())
        .map_err(|error| ConfineError::Capabilities(error.into()))?;
    Ok(seccompiler::apply_filter(filter)?)
}
