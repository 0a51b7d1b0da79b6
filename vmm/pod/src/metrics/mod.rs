//! What a pod costs its host, and how its guest answers: asked of each pod's supervisor by one process of the node.
//!
//! A pod of `hull run` is asked at its socket ([`crate::client`]); a shim of containerd's has one for this alone
//! ([`Endpoint`]). Nothing here waits for the guest: a pod whose guest hangs is measured as any other.

mod calls;
mod endpoint;
mod meter;
mod process;

use serde::{Deserialize, Serialize};

pub use calls::{CALL_BOUNDS, CallMetrics, Calls};
pub use endpoint::{Endpoint, EndpointError, path as endpoint_path, shims};
pub use meter::Meter;
pub use process::ProcessMetrics;
pub(crate) use process::cpu_time;

/// Who manages a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Manager {
    /// `hull run`.
    Hull,
    Containerd,
}

/// Which pod it is. Names are somebody else's: of any content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub manager: Manager,
    /// Kubernetes' namespace; without Kubernetes containerd's; for a pod of `hull run` empty.
    pub namespace: String,
    pub name: String,
    pub id: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodMetrics {
    pub identity: Identity,
    /// The process that answers: supervisor or shim.
    pub supervisor: ProcessMetrics,
    /// Of all containers together. Under containerd 0: there a restart is a new container.
    pub restarts: u64,
    /// None: it is not up yet, or has ended.
    pub machine: Option<MachineMetrics>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineMetrics {
    /// From the machine's start to the agent's first answer.
    pub boot_seconds: f64,
    pub vcpus: u8,
    /// `hull-vmm`, the guest's memory included. None: it is just ending.
    pub vmm: Option<ProcessMetrics>,
    /// The guest's RAM.
    pub memory_bytes: u64,
    /// So much of it the host has had to provide.
    pub touched_bytes: u64,
    pub calls: Vec<CallMetrics>,
    pub interfaces: Vec<InterfaceMetrics>,
}

impl PodMetrics {
    /// Measures this process, and the machine of a `meter`. Blocks for a moment.
    #[must_use]
    pub fn measure(identity: Identity, meter: Option<&Meter>) -> Self {
        Self {
            identity,
            // It is there, and ours.
            supervisor: ProcessMetrics::of(std::process::id()).unwrap_or_default(),
            restarts: 0,
            machine: meter.map(Meter::read),
        }
    }
}

/// What went through an interface of the pod's, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceMetrics {
    /// The tap's name.
    pub tap: String,
    pub received_bytes: u64,
    pub received_packets: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
}
