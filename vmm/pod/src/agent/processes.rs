//! Containers and their processes: what the agent is asked of them.

pub use hull_protocol::agent::Disk;
use hull_protocol::agent::{
    AttachRequest, CreateContainerRequest, ExecRequest, PidNamespace, ProcessesRequest,
    RemoveContainerRequest, RemoveExecRequest, ResizeRequest, SignalRequest, StartContainerRequest,
    WaitRequest,
};
use ttrpc::context::Context;

use super::{Agent, AgentError, Stdio, failure};
use crate::oci::Pids;
use crate::supervisor::api::Size;

/// More processes than a container is told to have at most.
const PROCESSES_MAX: usize = 4096;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    pub oom_killed: bool,
}

/// A process of the guest.
#[derive(Debug, Clone, Copy)]
pub enum Process<'a> {
    Infra,
    Container(&'a str),
    Exec { container: &'a str, exec: &'a str },
}

impl Process<'_> {
    fn ids(self) -> (String, String) {
        match self {
            Self::Infra => (String::new(), String::new()),
            Self::Container(id) => (id.into(), String::new()),
            Self::Exec { container, exec } => (container.into(), exec.into()),
        }
    }
}

/// Where a container's root file system is.
#[derive(Debug, Clone)]
pub enum Root {
    /// A path beneath the pod's share.
    Share(String),
    /// A disk of the machine, which the agent mounts.
    Disk(Disk),
}

impl Agent {
    /// Prepares a container, with streams of [`Self::open_stdio`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn create_container(
        &self,
        id: &str,
        spec: &crate::oci::ContainerSpec,
        root: &Root,
        stdio: &Stdio,
    ) -> Result<(), AgentError> {
        let json = serde_json::to_vec(&spec.spec).map_err(|error| AgentError::Protocol {
            call: "CreateContainer",
            message: error.to_string(),
        })?;
        let (rootfs, disk) = match root {
            Root::Share(path) => (path.clone(), None),
            Root::Disk(disk) => (String::new(), Some(disk.clone())),
        };
        let (pid_namespace, pid_target) = match &spec.pids {
            Pids::AsPod => (PidNamespace::DEFAULT, ""),
            Pids::Own => (PidNamespace::OWN, ""),
            Pids::Pod => (PidNamespace::INFRA, ""),
            Pids::Of(container) => (PidNamespace::CONTAINER, container.as_str()),
        };
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: json,
            rootfs,
            disk: disk.into(),
            pid_namespace: pid_namespace.into(),
            pid_target: pid_target.into(),
            user: spec.user.clone(),
            additional_gids: spec.additional_gids.clone(),
            exact_groups: spec.exact_groups,
            streams: Some(stdio.request.clone()).into(),
            ..Default::default()
        };
        self.call(
            "CreateContainer",
            self.client.create_container(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Gives a container that runs other streams, of [`Self::open_stdio`], in place of those that it has lost.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn attach(&self, id: &str, stdio: &Stdio) -> Result<(), AgentError> {
        let request = AttachRequest {
            container_id: id.into(),
            streams: Some(stdio.request.clone()).into(),
            ..Default::default()
        };
        self.call("Attach", self.client.attach(self.context(), &request))
            .await
            .map(drop)
    }

    /// # Errors
    /// See [`AgentError`].
    pub async fn start_container(&self, id: &str) -> Result<(), AgentError> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.call(
            "StartContainer",
            self.client.start_container(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Forgets a container that has ended.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn remove_container(&self, id: &str) -> Result<(), AgentError> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.call(
            "RemoveContainer",
            self.client.remove_container(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Runs a further process in a container, with streams of [`Self::open_stdio`].
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn exec(
        &self,
        id: &str,
        exec: &crate::supervisor::api::Exec,
        stdio: &Stdio,
    ) -> Result<(), AgentError> {
        let request = ExecRequest {
            container_id: exec.container.clone(),
            exec_id: id.into(),
            args: exec.args.clone(),
            env: exec.env.clone(),
            cwd: exec.cwd.clone().unwrap_or_default(),
            user: exec.user.clone().unwrap_or_default(),
            streams: Some(stdio.request.clone()).into(),
            ..Default::default()
        };
        self.call("Exec", self.client.exec(self.context(), &request))
            .await
            .map(drop)
    }

    /// Forgets an exec that has ended.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn remove_exec(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = RemoveExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.call(
            "RemoveExec",
            self.client.remove_exec(self.context(), &request),
        )
        .await
        .map(drop)
    }

    /// Sends a signal to a process, or to `all` of its container.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn signal(
        &self,
        process: Process<'_>,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let (container_id, exec_id) = process.ids();
        let request = SignalRequest {
            container_id,
            exec_id,
            signal,
            all,
            ..Default::default()
        };
        self.call("Signal", self.client.signal(self.context(), &request))
            .await
            .map(drop)
    }

    /// Waits for the end of a process, as long as it takes.
    ///
    /// # Errors
    /// [`AgentError::Lost`] when the agent or its machine has ended.
    pub async fn wait(&self, process: Process<'_>) -> Result<ExitStatus, AgentError> {
        let (container_id, exec_id) = process.ids();
        let request = WaitRequest {
            container_id,
            exec_id,
            ..Default::default()
        };
        let answer = self
            .client
            .wait(Context::default(), &request)
            .await
            .map_err(|error| failure("Wait", error))?;
        Ok(ExitStatus {
            // What is no exit code of Linux is not one here.
            code: i32::try_from(answer.exit_code)
                .ok()
                .filter(|code| (0..=255).contains(code))
                .unwrap_or(255),
            signal: i32::try_from(answer.signal)
                .ok()
                .filter(|signal| (1..=64).contains(signal)),
            oom_killed: answer.oom_killed,
        })
    }

    /// # Errors
    /// See [`AgentError`].
    pub async fn resize(&self, process: Process<'_>, size: Size) -> Result<(), AgentError> {
        let (container_id, exec_id) = process.ids();
        let request = ResizeRequest {
            container_id,
            exec_id,
            columns: size.columns.into(),
            rows: size.rows.into(),
            ..Default::default()
        };
        self.call("Resize", self.client.resize(self.context(), &request))
            .await
            .map(drop)
    }

    /// The processes of a container, as the guest numbers them. At most 4096.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn processes(&self, container: &str) -> Result<Vec<u32>, AgentError> {
        let request = ProcessesRequest {
            container_id: container.into(),
            ..Default::default()
        };
        let answer = self
            .call("Processes", self.client.processes(self.context(), &request))
            .await?;
        let mut pids = answer.pids;
        pids.truncate(PROCESSES_MAX);
        Ok(pids)
    }
}
