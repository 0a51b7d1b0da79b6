//! CRI as a kubelet speaks it: pods and containers of a test's containerd.

use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::*;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::containerd::Containerd;
use crate::{eventually, scaled};

/// The longest that a call may take.
const LIMIT: Duration = Duration::from_secs(30);
/// For a container to do what it is there for.
const SOON: Duration = Duration::from_secs(10);

/// A client of CRI's runtime service.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    logs: PathBuf,
    cgroup: String,
}

impl Cri {
    /// Of a containerd that runs.
    ///
    /// # Panics
    /// When it doesn't answer.
    #[must_use]
    pub fn new(containerd: &Containerd) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads can be started");
        let endpoint = format!("unix://{}", containerd.socket().display());
        let endpoint = Endpoint::from_shared(endpoint).expect("a path");
        let client = {
            let _inside = runtime.enter();
            RuntimeServiceClient::new(endpoint.timeout(scaled(LIMIT)).connect_lazy())
        };
        let cri = Self {
            runtime,
            client,
            logs: containerd.work_dir().join("logs"),
            cgroup: format!("/{}", containerd.name()),
        };
        eventually("CRI answers", LIMIT, || {
            let status = cri.call(|mut client| async move {
                client.status(StatusRequest { verbose: false }).await
            });
            let conditions = status.ok()?.status?.conditions;
            conditions
                .iter()
                .all(|condition| condition.status)
                .then_some(())
        });
        cri
    }

    /// Asks for something: `cri.call(|mut client| async move { client.exec_sync(request).await })`.
    ///
    /// # Errors
    /// As containerd says it.
    pub fn call<T, F>(
        &self,
        call: impl FnOnce(RuntimeServiceClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = self.runtime.block_on(call(self.client.clone()));
        answer.map(Response::into_inner)
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The configuration of a pod in the namespace `default`, with a directory for its logs and the test's cgroup.
    ///
    /// # Panics
    /// When the directory can't be made.
    #[must_use]
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        let logs = self.logs.join(name);
        std::fs::create_dir_all(&logs).expect("the directory is writable");
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(LinuxSandboxSecurityContext::default()),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// `RunPodSandbox`: the sandbox's id. Who calls it removes it.
    ///
    /// # Errors
    /// As containerd says it.
    pub fn run_sandbox(&self, handler: &str, config: &PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let answer = self.call(|mut client| async move { client.run_pod_sandbox(request).await });
        Ok(answer?.pod_sandbox_id)
    }

    /// `StopPodSandbox` and `RemovePodSandbox`.
    ///
    /// # Errors
    /// As containerd says it.
    pub fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.call(|mut client| async move { client.stop_pod_sandbox(stop).await })?;
        let remove = RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        self.call(|mut client| async move { client.remove_pod_sandbox(remove).await })?;
        Ok(())
    }
}

/// A container that runs a shell script in the image `busybox`, to be changed as a test needs it.
#[must_use]
pub fn container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: "docker.io/library/busybox:latest".into(),
            ..Default::default()
        }),
        command: ["sh", "-c", script].map(String::from).into(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(security()),
        }),
        ..Default::default()
    }
}

/// What a kubelet says of each container: without it, all have one PID namespace.
#[must_use]
pub fn security() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        namespace_options: Some(NamespaceOption {
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A line of a container's log, as the kubelet reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Not the end of what was a line.
    pub partial: bool,
    pub text: String,
}

/// Lines in CRI's format: time, stream, F or P, text.
///
/// # Panics
/// When one is not in that format.
#[must_use]
pub fn log_lines(path: &Path) -> Vec<LogLine> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let parse = |line: &str| {
        let mut fields = line.splitn(4, ' ');
        let time = fields.next().expect("a time");
        assert!(
            time.len() >= "2026-01-01T00:00:00Z".len() && time.contains('T'),
            "{line}"
        );
        let stream = fields.next().expect("a stream").to_owned();
        assert!(["stdout", "stderr"].contains(&&*stream), "{line}");
        LogLine {
            stream,
            partial: fields.next().expect("a tag") == "P",
            text: fields.next().unwrap_or_default().to_owned(),
        }
    };
    text[..whole].lines().map(parse).collect()
}

/// A pod that is removed at the end of its test.
#[derive(Debug)]
pub struct CriPod<'a> {
    cri: &'a Cri,
    pub id: String,
    pub config: PodSandboxConfig,
}

impl<'a> CriPod<'a> {
    /// A pod of the handler `hull`.
    ///
    /// # Panics
    /// When it doesn't start.
    #[must_use]
    pub fn run(cri: &'a Cri, name: &str) -> Self {
        Self::run_with(cri, "hull", cri.pod_config(name))
    }

    /// The same, as it is told.
    ///
    /// # Panics
    /// When it doesn't start.
    #[must_use]
    pub fn run_with(cri: &'a Cri, handler: &str, config: PodSandboxConfig) -> Self {
        let id = cri.run_sandbox(handler, &config).expect("the pod starts");
        Self { cri, id, config }
    }

    /// # Panics
    /// When it is not known.
    #[must_use]
    pub fn status(&self) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .cri
            .call(|mut client| async move { client.pod_sandbox_status(request).await });
        let status = answer.expect("the pod is known").status;
        status.expect("a status")
    }

    /// The pod's address.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn address(&self) -> String {
        self.status().network.expect("a network").ip
    }

    /// `CreateContainer`: its id.
    ///
    /// # Errors
    /// As containerd says it.
    pub fn create(&self, config: ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let answer = self
            .cri
            .call(|mut client| async move { client.create_container(request).await });
        Ok(answer?.container_id)
    }

    /// # Errors
    /// As containerd says it.
    pub fn start(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: id.into(),
        };
        self.cri
            .call(|mut client| async move { client.start_container(request).await })?;
        Ok(())
    }

    /// Makes and starts a container, and returns its id.
    ///
    /// # Panics
    /// When it doesn't start.
    #[must_use]
    pub fn started(&self, config: ContainerConfig) -> String {
        let id = self.create(config).expect("the container is made");
        self.start(&id).expect("the container starts");
        id
    }

    /// # Panics
    /// When there is no such container.
    #[must_use]
    pub fn container_status(&self, id: &str) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let answer = self
            .cri
            .call(|mut client| async move { client.container_status(request).await });
        let status = answer.expect("the container is known").status;
        status.expect("a status")
    }

    /// Waits for a container's end.
    ///
    /// # Panics
    /// When it takes too long.
    #[must_use]
    pub fn ended(&self, id: &str) -> ContainerStatus {
        eventually("a container's end", SOON, || {
            let status = self.container_status(id);
            (status.state() == ContainerState::ContainerExited).then_some(status)
        })
    }

    /// `ExecSync` of a shell script.
    ///
    /// # Errors
    /// As containerd says it.
    pub fn exec(&self, id: &str, script: &str) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: ["sh", "-c", script].map(String::from).into(),
            timeout: i64::try_from(scaled(SOON).as_secs()).unwrap_or(i64::MAX),
        };
        self.cri
            .call(|mut client| async move { client.exec_sync(request).await })
    }

    /// Runs a script in a container, which must succeed, and returns its output without the end of its last line.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn sh(&self, id: &str, script: &str) -> String {
        let output = self.exec(id, script).expect("exec");
        assert_eq!(
            output.exit_code,
            0,
            "{script}: {} {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned()
    }

    /// # Errors
    /// As containerd says it.
    pub fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.into(),
            timeout: i64::try_from(grace.as_secs()).unwrap_or(i64::MAX),
        };
        self.cri
            .call(|mut client| async move { client.stop_container(request).await })?;
        Ok(())
    }

    /// # Errors
    /// As containerd says it.
    pub fn remove_container(&self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        self.cri
            .call(|mut client| async move { client.remove_container(request).await })?;
        Ok(())
    }

    /// Where a log of this name is.
    #[must_use]
    pub fn log_path(&self, name: &str) -> PathBuf {
        Path::new(&self.config.log_directory).join(name)
    }

    /// Waits until a log of this name has a line, and returns all of it.
    pub fn wait_log(&self, name: &str, text: &str) -> Vec<LogLine> {
        eventually(&format!("{name} has {text:?}"), SOON, || {
            let lines = log_lines(&self.log_path(name));
            lines.iter().any(|line| line.text == text).then_some(lines)
        })
    }

    /// Removes the pod, which must succeed.
    ///
    /// # Panics
    /// When it doesn't.
    pub fn remove(self) {
        self.cri.remove_sandbox(&self.id).expect("the pod goes");
    }
}

impl Drop for CriPod<'_> {
    fn drop(&mut self) {
        // Removed already: nothing happens.
        let _ = self.cri.remove_sandbox(&self.id);
    }
}
