//! Pods as commands name, show and end them.

use std::time::{Duration, Instant};

use hull_pod::client::{Client, ClientError};
use hull_pod::state::{
    ContainerState, ContainerStatus, Liveness, Phase, PodRecord, PodStatus, Registry,
};
use serde_json::{Value, json};

use crate::failure::Failure;

/// From the last word of a supervisor to its end.
const LAST_MOMENTS: Duration = Duration::from_secs(10);

/// Which container of a pod a command is for. Without a name the first one, as kubectl does it.
pub fn container<'a>(
    status: &'a PodStatus,
    name: Option<&str>,
) -> Result<&'a ContainerStatus, Failure> {
    let names = || {
        let names: Vec<&str> = status.all_containers().map(|c| c.name.as_str()).collect();
        names.join(", ")
    };
    match name {
        Some(name) => status.container(name).ok_or_else(|| {
            Failure::Failed(format!(
                "pod {} has no container {name:?}; it has {}",
                status.name,
                names()
            ))
        }),
        None => {
            let first = status
                .containers
                .first()
                .ok_or_else(|| Failure::Failed(format!("pod {} has no container", status.name)))?;
            if status.containers.len() > 1 {
                eprintln!("Defaulted container {:?} out of: {}", first.name, names());
            }
            Ok(first)
        }
    }
}

/// A pod as Kubernetes shows it: its manifest with its status.
pub fn as_kubernetes(record: &PodRecord) -> Result<Value, Failure> {
    let manifest = std::fs::read(record.dir.manifest())
        .ok()
        .and_then(|content| serde_json::from_slice::<Value>(&content).ok());
    let mut pod = manifest
        .and_then(|mut manifest| manifest.get_mut("pod").map(Value::take))
        .unwrap_or_else(|| json!({"metadata": {"name": record.status.name}}));
    let status =
        serde_json::to_value(&record.status).map_err(|e| Failure::Format(e.to_string()))?;
    if let Some(pod) = pod.as_object_mut() {
        pod.insert("apiVersion".into(), "v1".into());
        pod.insert("kind".into(), "Pod".into());
        if let Some(metadata) = pod.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("uid".into(), record.status.id.as_str().into());
        }
        pod.insert("status".into(), status);
    }
    Ok(pod)
}

/// One object as it is, several as kubectl's List.
pub fn list(mut items: Vec<Value>, always: bool) -> Value {
    match items.len() {
        1 if !always => items.remove(0),
        _ => json!({"apiVersion": "v1", "kind": "List", "items": items}),
    }
}

/// The word in the STATUS column.
pub fn status_word(status: &PodStatus) -> String {
    let waiting = |container: &ContainerStatus| match &container.state {
        ContainerState::Waiting(waiting) if waiting.reason != "ContainerCreating" => {
            Some(waiting.reason.clone())
        }
        _ => None,
    };
    if status.paused {
        return "Paused".into();
    }
    match status.phase {
        Phase::Pending => {
            let done = status.init_containers.iter().filter(|c| c.finished).count();
            let began = status
                .all_containers()
                .any(|c| c.is_running() || c.terminated().is_some());
            if began && done < status.init_containers.len() {
                return format!("Init:{done}/{}", status.init_containers.len());
            }
            status.reason.clone().unwrap_or_else(|| "Pending".into())
        }
        Phase::Running => status
            .containers
            .iter()
            .find_map(waiting)
            .unwrap_or_else(|| "Running".into()),
        Phase::Succeeded => status.reason.clone().unwrap_or_else(|| "Completed".into()),
        Phase::Failed => status.reason.clone().unwrap_or_else(|| {
            status
                .all_containers()
                .filter_map(ContainerStatus::terminated)
                .find(|end| end.exit_code != 0)
                .map_or_else(|| "Error".into(), |end| end.reason.clone())
        }),
    }
}

/// Asks a pod to end and waits until it has.
pub async fn stop(record: &PodRecord, grace_seconds: Option<u64>) -> Result<(), Failure> {
    let client = match Client::connect(&record.dir) {
        Ok(client) => client,
        // Before it listens, or after: it is about to, or gone.
        Err(ClientError::Connect(_)) => match retry_connect(record)? {
            Some(client) => client,
            None => return Ok(()),
        },
        Err(error) => return Err(error.into()),
    };
    client.stop(grace_seconds).await?;
    client.ended().await;
    wait_for_death(record)
}

fn retry_connect(record: &PodRecord) -> Result<Option<Client>, Failure> {
    let begun = Instant::now();
    loop {
        let now = record.reread();
        if !now.is_ok_and(|r| r.liveness == Liveness::Alive) {
            return Ok(None);
        }
        match Client::connect(&record.dir) {
            Ok(client) => return Ok(Some(client)),
            Err(error) if begun.elapsed() > LAST_MOMENTS => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Waits until a supervisor that has said its last word has let go of its pod.
pub fn wait_for_death(record: &PodRecord) -> Result<(), Failure> {
    let begun = Instant::now();
    while record.reread().is_ok_and(|r| r.liveness == Liveness::Alive) {
        if begun.elapsed() > LAST_MOMENTS {
            return Err(Failure::Failed(format!(
                "the supervisor of pod {} (process {}) does not end",
                record.status.name,
                record
                    .status
                    .supervisor_pid
                    .map_or_else(|| "unknown".into(), |pid| pid.to_string())
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Removes a pod, which may run if `force`.
pub async fn remove(registry: &Registry, record: &PodRecord, force: bool) -> Result<(), Failure> {
    if record.liveness == Liveness::Alive {
        if force {
            stop(record, Some(0)).await?;
        } else if record.status.phase.ended() {
            wait_for_death(record)?;
        }
    }
    Ok(registry.remove(record)?)
}

/// Tasks for a command: one thread is enough.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::io("starting tasks", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_pod::state::{PodId, Terminated, Waiting};

    fn pod(phase: Phase) -> PodStatus {
        let id = PodId::try_from("0123456789ab".to_owned()).unwrap();
        serde_json::from_value(json!({
            "id": id, "name": "web", "phase": phase, "createdAt": "2026-01-01T00:00:00Z",
            "restartPolicy": "Always", "completed": false,
            "containerStatuses": [ContainerStatus::new("one", "busybox")],
        }))
        .unwrap()
    }

    #[test]
    fn the_first_container_is_the_default() {
        let pod = pod(Phase::Running);

        assert_eq!(container(&pod, None).unwrap().name, "one");
        assert!(container(&pod, Some("two")).is_err());
    }

    #[test]
    fn a_crash_loop_shows_in_the_status() {
        let mut pod = pod(Phase::Running);
        assert_eq!(status_word(&pod), "Running");

        pod.containers[0].state = ContainerState::Waiting(Waiting {
            reason: "CrashLoopBackOff".into(),
            message: None,
        });
        assert_eq!(status_word(&pod), "CrashLoopBackOff");
    }

    #[test]
    fn a_failed_pod_names_its_reason_or_its_containers() {
        let mut pod = pod(Phase::Failed);
        pod.containers[0].state = ContainerState::Terminated(Terminated {
            exit_code: 137,
            signal: None,
            reason: "OOMKilled".into(),
            message: None,
            started_at: None,
            finished_at: jiff::Timestamp::UNIX_EPOCH,
        });
        assert_eq!(status_word(&pod), "OOMKilled");

        pod.reason = Some("GuestPanic".into());
        assert_eq!(status_word(&pod), "GuestPanic");
    }

    #[test]
    fn one_is_an_object_and_several_are_a_list() {
        assert_eq!(list(vec![json!({"a": 1})], false), json!({"a": 1}));
        assert_eq!(list(vec![json!({}), json!({})], false)["kind"], "List");
        assert_eq!(list(vec![], true)["items"], json!([]));
    }
}
