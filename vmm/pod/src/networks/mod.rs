//! The named networks of a host without a cluster: bridges by netavark, names by aardvark-dns.
//!
//! ```text
//! DATA/networks/NAME.json     a definition, as podman and netavark write it
//! DATA/networks/lock          flock'ed while definitions or what pods have of them change
//! DATA/networks/last.json     the last address given in each subnet, so that one isn't given at
//!                             once to another pod
//! RUN/networks/               netavark's and aardvark-dns' own
//! RUN/pods/ID/network.json    what one pod has: addresses, published ports; see [`Attachment`]
//! ```
//!
//! There is no other list of leases: an address is taken as long as a pod's directory says so. It
//! goes with the directory, as with a reboot, and so can't leak without a pod that `hull gc` finds.
//!
//! Order of calls: [`Networks::reserve`] by `hull run` while the pod's name is claimed, so that
//! conflicts are found before anything is started; by the supervisor [`Attachment::open`],
//! [`Attachment::setup`] with the pod's network namespace, and [`Attachment::teardown`].
//! [`release`] does the last for supervisors that are dead.

mod attachment;
mod choice;
mod definition;
mod lease;
mod netavark;
mod ports;
mod routes;
mod stand_in;
mod store;
mod subnet;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use attachment::{Attachment, Membership, release};
pub use choice::Choice;
pub use definition::{DEFAULT_NETWORK, Network, NetworkSubnet};
pub use netavark::Netavark;
pub use ports::{Asked, Protocol, Publication};
pub use store::{Creation, Networks};

use crate::network::WiringError;
use crate::state::StateError;

/// What can go wrong with networks.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A fault of what the user asked for, with field and value.
    #[error("{0}")]
    Refused(String),
    #[error("no network {0:?}; `hull network ls` lists those that there are")]
    NoSuchNetwork(String),
    #[error("network {network} is in use by pod {pod}; remove the pod first: hull rm -f {pod}")]
    InUse { network: String, pod: String },
    #[error("network {network} has no free address left in {subnet}")]
    Exhausted { network: String, subnet: String },
    #[error(
        "network {network}: its subnet {subnet} overlaps {route}, which the host reaches through {interface}; \
         remove the network and create it with another subnet"
    )]
    Overlap {
        network: String,
        subnet: String,
        route: String,
        interface: String,
    },
    #[error("{program} is not there; install the package {package} (or use --network none)")]
    Missing {
        program: &'static str,
        package: &'static str,
    },
    #[error("netavark {action}: {message}")]
    Netavark {
        action: &'static str,
        message: String,
    },
    #[error(
        "netavark {action} did not end within {} s (HULL_TIMEOUT_SCALE gives slow machines more time)",
        limit.as_secs()
    )]
    TimedOut {
        action: &'static str,
        limit: Duration,
    },
    #[error("networks: {doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("{path} can't be understood", path = path.display())]
    Format {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the pod's interfaces on the host")]
    FarEnds(#[source] WiringError),
    #[error("the files of networks")]
    State(#[from] StateError),
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
