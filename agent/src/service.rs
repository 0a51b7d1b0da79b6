//! The agent's calls, as the supervisor makes them.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use hull_protocol::agent::{
    AttachRequest, ConfigureNetworkRequest, CreateContainerRequest, CreateContainerResponse, Empty,
    ExecRequest, ExecResponse, ForwardRequest, FreezeRequest, GetReadyRequest, HelloRequest,
    HelloResponse, ProcessesRequest, ProcessesResponse, RemoveContainerRequest, RemoveExecRequest,
    ResizeRequest, SignalRequest, StartContainerRequest, StartInfraRequest, StartInfraResponse,
    StatsRequest, StatsResponse, ThawRequest, UpdateRequest, WaitOomRequest, WaitOomResponse,
    WaitRequest, WaitResponse,
};
use hull_protocol::agent_ttrpc::Agent;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;

use crate::container::Exit;
use crate::entropy;
use crate::error::{Doing, Error, Result};
use crate::growth::Growth;
use crate::pod::Pod;
use crate::stdio::Size;

/// The ttrpc service over a pod.
#[derive(Debug)]
pub struct Service {
    pub pod: Arc<Pod>,
    pub growth: Growth,
    /// CLOCK_BOOTTIME when the agent started, and when it was ready.
    pub started: Duration,
    pub ready: Duration,
    /// Told when the supervisor asks for the end.
    pub shutdown: Arc<Notify>,
}

/// CLOCK_BOOTTIME.
pub fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn set_clock(request: &HelloRequest) -> Result<()> {
    // A supervisor that says nothing leaves the clock alone.
    if request.realtime_seconds == 0 {
        return Ok(());
    }
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: request.realtime_seconds,
            tv_nsec: request.realtime_nanoseconds.into(),
        },
    )
    .doing(|| "setting the clock".into())
}

fn wait_response(exit: Exit) -> WaitResponse {
    let at = exit.ended.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    WaitResponse {
        exit_code: exit.ended.code,
        signal: exit.ended.signal,
        oom_killed: exit.oom_killed,
        exited_at_seconds: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
        exited_at_nanoseconds: at.subsec_nanos(),
        ..Default::default()
    }
}

/// Runs a call to its end also when the supervisor's connection breaks: ttrpc drops
/// a handler then, and half-made containers would be left.
async fn finish<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(call).await {
        Ok(result) => result,
        Err(error) => Err(Error::State(format!("the agent failed: {error}"))),
    }
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        // Before anything else of this machine's happens.
        if !request.entropy.is_empty() {
            entropy::reseed(&request.entropy)?;
        }
        set_clock(&request)?;
        self.growth.begin(request.vcpus, request.added_memory_mib)?;
        Ok(HelloResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            agent_start_micros: micros(self.started),
            agent_ready_micros: micros(self.ready),
            now_micros: micros(boot_time()),
            ..Default::default()
        })
    }

    async fn get_ready(&self, _: &TtrpcContext, request: GetReadyRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        finish(async move { pod.rehearse(request.spec).await }).await?;
        Ok(Empty::new())
    }

    async fn start_infra(
        &self,
        _: &TtrpcContext,
        request: StartInfraRequest,
    ) -> ttrpc::Result<StartInfraResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = finish(async move { pod.start_infra(request).await }).await?;
        Ok(StartInfraResponse {
            pid,
            ..Default::default()
        })
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        finish(async move { pod.configure_network(&request).await }).await?;
        Ok(Empty::new())
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.pod.forward(&request).await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = finish(async move { pod.create(request).await }).await?;
        Ok(CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.growth.over().await;
        self.pod.start(&request.container_id)?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = finish(async move { pod.exec(request).await }).await?;
        Ok(ExecResponse {
            pid,
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        self.pod.signal(
            &request.container_id,
            &request.exec_id,
            request.signal,
            request.all,
        )?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self
            .pod
            .wait(&request.container_id, &request.exec_id)
            .await?;
        Ok(wait_response(exit))
    }

    async fn attach(&self, _: &TtrpcContext, request: AttachRequest) -> ttrpc::Result<Empty> {
        self.pod.attach(&request).await?;
        Ok(Empty::new())
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        let size = Size::new(request.columns, request.rows)?;
        self.pod
            .resize(&request.container_id, &request.exec_id, size)?;
        Ok(Empty::new())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        finish(async move { pod.remove(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn remove_exec(
        &self,
        _: &TtrpcContext,
        request: RemoveExecRequest,
    ) -> ttrpc::Result<Empty> {
        self.pod
            .remove_exec(&request.container_id, &request.exec_id)?;
        Ok(Empty::new())
    }

    async fn processes(
        &self,
        _: &TtrpcContext,
        request: ProcessesRequest,
    ) -> ttrpc::Result<ProcessesResponse> {
        Ok(ProcessesResponse {
            pids: self.pod.processes(&request.container_id)?,
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.pod.stats(&request.container_id)?)
    }

    async fn freeze(&self, _: &TtrpcContext, request: FreezeRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        finish(async move { pod.freeze(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn thaw(&self, _: &TtrpcContext, request: ThawRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        finish(async move { pod.thaw(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let pod = Arc::clone(&self.pod);
        finish(async move { pod.update(&request.container_id, &request.resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        request: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let kills = self
            .pod
            .wait_oom(&request.container_id, request.kills)
            .await?;
        Ok(WaitOomResponse {
            kills,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.shutdown.notify_one();
        Ok(Empty::new())
    }
}
