//! The OCI runtime specification of a container, from its manifest and image.
//!
//! Only the parts that are the supervisor's to say: see `CreateContainerRequest` of
//! the agent's protocol for the others.

mod capabilities;
mod expand;
mod mounts;
mod process;
mod resources;
mod seccomp;
mod sizing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Container;
use oci_spec::OciSpecError;
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{LinuxBuilder, Mount, RootBuilder, Spec, SpecBuilder};

use crate::images::Image;
use crate::manifest::{self, PodManifest};

pub use resources::Amounts;
pub use sizing::{MachineSize, Sizing, machine_size, machine_size_for};

/// Paths that would show a container things of its kernel that are none of its
/// business; the same as containerd's.
const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY_PATHS: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What the agent is told of a container, but for its streams and its root.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// For `CreateContainerRequest.spec`, as JSON.
    pub spec: Spec,
    /// For `CreateContainerRequest.user`.
    pub user: String,
    /// For `CreateContainerRequest.additional_gids`.
    pub additional_gids: Vec<u32>,
    /// Whether these are all, and what the container's `/etc/group` says doesn't count.
    pub exact_groups: bool,
    /// Give it a terminal.
    pub tty: bool,
    /// Keep its standard input open.
    pub stdin: bool,
    /// Close standard input after the first attached client has gone.
    pub stdin_once: bool,
    /// The signal that asks it to end: the image's, or SIGTERM.
    pub stop_signal: u32,
    pub pids: Pids,
}

/// Whose processes a container sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Pids {
    /// The pod's with `shareProcessNamespace`, else its own.
    #[default]
    AsPod,
    Own,
    /// Those of the pod's PID namespace, which infra must hold.
    Pod,
    /// Those of another container, by its name.
    Of(String),
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

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A fault that shows only with the image at hand, with file, field and value.
    #[error("{0}")]
    Refused(String),
    #[error("making the container's specification")]
    Spec(#[from] OciSpecError),
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
    specify(manifest, container, &image.reference, &image.config, uid)
}

/// As most containers have it, for [`crate::agent::Agent::get_ready`].
///
/// # Errors
/// None but a fault of Hull's own.
pub fn usual() -> Result<Spec, SpecError> {
    const POD: &str = "{apiVersion: v1, kind: Pod, metadata: {name: usual}, spec: {containers: [{name: usual, \
                       image: none, command: [/program]}]}}";
    let refused = |error: String| SpecError::Refused(error);
    let pods = manifest::parse("the usual pod", POD).map_err(|error| refused(error.to_string()))?;
    let pod = pods.first().ok_or_else(|| refused("no pod".into()))?;
    let container = pod.containers().first();
    let container = container.ok_or_else(|| refused("no container".into()))?;
    let mut usual = specify(pod, container, "none", &ImageConfiguration::default(), "")?.spec;
    // The share is another one in each pod.
    let of_share = |mount: &Mount| {
        let source = mount.source().as_ref().and_then(|source| source.to_str());
        source.is_some_and(|source| source.starts_with("share:"))
    };
    let mut mounts = usual.mounts().clone().unwrap_or_default();
    mounts.retain(|mount| !of_share(mount));
    usual.set_mounts(Some(mounts));
    Ok(usual)
}

fn specify(
    manifest: &PodManifest,
    container: &Container,
    image: &str,
    config: &ImageConfiguration,
    uid: &str,
) -> Result<ContainerSpec, SpecError> {
    let refused = |field: &str, message: String| {
        let place = field_of(manifest, container);
        SpecError::Refused(format!("{}: {place}.{field}: {message}", manifest.source))
    };
    let config = config.config().as_ref();
    let env = process::Environment::new(manifest, container, config, uid);
    let args = process::args(container, config, &env).ok_or_else(|| {
        refused(
            "command",
            format!("is missing, and image {image} has no command either"),
        )
    })?;
    let user = process::user(manifest, container, config)
        .map_err(|message| refused("securityContext.runAsNonRoot", message))?;
    let mounts = mounts::of(manifest, container, &env).map_err(|(index, message)| {
        refused(&format!("volumeMounts[{index}].subPathExpr"), message)
    })?;
    let capabilities = capabilities::of(container);
    let context = container.security_context.as_ref();
    let mut process = process::base(
        args,
        env.into_list(),
        process::working_dir(container, config),
    )?;
    process.set_no_new_privileges(Some(
        context.and_then(|context| context.allow_privilege_escalation) == Some(false),
    ));
    process.set_oom_score_adj(Some(resources::oom_score_adj(manifest, container)));
    let profile = seccomp::profile(manifest, container, &capabilities)?;
    process.set_capabilities(Some(capabilities::sets(&capabilities)?));
    let paths = |list: &[&str]| {
        list.iter()
            .map(|path| (*path).to_owned())
            .collect::<Vec<_>>()
    };
    let mut linux = LinuxBuilder::default()
        .resources(resources::of(container)?)
        .masked_paths(paths(MASKED_PATHS))
        .readonly_paths(paths(READ_ONLY_PATHS))
        .build()?;
    // The builder's default has some; they are the agent's to set.
    linux.set_namespaces(None).set_seccomp(profile);
    let read_only = context.and_then(|context| context.read_only_root_filesystem) == Some(true);
    let mut spec = SpecBuilder::default()
        .version("1.0.2")
        .root(
            RootBuilder::default()
                .path("rootfs")
                .readonly(read_only)
                .build()?,
        )
        .process(process)
        .mounts(mounts)
        .linux(linux)
        .build()?;
    spec.set_hostname(None);
    Ok(ContainerSpec {
        spec,
        user,
        additional_gids: additional_gids(manifest),
        exact_groups: false,
        tty: container.tty.unwrap_or(false),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        stop_signal: process::stop_signal(config),
        pids: Pids::AsPod,
    })
}

/// What infra is made of.
#[must_use]
pub fn infra(manifest: &PodManifest) -> InfraSpec {
    let spec = manifest.spec();
    let sysctls = spec
        .security_context
        .iter()
        .flat_map(|context| context.sysctls.iter().flatten());
    InfraSpec {
        hostname: manifest
            .qualified_hostname()
            .filter(|_| spec.set_hostname_as_fqdn == Some(true))
            .unwrap_or_else(|| manifest.hostname()),
        share_process_namespace: spec.share_process_namespace.unwrap_or(false),
        sysctls: sysctls
            .map(|sysctl| (sysctl.name.replace('/', "."), sysctl.value.clone()))
            .collect(),
        shm_bytes: 0,
    }
}

fn additional_gids(manifest: &PodManifest) -> Vec<u32> {
    let Some(context) = &manifest.spec().security_context else {
        return Vec::new();
    };
    let groups = context
        .fs_group
        .iter()
        .chain(context.supplemental_groups.iter().flatten());
    groups
        .filter_map(|group| u32::try_from(*group).ok())
        .collect()
}

/// `spec.containers[N]`, for messages.
fn field_of(manifest: &PodManifest, container: &Container) -> String {
    let position = |list: &[Container]| list.iter().position(|other| other.name == container.name);
    if let Some(index) = position(manifest.init_containers()) {
        return format!("spec.initContainers[{index}]");
    }
    match position(manifest.containers()) {
        Some(index) => format!("spec.containers[{index}]"),
        // One that joins the pod.
        None => format!("container {}", container.name),
    }
}
