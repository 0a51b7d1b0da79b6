//! The OCI runtime specification of a container, from its manifest and image.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Container;
use oci_spec::runtime::Spec;

use crate::images::Image;
use crate::manifest::PodManifest;

/// What the agent is told of a container, but for its streams and its root.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// For `CreateContainerRequest.spec`, as JSON.
    pub spec: Spec,
    /// For `CreateContainerRequest.user`.
    pub user: String,
    /// For `CreateContainerRequest.additional_gids`.
    pub additional_gids: Vec<u32>,
    /// Give it a terminal.
    pub tty: bool,
    /// Keep its standard input open.
    pub stdin: bool,
    /// Close standard input after the first attached client has gone.
    pub stdin_once: bool,
}

/// What the agent is told of the pod as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfraSpec {
    pub hostname: String,
    pub share_process_namespace: bool,
    pub sysctls: BTreeMap<String, String>,
    /// 0: the agent's default.
    pub shm_bytes: u64,
}

/// The machine for a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSize {
    pub vcpus: u8,
    pub memory_mib: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A fault that shows only with the image at hand, with field and value.
    #[error("{0}")]
    Refused(String),
}

/// The specification of one container (an init container, too). `uid` is the pod's
/// own, for `fieldRef`.
///
/// # Errors
/// When manifest and image don't fit together: no command in either, runAsNonRoot
/// with an image that runs as root.
pub fn container(
    manifest: &PodManifest,
    container: &Container,
    image: &Image,
    uid: &str,
) -> Result<ContainerSpec, SpecError> {
    let _ = (manifest, container, image, uid);
    Err(SpecError::Refused(String::new()))
}

/// What infra is made of.
#[must_use]
pub fn infra(manifest: &PodManifest) -> InfraSpec {
    InfraSpec {
        hostname: manifest.name().to_owned(),
        share_process_namespace: manifest.spec().share_process_namespace.unwrap_or(false),
        sysctls: BTreeMap::new(),
        shm_bytes: 0,
    }
}

/// The machine's size: the sum of the containers' limits and what the guest itself
/// needs; where a container has no limit, 1024 MiB and two processors for the pod
/// (or as many as the host has, if fewer).
#[must_use]
pub fn machine_size(manifest: &PodManifest) -> MachineSize {
    let _ = manifest;
    MachineSize {
        vcpus: 2,
        memory_mib: 1024,
    }
}
