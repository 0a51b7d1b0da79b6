//! Programs of the host that a specification names for moments of a container's life: nerdctl and Docker wire its
//! network in this way.
//!
//! Those that would run inside the container's namespaces (createContainer, startContainer) have no place here: those
//! namespaces are in the guest.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use hull_pod::text::chain;
use oci_spec::runtime::{Hook, Spec};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::host::Host;

/// For a hook that has no limit of its own.
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("running hook {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("hook {} ended with {status}; what it said is in containerd's log", path.display())]
    Failed { path: PathBuf, status: ExitStatus },
    #[error("hook {} took more than {} s", path.display(), limit.as_secs())]
    TimedOut { path: PathBuf, limit: Duration },
}

/// The hooks of a container, and what they are told of it.
#[derive(Debug, Clone)]
pub struct Hooks {
    created: Vec<Hook>,
    started: Vec<Hook>,
    stopped: Vec<Hook>,
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
}

impl Hooks {
    #[must_use]
    pub fn of(spec: &Spec, id: &str, bundle: PathBuf) -> Self {
        let mut hooks = Self {
            created: Vec::new(),
            started: Vec::new(),
            stopped: Vec::new(),
            id: id.to_owned(),
            bundle,
            annotations: spec.annotations().clone().unwrap_or_default(),
        };
        let Some(given) = spec.hooks() else {
            return hooks;
        };
        let prestart = given.prestart();
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        hooks.created = list(prestart);
        hooks.created.extend(list(given.create_runtime()));
        hooks.started = list(given.poststart());
        hooks.stopped = list(given.poststop());
        let inside = [given.create_container(), given.start_container()];
        if inside
            .iter()
            .any(|hooks| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()))
        {
            tracing::warn!(id, "hooks that run inside a container are left out");
        }
        hooks
    }

    /// When the pod's namespace is there, before the container is started.
    ///
    /// # Errors
    /// When one fails; then the container must not start.
    pub async fn created(&self, host: &Host) -> Result<(), HookError> {
        for hook in &self.created {
            self.run(host, hook, "created").await?;
        }
        Ok(())
    }

    /// What fails is logged, as the runtime specification has it.
    pub async fn started(&self, host: &Host) {
        self.run_all(host, &self.started, "running").await;
    }

    /// See [`Self::started`].
    pub async fn stopped(&self, host: &Host) {
        self.run_all(host, &self.stopped, "stopped").await;
    }

    async fn run_all(&self, host: &Host, hooks: &[Hook], status: &str) {
        for hook in hooks {
            if let Err(error) = self.run(host, hook, status).await {
                tracing::warn!(id = self.id, error = chain(&error), "a hook failed");
            }
        }
    }

    async fn run(&self, host: &Host, hook: &Hook, status: &str) -> Result<(), HookError> {
        let path = || hook.path().clone();
        let failed = |source| HookError::Io {
            path: path(),
            source,
        };
        let limit = hook
            .timeout()
            .and_then(|seconds| u64::try_from(seconds).ok())
            .filter(|seconds| *seconds > 0)
            .map_or(LIMIT, Duration::from_secs);
        let mut command = std::process::Command::new(hook.path());
        if let Some([name, arguments @ ..]) = hook.args().as_deref() {
            std::os::unix::process::CommandExt::arg0(&mut command, name);
            command.args(arguments);
        }
        let variables = hook.env().iter().flatten();
        command
            .env_clear()
            .envs(variables.filter_map(|variable| variable.split_once('=')))
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        host.enter_with(&mut command).map_err(failed)?;
        let mut command = Command::from(command);
        let mut child = command.kill_on_drop(true).spawn().map_err(failed)?;
        let state = self.state(status);
        let ended = timeout(limit, async {
            if let Some(mut stdin) = child.stdin.take() {
                // One that doesn't want to know may have gone already.
                let _ = stdin.write_all(state.as_bytes()).await;
            }
            child.wait().await
        })
        .await;
        match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed {
                path: path(),
                status,
            }),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(HookError::TimedOut {
                path: path(),
                limit,
            }),
        }
    }

    /// The container's state, as the runtime specification has it.
    fn state(&self, status: &str) -> String {
        serde_json::json!({
            "ociVersion": "1.0.2",
            "id": self.id,
            "status": status,
            "pid": std::process::id(),
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: &str) -> Hooks {
        let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{{"a":"b"}},"hooks":{json}}}"#);
        Hooks::of(&serde_json::from_str(&spec).unwrap(), "web", "/b".into())
    }

    #[tokio::test]
    async fn a_hook_is_told_of_the_container() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let hooks = hooks(&format!(
            r#"{{"createRuntime":[{{"path":"/bin/sh","args":["sh","-c","cat >$OUT"],
                "env":["OUT={}"]}}]}}"#,
            out.display()
        ));

        hooks.created(&Host::here().unwrap()).await.unwrap();

        let state = std::fs::read_to_string(out).unwrap();
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        assert_eq!(
            (&state["id"], &state["status"]),
            (&"web".into(), &"created".into())
        );
        assert_eq!(state["pid"], std::process::id());
        assert_eq!(state["annotations"]["a"], "b");
    }

    #[tokio::test]
    async fn a_hook_that_fails_or_hangs_is_an_error() {
        let host = Host::here().unwrap();
        let fails = hooks(r#"{"prestart":[{"path":"/bin/false"}]}"#);
        let hangs =
            hooks(r#"{"createRuntime":[{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}]}"#);

        let failed = fails.created(&host).await;
        let hung = hangs.created(&host).await;

        assert!(
            matches!(failed, Err(HookError::Failed { .. })),
            "{failed:?}"
        );
        assert!(matches!(hung, Err(HookError::TimedOut { .. })), "{hung:?}");
    }

    #[tokio::test]
    async fn later_ones_stop_nothing() {
        let hooks = hooks(r#"{"poststop":[{"path":"/nowhere/hook"}]}"#);

        hooks.stopped(&Host::here().unwrap()).await;
    }
}
