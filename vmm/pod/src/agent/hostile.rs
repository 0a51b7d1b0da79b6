//! Tests: an agent that its guest owns, and what it can do to a supervisor.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hull_machine::client::ConnectError;
use hull_protocol::agent::{
    HelloRequest, HelloResponse, StartContainerRequest, WaitRequest, WaitResponse,
};
use hull_protocol::agent_ttrpc::{Agent as Service, create_agent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use ttrpc::r#async::{Server, TtrpcContext};

use super::failure::TEXT_MAX;
use super::{Agent, AgentError, Connect, GuestSize, Process};

const LIMIT: Duration = Duration::from_millis(300);
/// Longer than any call may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest whose every port leads to one socket.
struct Guest(PathBuf);

#[async_trait]
impl Connect for Guest {
    async fn connect(&self, _port: u32) -> Result<UnixStream, ConnectError> {
        UnixStream::connect(&self.0)
            .await
            .map_err(ConnectError::Socket)
    }
}

/// An agent that does `conduct` with each connection.
async fn agent<F>(conduct: fn(UnixStream) -> F) -> (tempfile::TempDir, Agent)
where
    F: Future<Output = ()> + Send + 'static,
{
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(conduct(stream));
        }
    });
    let agent = Agent::connect(Arc::new(Guest(path)), LIMIT).await.unwrap();
    (root, agent)
}

async fn hello(agent: &Agent) -> AgentError {
    timeout(PATIENCE, agent.hello(GuestSize::default()))
        .await
        .unwrap()
        .unwrap_err()
}

#[tokio::test]
async fn silence_ends_in_time() {
    let (_root, agent) = agent(|stream| async move {
        tokio::time::sleep(PATIENCE).await;
        drop(stream);
    })
    .await;

    hello(&agent).await;
}

#[tokio::test]
async fn a_closed_connection_is_noticed_by_who_waits() {
    let (_root, agent) = agent(|mut stream| async move {
        let _ = stream.read(&mut [0; 1]).await;
    })
    .await;

    let waited = timeout(PATIENCE, agent.wait(Process::Infra)).await.unwrap();

    assert!(waited.is_err());
}

#[tokio::test]
async fn garbage_is_no_answer() {
    let (_root, agent) = agent(|mut stream| async move {
        let _ = stream.read(&mut [0; 10]).await;
        let _ = stream.write_all(&[0x5a; 1 << 16]).await;
        tokio::time::sleep(PATIENCE).await;
    })
    .await;

    hello(&agent).await;
}

/// CVE class "shim inputs": a reply as long as its header says would be 4 GiB.
#[tokio::test]
async fn a_reply_without_bounds_is_not_waited_for() {
    let (_root, agent) = agent(|mut stream| async move {
        let _ = stream.read(&mut [0; 10]).await;
        // ttrpc: length, stream id, type (response), flags.
        let _ = stream.write_all(&u32::MAX.to_be_bytes()).await;
        let _ = stream.write_all(&[0, 0, 0, 1, 2, 0]).await;
        while stream.write_all(&[0; 1 << 16]).await.is_ok() {}
    })
    .await;

    hello(&agent).await;
}

#[tokio::test]
async fn a_stream_that_nobody_takes_is_no_stream() {
    let (root, agent) = agent(|stream| async move { drop(stream) }).await;
    drop(root);

    let opened = timeout(PATIENCE, agent.open_stdio(true, None))
        .await
        .unwrap();

    assert!(matches!(opened, Err(AgentError::Connect(_))));
}

/// Answers, and lies.
struct Liar;

#[async_trait]
impl Service for Liar {
    async fn hello(&self, _: &TtrpcContext, _: HelloRequest) -> ttrpc::Result<HelloResponse> {
        Ok(HelloResponse {
            agent_version: "\x1b[2J".repeat(10_000),
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        Ok(WaitResponse {
            exit_code: u32::MAX,
            signal: 4711,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        _: StartContainerRequest,
    ) -> ttrpc::Result<hull_protocol::agent::Empty> {
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
            ttrpc::Code::NOT_FOUND,
            "\x07".repeat(100_000),
        )))
    }
}

#[tokio::test]
async fn lies_are_cut_to_what_can_be() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("agent");
    let mut server = Server::new()
        .bind(&format!("unix://{}", path.display()))
        .unwrap()
        .register_service(create_agent(Arc::new(Liar)));
    server.start().await.unwrap();
    let agent = Agent::connect(Arc::new(Guest(path)), PATIENCE)
        .await
        .unwrap();

    let info = agent.hello(GuestSize::default()).await.unwrap();
    let exit = agent.wait(Process::Container("one")).await.unwrap();
    let refused = agent.start_container("one").await.unwrap_err();

    // Each escape is shown as six characters or fewer.
    assert!(info.agent_version.len() <= TEXT_MAX * 6);
    assert!(!info.agent_version.contains('\x1b'));
    assert_eq!((exit.code, exit.signal), (255, None));
    assert_eq!(refused.exit_code(), 127);
    assert!(refused.to_string().len() <= TEXT_MAX * 6);
    server.shutdown().await.unwrap();
}
