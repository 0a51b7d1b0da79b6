//! Pod manifests: read, checked, and every fault named by file, field and value.

mod bandwidth;
mod fields;
mod joining;
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

pub use bandwidth::Bandwidth;
pub use fields::value as field_value;
pub use joining::check_joining;
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

    /// The same pod by another name. Its hostname stays.
    ///
    /// # Errors
    /// What is wrong with the name.
    pub fn renamed(mut self, name: &str) -> Result<Self, String> {
        if !(names::SUBDOMAIN.fits)(name) {
            return Err(format!("{name:?} {}", names::SUBDOMAIN.rule));
        }
        let hostname = self.hostname();
        for spec in self.pod.spec.iter_mut().chain([&mut self.spec]) {
            spec.hostname = Some(hostname.clone());
        }
        self.pod.metadata.name = Some(name.to_owned());
        Ok(self)
    }

    /// `metadata.namespace`, or `default`.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.pod.metadata.namespace.as_deref().unwrap_or("default")
    }

    /// `spec.hostname`, or as much of the pod's name as a hostname may be long.
    #[must_use]
    pub fn hostname(&self) -> String {
        hostname(self.name(), &self.spec)
    }

    /// The hostname with its domain, of a pod with `spec.subdomain`. The cluster's domain is
    /// Kubernetes' default.
    #[must_use]
    pub fn qualified_hostname(&self) -> Option<String> {
        qualified_hostname(self.name(), self.namespace(), &self.spec)
    }

    /// How much each of its interfaces may receive and send.
    #[must_use]
    pub fn bandwidth(&self) -> Bandwidth {
        Bandwidth::of(&self.pod.metadata)
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

/// A pod's name may be longer than a hostname (HOST_NAME_MAX less what DNS can't have).
fn hostname(name: &str, spec: &PodSpec) -> String {
    const MAX_HOSTNAME: usize = 63;
    spec.hostname.clone().unwrap_or_else(|| {
        let cut: String = name.chars().take(MAX_HOSTNAME).collect();
        cut.trim_end_matches(['-', '.']).to_owned()
    })
}

fn qualified_hostname(name: &str, namespace: &str, spec: &PodSpec) -> Option<String> {
    let subdomain = spec.subdomain.as_deref().filter(|s| !s.is_empty())?;
    let hostname = hostname(name, spec);
    Some(format!(
        "{hostname}.{subdomain}.{namespace}.svc.cluster.local"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_to_a_hostname() {
        let spec = PodSpec::default();

        let cut = hostname(&format!("{}.b", "a".repeat(62)), &spec);

        assert_eq!(cut, "a".repeat(62));
        assert_eq!(qualified_hostname("web", "default", &spec), None);
    }
}
