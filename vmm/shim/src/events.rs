//! Events, published to containerd in the order in which they happen.

use std::process::Stdio;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageDyn, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use hull_pod::text::chain;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use ttrpc::r#async::Client;

/// So many wait at most; then who has another one waits, too.
const WAITING: usize = 1024;
/// One try. containerd answers within milliseconds, or is gone.
const TRY: Duration = Duration::from_secs(5);
/// A containerd that is restarted is back by then. It asks for states then, so that an event that is lost is no harm.
const TRIES: u32 = 4;
const BETWEEN: Duration = Duration::from_millis(500);

/// Where events go.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's ttrpc socket; may be empty.
    pub socket: String,
    /// containerd's main socket, and the program that publishes through it. May be empty.
    pub address: String,
    pub binary: String,
}

enum Item {
    Event(Envelope),
    /// Is told when all before it have been dealt with.
    Flush(oneshot::Sender<()>),
}

/// Publishes events.
#[derive(Debug, Clone)]
pub struct Events {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

/// Something that happened to a task.
pub trait Event: MessageFull {
    const TOPIC: &'static str;
}

macro_rules! event {
    ($($message:ident: $topic:ident),* $(,)?) => {
        $(impl Event for $message {
            const TOPIC: &'static str = topics::$topic;
        })*
    };
}

event! {
    TaskCreate: TASK_CREATE_EVENT_TOPIC,
    TaskStart: TASK_START_EVENT_TOPIC,
    TaskOOM: TASK_OOM_EVENT_TOPIC,
    TaskPaused: TASK_PAUSED_EVENT_TOPIC,
    TaskResumed: TASK_RESUMED_EVENT_TOPIC,
    TaskExit: TASK_EXIT_EVENT_TOPIC,
    TaskDelete: TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded: TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted: TASK_EXEC_STARTED_EVENT_TOPIC,
}

impl Events {
    /// Starts publishing.
    #[must_use]
    pub fn new(target: Target) -> Self {
        let (queue, items) = mpsc::channel(WAITING);
        let namespace = target.namespace.clone();
        tokio::spawn(
            Publisher {
                target,
                client: None,
            }
            .run(items),
        );
        Self { namespace, queue }
    }

    /// containerd's.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Publishes after all that came before.
    pub async fn publish<E: Event>(&self, event: E) {
        let Ok(value) = event.write_to_bytes() else {
            tracing::error!(topic = E::TOPIC, "an event that can't be written");
            return;
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.into(),
            event: Some(Any {
                type_url: event.descriptor_dyn().full_name().to_owned(),
                value,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        // The publisher ends with the shim.
        let _ = self.queue.send(Item::Event(envelope)).await;
    }

    /// Waits until all have been published, or given up.
    pub async fn flush(&self, limit: Duration) {
        let (tell, told) = oneshot::channel();
        let _ = timeout(limit, async {
            if self.queue.send(Item::Flush(tell)).await.is_ok() {
                let _ = told.await;
            }
        })
        .await;
    }
}

/// A time as messages have it.
#[must_use]
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error("asking containerd")]
    Ttrpc(#[from] ttrpc::Error),
    #[error("running {program}")]
    Program {
        program: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{0} said no")]
    Refused(String),
    #[error("no answer within {} s", TRY.as_secs())]
    TimedOut,
    #[error("containerd has told of no way to publish")]
    NoWay,
}

struct Publisher {
    target: Target,
    client: Option<EventsClient>,
}

impl Publisher {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(item) = items.recv().await {
            match item {
                Item::Event(envelope) => self.publish(envelope).await,
                // Nobody waits any more.
                Item::Flush(tell) => drop(tell.send(())),
            }
        }
    }

    async fn publish(&mut self, envelope: Envelope) {
        for attempt in 1..=TRIES {
            let failure = match timeout(TRY, self.forward(&envelope)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => PublishError::TimedOut,
            };
            self.client = None;
            let by_program = match timeout(TRY, self.run_program(&envelope)).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => PublishError::TimedOut,
            };
            tracing::warn!(
                topic = envelope.topic,
                attempt,
                error = chain(&failure),
                by_program = chain(&by_program),
                "publishing an event"
            );
            if attempt < TRIES {
                tokio::time::sleep(BETWEEN).await;
            }
        }
    }

    async fn forward(&mut self, envelope: &Envelope) -> Result<(), PublishError> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let socket = self.target.socket.trim_start_matches("unix://");
                if socket.is_empty() {
                    return Err(PublishError::NoWay);
                }
                let client = Client::connect(&format!("unix://{socket}")).await?;
                self.client.insert(EventsClient::new(client))
            }
        };
        let request = ForwardRequest {
            envelope: Some(envelope.clone()).into(),
            ..Default::default()
        };
        client
            .forward(ttrpc::context::with_duration(TRY), &request)
            .await?;
        Ok(())
    }

    /// The other way, where there is no socket: `containerd publish`.
    async fn run_program(&self, envelope: &Envelope) -> Result<(), PublishError> {
        let Target {
            address, binary, ..
        } = &self.target;
        if binary.is_empty() {
            return Err(PublishError::NoWay);
        }
        let failed = |source| PublishError::Program {
            program: binary.clone(),
            source,
        };
        let event = envelope.event.as_ref().map(Message::write_to_bytes);
        let event = event
            .transpose()
            .map_err(|error| failed(std::io::Error::other(error)))?
            .unwrap_or_default();
        let mut child = Command::new(binary)
            .args(["--address", address, "publish", "--topic", &envelope.topic])
            .args(["--namespace", &envelope.namespace])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&event).await.map_err(failed)?;
        }
        if child.wait().await.map_err(failed)?.success() {
            Ok(())
        } else {
            Err(PublishError::Refused(binary.clone()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn without_a_socket_the_program_publishes_in_order() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("containerd");
        let script = format!(
            "#!/bin/sh\necho \"$@\" >>{0}/lines\ncat >{0}/event\n",
            root.path().display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let events = Events::new(Target {
            namespace: "default".into(),
            socket: root.path().join("nobody").display().to_string(),
            address: "/run/a".into(),
            binary: program.display().to_string(),
        });

        events.publish(TaskStart::new()).await;
        let exit = TaskExit {
            container_id: "web".into(),
            ..Default::default()
        };
        events.publish(exit.clone()).await;
        events.flush(Duration::from_secs(20)).await;

        let lines = std::fs::read_to_string(root.path().join("lines")).unwrap();
        let line = |topic| format!("--address /run/a publish --topic {topic} --namespace default");
        assert_eq!(
            lines.lines().collect::<Vec<_>>(),
            [line("/tasks/start"), line("/tasks/exit")]
        );
        let any = std::fs::read(root.path().join("event")).unwrap();
        let any = Any::parse_from_bytes(&any).unwrap();
        assert_eq!(any.type_url, "containerd.events.TaskExit");
        assert_eq!(TaskExit::parse_from_bytes(&any.value).unwrap(), exit);
    }
}
