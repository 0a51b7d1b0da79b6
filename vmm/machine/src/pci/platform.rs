//! What the PCI bus needs of the hypervisor, so that nothing else here knows KVM.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// What a message-signalled interrupt writes, and where (PCI Local Bus 3.0, section 6.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// One interrupt line that can carry an MSI message to a processor.
///
/// A signal on a line that is not connected is kept, and delivered once it is: that
/// is what MSI-X's pending bits ask for.
pub trait MsiLine: Debug + Send + Sync {
    /// Signals deliver `message` from now on; one that is pending is delivered at once.
    ///
    /// # Errors
    /// When the hypervisor refuses the message; the line is then not connected.
    fn connect(&self, message: MsiMessage) -> io::Result<()>;

    /// Signals are kept from now on.
    ///
    /// # Errors
    /// When the hypervisor refuses; the line's state is then unknown.
    fn disconnect(&self) -> io::Result<()>;

    /// Raises the interrupt. Never blocks.
    ///
    /// # Errors
    /// When the line is broken.
    fn signal(&self) -> io::Result<()>;

    /// An event of which every signal is one of the line, if there is such a thing.
    fn event(&self) -> Option<EventFd> {
        None
    }

    /// Whether a signal is kept. Meaningful only while not connected.
    fn is_pending(&self) -> bool;

    /// Forgets a signal that is kept.
    fn clear(&self);
}

/// The hypervisor, seen from the bus.
pub trait Platform: Debug + Send + Sync {
    /// A new line, not connected. Lines are made before the guest runs.
    ///
    /// # Errors
    /// When there are no more, or no descriptors.
    fn msi_line(&self) -> io::Result<Arc<dyn MsiLine>>;

    /// Writes of the guest to `address`, of any width and value, make `kick` readable from now on.
    ///
    /// # Errors
    /// When the hypervisor refuses, or there is a doorbell at the address.
    fn attach_doorbell(&self, address: u64, kick: &EventFd) -> io::Result<()>;

    /// Undoes [`Self::attach_doorbell`] of the same arguments.
    ///
    /// # Errors
    /// When there is no such doorbell.
    fn detach_doorbell(&self, address: u64, kick: &EventFd) -> io::Result<()>;

    /// Lines that are connected from now on deliver their messages only when [`Self::connect_held`] is called. For many at
    /// once, before the guest runs.
    fn hold(&self);

    /// Ends what [`Self::hold`] began.
    ///
    /// # Errors
    /// When the hypervisor refuses one of the messages: none is delivered.
    fn connect_held(&self) -> io::Result<()>;
}
