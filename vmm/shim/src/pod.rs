//! What tasks need of the pod that they are in.

use async_trait::async_trait;
use hull_pod::agent::{ExitStatus, Process, Stats, Stdio};
use hull_pod::supervisor::api::{Exec, Size};
use oci_spec::runtime::LinuxResources;

use crate::bundle::Bundle;
use crate::failure::TaskError;

/// A mount of a container's root file system, as containerd's snapshotter says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootMount {
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// A machine, and what runs in it. Containers have names that are handed out here, whatever their ids are.
#[async_trait]
pub trait Pod: Send + Sync {
    /// Starts the machine and infra, for the pod's first container `id`.
    async fn begin(&self, id: &str, bundle: &Bundle, root: &[RootMount]) -> Result<(), TaskError>;

    /// Prepares a container, and returns its streams.
    async fn create(
        &self,
        name: &str,
        bundle: &Bundle,
        root: &[RootMount],
        stdin: bool,
    ) -> Result<Stdio, TaskError>;

    async fn start(&self, name: &str) -> Result<(), TaskError>;

    /// A container has printed its first byte.
    fn printed(&self) {}

    /// Runs a further process in a container, and returns its streams.
    async fn exec(&self, exec: &str, what: &Exec) -> Result<Stdio, TaskError>;

    /// Until a process has ended. An error: it has ended with the machine.
    async fn wait(&self, process: Process<'_>) -> Result<ExitStatus, TaskError>;

    async fn signal(&self, process: Process<'_>, signal: u32, all: bool) -> Result<(), TaskError>;

    async fn resize(&self, process: Process<'_>, size: Size) -> Result<(), TaskError>;

    /// The processes of a container, as the guest numbers them.
    async fn processes(&self, name: &str) -> Result<Vec<u32>, TaskError>;

    /// What a container uses; None: all of the pod together.
    async fn stats(&self, name: Option<&str>) -> Result<Stats, TaskError>;

    /// Lets a container stand still, until it is thawed or ends.
    async fn freeze(&self, name: &str) -> Result<(), TaskError>;

    async fn thaw(&self, name: &str) -> Result<(), TaskError>;

    async fn update(&self, name: &str, resources: &LinuxResources) -> Result<(), TaskError>;

    /// Until more than `kills` processes of a container have been killed for its memory limit, or it has ended.
    /// Returns how many.
    async fn wait_oom(&self, name: &str, kills: u64) -> Result<u64, TaskError>;

    /// Removes a container that has ended, or was never started, with its root file system.
    async fn remove(&self, name: &str) -> Result<(), TaskError>;

    async fn remove_exec(&self, container: &str, exec: &str) -> Result<(), TaskError>;

    /// Until the machine or infra has ended, for whatever reason.
    async fn ended(&self);

    /// Ends everything that runs in it, and the machine. Then there is no pod any more.
    async fn shut_down(&self);
}
