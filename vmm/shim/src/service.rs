//! containerd's task API, versions 2 and 3, which differ in nothing but their names.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use hull_pod::supervisor::api::Size;
use serde::de::DeserializeOwned;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::events::timestamp;
use crate::failure::TaskError;
use crate::managed::State;
use crate::options;
use crate::streams::Places;
use crate::tasks::{New, Tasks};
use crate::{spec, usage};

const V2: &str = "containerd.task.v2.Task";
/// Bounds what a specification in a request may be.
const JSON_MAX: usize = 1 << 20;
/// The end of the type that resources are sent as (types.containerd.io/opencontainers/runtime-spec/1/LinuxResources).
const RESOURCES: &str = "/LinuxResources";

/// For a ttrpc server.
#[must_use]
pub fn services(tasks: &Arc<Tasks>) -> HashMap<String, Service> {
    let service = || {
        create_task(Arc::new(TaskService {
            tasks: Arc::clone(tasks),
        }))
    };
    let mut all = service();
    all.extend(service().into_values().map(|v3| (V2.to_owned(), v3)));
    all
}

struct TaskService {
    tasks: Arc<Tasks>,
}

impl TaskService {
    /// Does it to its end, although containerd may go meanwhile and take the connection along.
    async fn whole<T, W>(&self, work: impl FnOnce(Arc<Tasks>) -> W) -> Result<T, TaskError>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, TaskError>> + Send + 'static,
    {
        tokio::spawn(work(Arc::clone(&self.tasks))).await?
    }
}

fn parse<T: DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, TaskError> {
    if json.len() > JSON_MAX {
        let no = format!("{what} is longer than {JSON_MAX} bytes");
        return Err(TaskError::Unsupported(no));
    }
    serde_json::from_slice(json).map_err(|source| TaskError::Json { what, source })
}

/// The host's process that stands for all of the pod's: it is in the pod's network namespace.
fn pid() -> u32 {
    std::process::id()
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            let no = "a container can't be restored from a checkpoint";
            return Err(TaskError::Unsupported(no.into()).into());
        }
        options::on_create(request.options.as_ref()).map_err(TaskError::from)?;
        let new = New {
            id: request.id,
            bundle: request.bundle.into(),
            root: request.rootfs,
            places: Places {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        self.whole(|tasks| async move { tasks.create(new).await })
            .await?;
        Ok(CreateTaskResponse {
            pid: pid(),
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.whole(|tasks| async move { tasks.start(&request.id, &request.exec_id).await })
            .await?;
        Ok(StartResponse {
            pid: pid(),
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let exit = self
            .whole(|tasks| async move { tasks.delete(&request.id, &request.exec_id).await })
            .await?;
        Ok(DeleteResponse {
            pid: pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (task, process) = self.tasks.look(&request.id, &request.exec_id)?;
        let places = process.places.clone();
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: task.bundle.display().to_string(),
            pid: pid(),
            stdin: places.stdin,
            stdout: places.stdout,
            stderr: places.stderr,
            terminal: places.terminal,
            ..Default::default()
        };
        let status = match process.state() {
            State::Created => Status::CREATED,
            State::Running => Status::RUNNING,
            State::Paused => Status::PAUSED,
            State::Ended(exit) => {
                response.exit_status = exit.status;
                response.exited_at = Some(timestamp(exit.at)).into();
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.tasks.processes(&request.id).await?;
        let processes = pids.into_iter().map(|pid| ProcessInfo {
            pid,
            ..Default::default()
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..
        } = request;
        self.whole(|tasks| async move { tasks.kill(&id, &exec_id, signal, all).await })
            .await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let process = parse("what is to be run", &request.spec.value)?;
        let places = Places {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        self.tasks
            .exec(&request.id, &request.exec_id, places, &process)
            .await?;
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.whole(|tasks| async move { tasks.pause(&request.id).await })
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.whole(|tasks| async move { tasks.resume(&request.id).await })
            .await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let no = "no checkpoint can be made of a container of a machine";
        Err(TaskError::Unsupported(no.into()).into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let given = request.resources.unwrap_or_default();
        if !given.type_url.ends_with(RESOURCES) {
            let no = format!(
                "what a container may use can't be said as {:?}",
                given.type_url
            );
            return Err(TaskError::Unsupported(no).into());
        }
        let given = parse("what a container may use", &given.value)?;
        let resources = spec::update(&given).map_err(TaskError::from)?;
        self.whole(|tasks| async move { tasks.update(&request.id, &resources).await })
            .await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.tasks.stats(&request.id).await?;
        Ok(StatsResponse {
            stats: Some(usage::any(stats)?).into(),
            ..Default::default()
        })
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let size = Size {
            columns: u16::try_from(request.width).unwrap_or(u16::MAX),
            rows: u16::try_from(request.height).unwrap_or(u16::MAX),
        };
        self.tasks
            .resize(&request.id, &request.exec_id, size)
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.tasks.close_stdin(&request.id, &request.exec_id)?;
        }
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.tasks.wait(&request.id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        // A containerd that was killed before it could ask for the container takes yes for an answer, and would keep a
        // shim of which nobody knows.
        self.tasks.creations().await;
        self.tasks.look(&request.id, "")?;
        Ok(ConnectResponse {
            shim_pid: pid(),
            task_pid: pid(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let now = request.now;
        self.whole(|tasks| async move {
            tasks.shut_down(now).await;
            Ok(())
        })
        .await?;
        Ok(Empty::default())
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
