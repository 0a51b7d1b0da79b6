//! What is known of a pod, in the words of Kubernetes.

use std::net::IpAddr;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::PodId;

/// A pod's phase, as Kubernetes has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The machine boots, or an init container runs.
    Pending,
    /// Infra lives. Stays so when every container has ended.
    Running,
    /// Ended, and every container returned 0.
    Succeeded,
    /// Ended otherwise.
    Failed,
}

impl Phase {
    /// Nothing happens any more.
    #[must_use]
    pub fn ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    pub id: PodId,
    pub name: String,
    pub phase: Phase,
    /// One word for why the pod is in its phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    pub created_at: Timestamp,
    /// When all containers had been started for the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supervisor_pid: Option<u32>,
    /// `hull-vmm`, as the host sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// The template that its machine began with. None: it booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// The first of [`Self::pod_ips`].
    #[serde(default, rename = "podIP", skip_serializing_if = "Option::is_none")]
    pub pod_ip: Option<IpAddr>,
    #[serde(default, rename = "podIPs", skip_serializing_if = "Vec::is_empty")]
    pub pod_ips: Vec<PodIp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStatus>,
    pub restart_policy: String,
    /// Its machine stands still.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Every container has ended and none will be started again.
    pub completed: bool,
    /// Of the container that failed first, once one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_failure: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_kernel: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    #[serde(
        default,
        rename = "initContainerStatuses",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub init_containers: Vec<ContainerStatus>,
    #[serde(rename = "containerStatuses")]
    pub containers: Vec<ContainerStatus>,
    /// Those that have joined the pod while it ran. They count neither for [`Self::completed`] nor
    /// for the pod's result, as Kubernetes has it for ephemeral containers.
    #[serde(
        default,
        rename = "ephemeralContainerStatuses",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub joined: Vec<ContainerStatus>,
    /// The manifest's file, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// The end of the guest's console, when the machine did not end in peace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console_tail: Vec<String>,
}

impl PodStatus {
    /// Init containers, then the others of the manifest, then those that have joined.
    pub fn all_containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.manifests_containers().chain(&self.joined)
    }

    /// Without those that have joined.
    pub fn manifests_containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.init_containers.iter().chain(&self.containers)
    }

    pub fn all_containers_mut(&mut self) -> impl Iterator<Item = &mut ContainerStatus> {
        self.init_containers
            .iter_mut()
            .chain(&mut self.containers)
            .chain(&mut self.joined)
    }

    pub fn container_mut(&mut self, name: &str) -> Option<&mut ContainerStatus> {
        self.all_containers_mut().find(|c| c.name == name)
    }

    /// Sets the pod's addresses, the first one first.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) {
        self.pod_ip = addresses.first().copied();
        self.pod_ips = addresses.iter().map(|ip| PodIp { ip: *ip }).collect();
    }

    #[must_use]
    pub fn container(&self, name: &str) -> Option<&ContainerStatus> {
        self.all_containers().find(|c| c.name == name)
    }

    /// What a `hull run` of this pod returns: 0, or the code of the container that failed first,
    /// or 1 when the pod failed by itself.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match (self.first_failure, self.phase) {
            (Some(code), _) => code,
            (None, Phase::Failed) => 1,
            (None, _) => 0,
        }
    }
}

/// An address of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIp {
    pub ip: IpAddr,
}

/// What a pod has of the host's networks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// Of named networks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Somebody else's network namespace, in which it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<PathBuf>,
    /// `0.0.0.0:8080->80/tcp`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
}

/// One container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    pub name: String,
    pub image: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
    pub restart_count: u32,
    pub state: ContainerState,
    /// How it ended before the last restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_state: Option<ContainerState>,
    /// Ended, and not to be started again.
    #[serde(default)]
    pub finished: bool,
}

impl ContainerStatus {
    #[must_use]
    pub fn new(name: impl Into<String>, image: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            image_id: None,
            restart_count: 0,
            state: ContainerState::Waiting(Waiting {
                reason: "ContainerCreating".into(),
                message: None,
            }),
            last_state: None,
            finished: false,
        }
    }

    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.state, ContainerState::Running(_))
    }

    #[must_use]
    pub fn terminated(&self) -> Option<&Terminated> {
        self.state.terminated()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ContainerState {
    Waiting(Waiting),
    Running(Running),
    Terminated(Terminated),
}

impl ContainerState {
    #[must_use]
    pub fn terminated(&self) -> Option<&Terminated> {
        match self {
            Self::Terminated(end) => Some(end),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Waiting {
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Running {
    pub started_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terminated {
    pub exit_code: i32,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, or `PodEnded`.
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> PodStatus {
        PodStatus {
            id: PodId::random().unwrap(),
            name: "web".into(),
            phase: Phase::Running,
            reason: None,
            message: None,
            created_at: Timestamp::UNIX_EPOCH,
            started_at: None,
            finished_at: None,
            supervisor_pid: Some(1),
            vmm_pid: None,
            template: None,
            pod_ip: None,
            pod_ips: vec![],
            network: None,
            restart_policy: "Always".into(),
            paused: false,
            completed: false,
            first_failure: None,
            guest_kernel: None,
            agent_version: None,
            init_containers: vec![],
            containers: vec![ContainerStatus::new("a", "busybox")],
            joined: vec![],
            manifest: None,
            console_tail: vec![],
        }
    }

    #[test]
    fn reads_what_it_writes() {
        let mut pod = pod();
        pod.container_mut("a").unwrap().state = ContainerState::Terminated(Terminated {
            exit_code: 137,
            signal: Some(9),
            reason: "OOMKilled".into(),
            message: None,
            started_at: None,
            finished_at: Timestamp::UNIX_EPOCH,
        });

        let read: PodStatus = serde_json::from_slice(&serde_json::to_vec(&pod).unwrap()).unwrap();

        assert_eq!(read, pod);
    }

    #[test]
    fn container_states_are_spelt_as_in_kubernetes() {
        let json = serde_json::to_value(pod()).unwrap();

        assert_eq!(
            json["containerStatuses"][0]["state"]["waiting"]["reason"],
            "ContainerCreating"
        );
    }

    #[test]
    fn who_has_joined_is_found_by_name() {
        let mut pod = pod();
        pod.joined.push(ContainerStatus::new("b", "busybox"));

        let json = serde_json::to_value(&pod).unwrap();

        assert_eq!(json["ephemeralContainerStatuses"][0]["name"], "b");
        assert!(pod.container("b").is_some() && pod.container_mut("b").is_some());
        assert_eq!(pod.manifests_containers().count(), 1);
    }

    #[test]
    fn addresses_are_spelt_as_in_kubernetes() {
        let mut pod = pod();
        pod.set_addresses(&["10.83.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]);

        let json = serde_json::to_value(pod).unwrap();

        assert_eq!(json["podIP"], "10.83.0.2");
        assert_eq!(json["podIPs"][1]["ip"], "fd00::2");
    }

    #[test]
    fn the_exit_code_is_that_of_the_first_failure() {
        let mut pod = pod();
        assert_eq!(pod.exit_code(), 0);

        pod.phase = Phase::Failed;
        assert_eq!(pod.exit_code(), 1);

        pod.first_failure = Some(42);
        assert_eq!(pod.exit_code(), 42);
    }
}
