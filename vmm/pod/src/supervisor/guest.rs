//! A machine with its agent and infra: what the containers of every pod run in, whoever runs them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_machine::client::{GuestConnection, Machine, NetSpec};
use hull_machine::config::TapDescriptors;
use hull_machine::steps::Started;
use hull_protocol::READY_PORT;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::disks::{self, Disks, MAX_SLOTS};
use super::failure::PodFailure;
use super::installation::Installation;
use super::limits::Limits;
use super::machine::{SHARE_TAG, spec};
use super::network::{HostNetwork, PodNetwork};
use crate::agent::network::Plan;
use crate::agent::{Agent, AgentError, GuestInfo, GuestSize, Process};
use crate::metrics::Meter;
use crate::oci::{InfraSpec, MachineSize};
use crate::volumes::{MemoryVolume, Share};

/// All that a machine is started with, but for its network.
#[derive(Debug)]
pub struct Boot<'a> {
    pub installation: &'a Installation,
    pub limits: Limits,
    pub size: MachineSize,
    /// Where the guest's console goes: a pipe that is read.
    pub console: OwnedFd,
    pub share: &'a Share,
    /// Slots for root file systems on disks, at most [`super::MAX_SLOTS`].
    pub disk_slots: u8,
    /// See [`HostNetwork::devices`].
    pub nets: Vec<NetSpec>,
}

impl Boot<'_> {
    /// Starts the machine. It dies when what is returned is dropped.
    ///
    /// # Errors
    /// When a file of Hull's own, KVM or `hull-vmm` says no.
    pub async fn launch(self) -> Result<Launched, PodFailure> {
        let spec = spec(
            self.installation,
            self.size,
            self.console,
            self.share.root(),
        )?;
        let slots = self.disk_slots.min(MAX_SLOTS);
        let spec = (0..slots).fold(spec, |spec, slot| spec.disk_slot(disks::serial(slot)));
        let spec = self
            .nets
            .into_iter()
            .fold(spec, |spec, net| spec.net(net, None));
        let begun = Instant::now();
        let (machine, connections) = Machine::launch(&self.installation.vmm, spec).await?;
        let machine = Arc::new(machine);
        Ok(Launched {
            disks: Disks::new(Arc::clone(&machine), slots),
            machine,
            connections,
            limits: self.limits,
            size: self.size,
            begun,
        })
    }
}

/// A machine that boots.
#[derive(Debug)]
pub struct Launched {
    machine: Arc<Machine>,
    disks: Disks,
    connections: mpsc::Receiver<GuestConnection>,
    limits: Limits,
    size: MachineSize,
    begun: Instant,
}

impl Launched {
    /// Of `hull-vmm`.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        u32::try_from(self.machine.pid()).ok()
    }

    /// How it came to run.
    #[must_use]
    pub fn started(&self) -> &Started {
        self.machine.started()
    }

    /// Waits until the agent has answered.
    ///
    /// # Errors
    /// When it doesn't in time, or the machine ends.
    pub async fn meet(self) -> Result<(Guest, GuestInfo), PodFailure> {
        let Self {
            machine,
            disks,
            connections,
            limits,
            size,
            begun,
        } = self;
        let alive = agent_ready(&machine, connections, limits.agent_ready).await?;
        let agent = Agent::connect(Arc::<Machine>::clone(&machine), limits.call).await?;
        let info = agent
            .hello(GuestSize {
                vcpus: size.vcpus,
                added_memory_mib: 0,
            })
            .await?;
        let guest = Guest {
            machine,
            disks,
            agent,
            alive,
            end: limits.end,
            size,
            boot: begun.elapsed(),
        };
        Ok((guest, info))
    }
}

/// A machine whose agent has answered.
#[derive(Debug)]
pub struct Guest {
    machine: Arc<Machine>,
    disks: Disks,
    agent: Agent,
    /// Open as long as the agent lives.
    alive: UnixStream,
    /// See [`Limits::end`].
    end: Duration,
    size: MachineSize,
    /// From its start to the agent's answer.
    boot: Duration,
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

/// Waits for the agent's word that it is ready.
async fn agent_ready(
    machine: &Machine,
    mut connections: mpsc::Receiver<GuestConnection>,
    limit: Duration,
) -> Result<UnixStream, PodFailure> {
    let ready = async {
        loop {
            match connections.recv().await {
                Some(connection) if connection.port == READY_PORT => return Ok(connection.stream),
                Some(_) => {}
                None => return Err(PodFailure::MachineEnded(machine.wait().await)),
            }
        }
    };
    tokio::select! {
        ready = timeout(limit, ready) => ready.unwrap_or(Err(PodFailure::AgentNotReady(limit))),
        reason = machine.wait() => Err(PodFailure::MachineEnded(reason)),
    }
}
