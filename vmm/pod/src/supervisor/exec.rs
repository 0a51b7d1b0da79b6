//! One process that a client runs in a container. It belongs to the client's connection.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use hull_machine::channel::{AsyncChannel, ChannelError};
use tokio::time::timeout;

use super::api::{Exec, Reply, Request};
use super::limits::Limits;
use super::server::refusal;
use crate::agent::{Agent, AgentError, ExitStatus, Process};
use crate::text::chain;

const SIGHUP: u32 = 1;
const SIGKILL: u32 = 9;

/// Runs the process, hands its streams to the client, and stays until it has ended.
pub async fn serve(
    agent: &Agent,
    exec: &Exec,
    channel: &AsyncChannel,
    limits: Limits,
) -> Result<(), ChannelError> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // The guest of a pod that was put aside may know execs of the process that had it then.
    let id = format!(
        "exec-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    if let Err(error) = start(agent, &id, exec, channel).await? {
        return channel.send(&refusal(&error), &[]).await;
    }

    let process = Process::Exec {
        container: &exec.container,
        exec: &id,
    };
    let ended = attend(agent, process, channel, limits).await;
    // Not found: the container has ended, and its processes with it.
    if let Err(error) = agent.remove_exec(&exec.container, &id).await {
        tracing::debug!(error = chain(&error), "removing an exec");
    }
    match ended {
        Some(Ok(status)) => {
            let reply = Reply::Ended {
                exit_code: status.code,
            };
            channel.send(&reply, &[]).await
        }
        Some(Err(error)) => channel.send(&refusal(&error), &[]).await,
        // The client has gone.
        None => Ok(()),
    }
}

/// Starts the process. The supervisor keeps none of its streams.
async fn start(
    agent: &Agent,
    id: &str,
    exec: &Exec,
    channel: &AsyncChannel,
) -> Result<Result<(), AgentError>, ChannelError> {
    let stdio = match agent.open_stdio(exec.stdin, exec.tty).await {
        Ok(stdio) => stdio,
        Err(error) => return Ok(Err(error)),
    };
    if let Err(error) = agent.exec(id, exec, &stdio).await {
        return Ok(Err(error));
    }
    let streams: Vec<BorrowedFd<'_>> = [&stdio.stdin, &stdio.stdout, &stdio.stderr]
        .into_iter()
        .flatten()
        .map(AsFd::as_fd)
        .collect();
    let reply = Reply::ExecStarted {
        stdin: stdio.stdin.is_some(),
        stderr: stdio.stderr.is_some(),
    };
    channel.send(&reply, &streams).await.map(Ok)
}

/// Waits for the process's end, and passes the client's wishes on. None: the client has gone, and
/// the process with it.
async fn attend(
    agent: &Agent,
    process: Process<'_>,
    channel: &AsyncChannel,
    limits: Limits,
) -> Option<Result<ExitStatus, AgentError>> {
    let wait = agent.wait(process);
    tokio::pin!(wait);
    loop {
        tokio::select! {
            ended = &mut wait => return Some(ended),
            received = channel.receive::<Request>() => match received {
                Ok(Some((Request::Resize(size), _))) => {
                    // One that has just ended has no terminal any more.
                    let _ = agent.resize(process, size).await;
                }
                _ => break,
            },
        }
    }
    for signal in [SIGHUP, SIGKILL] {
        // One that has just ended is what is wanted.
        let _ = agent.signal(process, signal, false).await;
        if timeout(limits.end, &mut wait).await.is_ok() {
            break;
        }
    }
    None
}
