//! A machine with its agent and infra: what the containers of every pod run in, whoever runs them.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hull_machine::client::Machine;
use hull_machine::config::TapDescriptors;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::disks::Disks;
use super::failure::PodFailure;
use super::machine::SHARE_TAG;
use super::network::{HostNetwork, PodNetwork};
use super::template::Wanted;
use crate::agent::network::Plan;
use crate::agent::{Agent, AgentError, Process};
use crate::metrics::Meter;
use crate::oci::{InfraSpec, MachineSize};
use crate::templates::Recording;
use crate::text::chain;
use crate::volumes::MemoryVolume;

/// What a program accesses first, it has accessed by then.
const PROGRAMS_START: Duration = Duration::from_millis(500);

/// A machine whose agent has answered.
#[derive(Debug)]
pub struct Guest {
    pub(super) machine: Arc<Machine>,
    pub(super) disks: Disks,
    pub(super) agent: Agent,
    /// Open as long as the agent lives.
    pub(super) alive: UnixStream,
    /// See [`Limits::end`].
    pub(super) end: Duration,
    pub(super) size: MachineSize,
    /// From its start to the agent's answer.
    pub(super) boot: Duration,
    /// The id of the template that it is a clone of.
    pub(super) template: Option<String>,
    /// A template of its kind, if there was none and there should be.
    pub(super) wanted: Option<Wanted>,
    /// Whether it is to be noted what a clone accesses.
    pub(super) recording: std::sync::Mutex<Option<Recording>>,
}

impl Guest {
    #[must_use]
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    #[must_use]
    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The template that the machine began with. None: it booted.
    #[must_use]
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// Makes the pod's namespaces. Once.
    ///
    /// # Errors
    /// When the agent does not.
    pub async fn start_infra(
        &self,
        infra: &InfraSpec,
        memory_volumes: &[MemoryVolume],
    ) -> Result<(), PodFailure> {
        self.agent
            .start_infra(infra, SHARE_TAG, memory_volumes)
            .await
            .map_err(PodFailure::from)
    }

    /// Gives the machine its taps, each with the device's place, and infra its network: after [`Self::start_infra`].
    ///
    /// # Errors
    /// When the machine or the agent does not.
    pub async fn connect_network(
        &self,
        infra: &InfraSpec,
        network: &HostNetwork,
        taps: Vec<(u8, TapDescriptors)>,
    ) -> Result<(), PodFailure> {
        for (place, tap) in taps {
            self.machine.plug_net(place, tap).await?;
        }
        // A sysctl of an interface that there isn't is an error, in a pod without any, too.
        let sysctls = !infra.sysctls.is_empty();
        let plan = network.plan().or_else(|| sysctls.then(Plan::default));
        if let Some(plan) = plan {
            self.agent.configure_network(&plan).await?;
        }
        Ok(())
    }

    /// For looking at what the machine uses.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn meter(&self, network: &HostNetwork) -> Result<Meter, PodFailure> {
        Ok(Meter {
            vmm: u32::try_from(self.machine.pid()).ok(),
            size: self.size,
            boot: self.boot,
            calls: Arc::clone(self.agent.taken()),
            namespace: network.namespace()?,
        })
    }

    /// What containers look at when they start.
    #[must_use]
    pub fn network(&self, host: &Arc<Mutex<HostNetwork>>) -> PodNetwork {
        PodNetwork::new(
            Arc::clone(host),
            Arc::clone(&self.machine),
            self.agent.clone(),
        )
    }

    /// Does what pods that come later begin sooner with, now that a container of this one runs: has a template of the
    /// machine's kind made, if there was none, or notes what a clone has accessed, if that isn't known.
    pub fn serve_later_pods(&self) {
        if let Some(wanted) = &self.wanted {
            wanted.order();
        }
        let recording = self.recording.lock();
        let recording = recording.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(recording) = recording {
            let machine = Arc::clone(&self.machine);
            tokio::spawn(async move {
                let recording = Arc::new(recording);
                let note = || {
                    let (recording, machine) = (Arc::clone(&recording), Arc::clone(&machine));
                    tokio::task::spawn_blocking(move || recording.record(&machine))
                };
                if let Ok(Err(error)) = note().await {
                    tracing::warn!(error = chain(&error), "a template's working set");
                }
                // With what its program accesses first, if it runs as long as that.
                tokio::time::sleep(PROGRAMS_START).await;
                let _ = note().await;
            });
        }
    }

    /// Waits for whatever ends a pod against its will.
    pub async fn death(&self) -> PodFailure {
        tokio::select! {
            reason = self.machine.wait() => PodFailure::MachineEnded(reason),
            // The agent never says anything on it; if it does, it is not the agent any more.
            _ = self.alive.readable() => self.machine_end().await,
            ended = self.agent.wait(Process::Infra) => match ended {
                Ok(status) => PodFailure::InfraEnded(status),
                // Mostly with its machine, which says why.
                Err(AgentError::Lost) => self.machine_end().await,
                Err(error) => error.into(),
            },
        }
    }

    /// Why the machine ended, if it ends soon; else that the agent is gone.
    pub async fn machine_end(&self) -> PodFailure {
        timeout(self.end, self.machine.wait())
            .await
            .map_or(PodFailure::AgentLost, PodFailure::MachineEnded)
    }

    /// Lets the guest write what it has in memory and power off, or takes its power.
    pub async fn shut_down(&self) {
        let power_off = async {
            // The machine's end is the answer.
            let _ = self.agent.shutdown().await;
            self.machine.wait().await
        };
        if timeout(self.end, power_off).await.is_err() {
            tracing::warn!("the guest did not power off");
            self.machine.stop().await;
            let _ = timeout(self.end, self.machine.wait()).await;
        }
    }
}
