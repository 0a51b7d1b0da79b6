//! Pod manifests: read, checked, and every fault named by file, field and value.

mod fields;
mod load;
mod names;
mod problem;
mod quantity;
mod support;
mod tree;
mod typed;
mod validate;

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde::{Deserialize, Serialize};

pub use fields::value as field_value;
pub use load::{load, parse};
pub use problem::ManifestError;
pub use quantity::Quantity;

/// A Pod that has passed every check of [`load`]: it has a name and a spec, and
/// every field that is set is one that Hull acts on, or one that means nothing on
/// a single machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodManifest {
    /// The file it came from, as the user wrote it (`-` for standard input).
    pub source: String,
    pub pod: Pod,
    spec: PodSpec,
}

/// When a container is started again after it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl PodManifest {
    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    /// `metadata.namespace`, or `default`.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    #[must_use]
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// Containers that run one after another, each to its end, before the others.
    #[must_use]
    pub fn init_containers(&self) -> &[Container] {
        self.spec.init_containers.as_deref().unwrap_or_default()
    }

    #[must_use]
    pub fn containers(&self) -> &[Container] {
        &self.spec.containers
    }

    /// `spec.restartPolicy`; Kubernetes' default is Always.
    #[must_use]
    pub fn restart_policy(&self) -> RestartPolicy {
        match self.spec.restart_policy.as_deref() {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        }
    }

    /// `spec.terminationGracePeriodSeconds`; Kubernetes' default is 30.
    #[must_use]
    pub fn termination_grace_period(&self) -> Duration {
        let seconds = self.spec.termination_grace_period_seconds.unwrap_or(30);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }
}
