//! The host's side of a pod's network: its network namespace, what is in it, and the taps through
//! which the guest takes part.
//!
//! Whoever sets a pod's network up (CNI, netavark) puts interfaces with addresses into a network
//! namespace, as for a process. [`observe`] looks at them, [`plan`] says to the agent what the
//! guest is to have, and [`Plug`] makes a tap for each interface and has the kernel pass every
//! frame on, by traffic control:
//!
//! ```text
//!   the node        the pod's network namespace                      the machine
//!   vethX ------- eth0 --ingress: redirect--> hull0 ==descriptor==> virtio-net
//!              (egress) <--redirect :ingress-- (own MAC and addresses only)
//! ```
//!
//! The guest's interface has eth0's hardware and IP addresses, so the namespace's own stack must
//! not answer for them as well. It doesn't: traffic control's ingress comes before the stack, and
//! a frame that is redirected there is taken away. What the guest sends and may not is dropped at
//! the tap's ingress, likewise before the stack, so the guest can't talk to the host's kernel by it.
//!
//! The guest may send only as who it is: see `filters`.

mod far_ends;
mod filters;
mod namespace;
mod netlink;
mod observe;
mod plug;
mod tap;
#[cfg(test)]
mod tests;
mod traffic;
mod vhost;

use std::io;

pub use far_ends::{far_ends, remove_veths};
pub use namespace::Namespace;
pub use observe::{Observed, ObservedInterface, observe, plan};
pub use plug::Plug;
pub use tap::taps_segment_udp;
pub use traffic::traffic;
pub use vhost::VhostNet;

/// What can go wrong between a pod's network namespace and its machine.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    #[error("{path} can't be the pod's network namespace: {reason}")]
    BadNamespace { path: String, reason: &'static str },
    #[error("interface {interface} of kind {kind} can't be given to a pod's machine: {reason}")]
    BadInterface {
        interface: String,
        kind: String,
        reason: String,
    },
    #[error("route to {route} can't be given to a pod's machine: {reason}")]
    BadRoute { route: String, reason: &'static str },
    #[error("the pod's network namespace has more than {limit} {what}")]
    TooMany { what: &'static str, limit: usize },
    #[error("there is no /dev/net/tun; load the kernel module tun: modprobe tun")]
    NoTun,
    #[error(
        "opening /dev/vhost-net, which the configuration (vhost_net) or HULL_VHOST_NET asks for with on; the kernel module is vhost_net: {0}"
    )]
    NoVhost(io::Error),
    #[error("HULL_VHOST_NET is auto, on or off, not {0:?}")]
    BadVhost(String),
    #[error(
        "interface {interface}: {step}: the kernel lacks traffic control; load the kernel modules sch_ingress, \
         cls_u32, act_mirred and act_gact"
    )]
    NoTrafficControl {
        interface: String,
        step: &'static str,
    },
    #[error(
        "interface {0} has a queueing discipline for what it receives already, of another program"
    )]
    Taken(String),
    #[error("interface {interface}: {step}: {source}")]
    Interface {
        interface: String,
        step: &'static str,
        source: io::Error,
    },
    #[error("the pod's network namespace: {step}: {source}")]
    Namespace { step: String, source: io::Error },
}

type Result<T> = std::result::Result<T, WiringError>;

/// Says what was being done when an operation failed.
trait Doing<T> {
    fn doing(self, step: impl Into<String>) -> Result<T>;
    fn doing_to(self, interface: &str, step: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, step: impl Into<String>) -> Result<T> {
        self.map_err(|error| WiringError::Namespace {
            step: step.into(),
            source: error.into(),
        })
    }

    fn doing_to(self, interface: &str, step: &'static str) -> Result<T> {
        self.map_err(|error| WiringError::Interface {
            interface: interface.into(),
            step,
            source: error.into(),
        })
    }
}
