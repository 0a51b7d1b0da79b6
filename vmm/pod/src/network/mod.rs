//! The host's side of a pod's network: one network namespace, and a tap beside each interface in it.
//!
//! ```text
//!            the pod's network namespace on the host
//!  veth ───▶ eth0 ── ingress: all of it ──────────────▶ hull-2 (tap) ══ hull-vmm ══ the guest's eth0
//!       ◀─── eth0 ◀───────── what is the pod's own ── ingress: hull-2
//! ```
//!
//! CNI, netavark or Docker sets the interfaces up. [`observe`] reads what they are, [`plug`] puts a
//! tap beside each, and [`Observed::plan`] says what the guest's interfaces are to be: the
//! same. Whoever wired the namespace finds its interfaces as they were.
//!
//! - **The namespace's own kernel is out of it.** The interface keeps its addresses, since whoever
//!   wired it looks for them again, and so the kernel would answer ARP and reset connections
//!   that aren't its own. It sees none of them: traffic control at ingress comes
//!   before every protocol, and takes all packets away.
//! - **The guest sends as itself only.** What comes from the tap is compared on the host with the
//!   interface's hardware and IP addresses before it goes anywhere (`filter.rs`). The tap itself
//!   has no address, and what isn't redirected is dropped.
//! - **Taps go with their descriptors**, whoever is killed. What stays at the interface then is
//!   one filter, which drops what comes in; [`unplug`] removes it.

mod filter;
mod kind;
mod namespace;
mod netlink;
mod observe;
mod plug;
mod tap;

use std::io;
use std::path::PathBuf;

pub use namespace::Namespace;
pub use observe::{Difference, Found, Observed, observe};
pub use plug::{Plug, plug, unplug};
pub use tap::Backend;

/// As many as the agent takes.
const MAX_INTERFACES: usize = 32;
const MAX_ADDRESSES: usize = 64;
const MAX_ROUTES: usize = 1024;
const MAX_NEIGHBOURS: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{doing}")]
    Io { doing: String, source: io::Error },
    #[error("{path} is not a network namespace", path = .0.display())]
    NotANamespace(PathBuf),
    #[error(
        "{path} is the host's own network namespace: a pod needs one of its own",
        path = .0.display()
    )]
    HostNamespace(PathBuf),
    #[error("a pod can't have the interface {interface} ({kind}): {why}")]
    Unsupported {
        interface: String,
        kind: String,
        why: String,
    },
    #[error("{count} {what} in the pod's network namespace; a pod can have {limit}")]
    TooMany {
        what: String,
        count: usize,
        limit: usize,
    },
    #[error("can't open {path}: load the kernel module {module} (modprobe {module})")]
    Device {
        path: &'static str,
        module: &'static str,
        source: io::Error,
    },
    #[error(
        "{doing}: the host's kernel lacks what it needs; \
         load sch_ingress, cls_u32, cls_matchall, act_mirred and act_gact"
    )]
    TrafficControl { doing: String, source: io::Error },
}

/// Says what was being done when a call failed.
trait Doing<T> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, NetworkError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, NetworkError> {
        self.map_err(|error| NetworkError::Io {
            doing: doing(),
            source: error.into(),
        })
    }
}
