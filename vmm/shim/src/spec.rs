//! A container as the agent is told it, from its runtime specification.
//!
//! Of the host's paths in a specification the guest sees only what is bound into the pod's share.
//! What names host cgroups or host processors has no meaning in the guest, and is left out; a host device is refused.

use std::path::{Path, PathBuf};

use hull_pod::oci::{
    Amounts, ContainerSpec, InfraSpec, MachineSize, Pids, Sizing, machine_size_for,
};
use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxBuilder, LinuxDeviceType, LinuxResources, LinuxResourcesBuilder, Mount, Process,
    RootBuilder, Spec, SpecBuilder,
};

use crate::bundle::annotation;

/// File systems that a container has anew.
const FILE_SYSTEMS: &[&str] = &[
    "proc", "tmpfs", "devpts", "mqueue", "sysfs", "cgroup", "cgroup2",
];
/// The pod's own, whatever the specification has there.
const SHM: &str = "/dev/shm";
/// Device files that every container has, whether they are named or not.
const DEVICES: &[&str] = &[
    "/dev/full",
    "/dev/null",
    "/dev/random",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
];
/// What the guest keeps of a bind's options.
const BIND_OPTIONS: &[&str] = &["ro", "rw", "rro", "noexec", "exec", "nosuid", "nodev"];
/// The controllers of which files of a cgroup may be named: what they count, a guest counts, too.
const UNIFIED: &[&str] = &["cpu.", "memory.", "pids."];
const SIGTERM: u32 = 15;
/// Of a host name (uname(2)).
const HOSTNAME_MAX: usize = 63;
/// For a pod's machine, as containerd's CRI plugin writes them.
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("the specification has no process")]
    NoProcess,
    #[error("mount {}: {why}", destination.display())]
    Mount { destination: PathBuf, why: String },
    #[error(
        "{}: a device of the host can't be given to a machine",
        path.display()
    )]
    Device { path: PathBuf },
    #[error("making the container's specification")]
    Spec(#[from] OciSpecError),
}

/// Whether a container is privileged, as `ctr`, Docker and CRI say it.
fn may_use_every_device(spec: &Spec) -> bool {
    let resources = spec.linux().iter().filter_map(|l| l.resources().as_ref());
    let rules = resources.filter_map(|resources| resources.devices().as_ref());
    rules.flatten().any(|rule| {
        let any_kind = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        let any_number = |number: Option<i64>| number.is_none_or(|number| number < 0);
        rule.allow()
            && any_kind
            && any_number(rule.major())
            && any_number(rule.minor())
            && rule.access().as_deref() == Some("rwm")
    })
}

/// What the agent is told. `bind` puts a file or directory of the host into the pod's share, read-only or not, and
/// says as what.
///
/// # Errors
/// When the container asks for what it can't have, or `bind` says no.
pub fn container<E: From<SpecError>>(
    spec: &Spec,
    stdin: bool,
    mut bind: impl FnMut(&Path, bool) -> Result<String, E>,
) -> Result<ContainerSpec, E> {
    let given = spec.process().as_ref().ok_or(SpecError::NoProcess)?;
    let devices = spec.linux().iter().flat_map(|linux| linux.devices().iter());
    // One that may use every device gets all of the host's listed, and has all of the machine's.
    let devices = devices.flatten().filter(|_| !may_use_every_device(spec));
    for device in devices {
        let path = device.path();
        if !path.to_str().is_some_and(|path| DEVICES.contains(&path)) {
            return Err(SpecError::Device { path: path.clone() }.into());
        }
    }
    let mut mounts = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        mounts.push(self::mount(mount, &mut bind)?);
    }
    let user = given.user();
    let process = process(given);
    Ok(ContainerSpec {
        spec: assemble(spec, process, mounts).map_err(SpecError::from)?,
        user: format!("{}:{}", user.uid(), user.gid()),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        // containerd has looked at the image's.
        exact_groups: true,
        tty: given.terminal().unwrap_or(false),
        stdin,
        stdin_once: false,
        // containerd names the signal whenever it sends one.
        stop_signal: SIGTERM,
        pids: Pids::AsPod,
    })
}

fn assemble(spec: &Spec, process: Process, mounts: Vec<Mount>) -> Result<Spec, OciSpecError> {
    let mut linux = LinuxBuilder::default().build()?;
    linux.set_namespaces(None).set_seccomp(None);
    linux.set_masked_paths(None).set_readonly_paths(None);
    if let Some(given) = spec.linux() {
        linux
            .set_resources(given.resources().as_ref().map(resources).transpose()?)
            .set_seccomp(given.seccomp().clone())
            .set_masked_paths(given.masked_paths().clone())
            .set_readonly_paths(given.readonly_paths().clone());
    }
    let read_only = spec.root().as_ref().and_then(|root| root.readonly());
    let mut whole = SpecBuilder::default()
        .version("1.0.2")
        .root(
            RootBuilder::default()
                .path("rootfs")
                .readonly(read_only.unwrap_or(false))
                .build()?,
        )
        .process(process)
        .mounts(mounts)
        .linux(linux)
        .build()?;
    whole.set_hostname(None);
    Ok(whole)
}

/// Without what names a policy of the host's kernel.
fn process(given: &Process) -> Process {
    let mut process = given.clone();
    process.set_apparmor_profile(None).set_selinux_label(None);
    process
}

/// What is changed of a container's resources.
///
/// # Errors
/// When it can't be written.
pub fn update(given: &LinuxResources) -> Result<LinuxResources, SpecError> {
    let mut resources = resources(given)?;
    // They stay.
    resources.set_devices(None);
    Ok(resources)
}

/// What a cgroup of the guest can have.
fn resources(given: &LinuxResources) -> Result<LinuxResources, OciSpecError> {
    let mut resources = LinuxResourcesBuilder::default().build()?;
    resources.set_devices(given.devices().clone());
    resources.set_pids(*given.pids());
    resources.set_cpu(given.cpu().clone().map(|mut cpu| {
        // The host's processors and memory nodes.
        cpu.set_cpus(None).set_mems(None);
        cpu.set_realtime_period(None).set_realtime_runtime(None);
        cpu
    }));
    resources.set_memory(given.memory().map(|mut memory| {
        // The guest has no swap.
        memory.set_swap(None).set_swappiness(None);
        memory.set_kernel(None).set_kernel_tcp(None);
        memory
    }));
    let amounts = given.unified().clone().map(|mut files| {
        // Others are of devices, processors and pages of the host.
        files.retain(|file, _| {
            UNIFIED
                .iter()
                .any(|controller| file.starts_with(controller))
        });
        files
    });
    resources.set_unified(amounts.filter(|files| !files.is_empty()));
    Ok(resources)
}

fn mount<E: From<SpecError>>(
    given: &Mount,
    bind: &mut impl FnMut(&Path, bool) -> Result<String, E>,
) -> Result<Mount, E> {
    let destination = given.destination();
    let refused = |why: String| SpecError::Mount {
        destination: destination.clone(),
        why,
    };
    let options = given.options().as_deref().unwrap_or_default();
    let has = |name: &str| options.iter().any(|option| option == name);
    let kind = given.typ().as_deref().unwrap_or_default();
    let mut mount = given.clone();
    if destination == Path::new(SHM) {
        mount
            .set_typ(Some("tmpfs".into()))
            .set_source(Some("shm".into()))
            .set_options(Some(
                ["nosuid", "noexec", "nodev", "mode=1777"]
                    .map(String::from)
                    .into(),
            ));
        return Ok(mount);
    }
    if !(kind == "bind" || has("bind") || has("rbind")) {
        if FILE_SYSTEMS.contains(&kind) {
            return Ok(mount);
        }
        return Err(refused(format!(
            "a container can't have a file system of type {kind:?}"
        ))
        .into());
    }
    let source = given
        .source()
        .as_deref()
        .filter(|source| source.is_absolute())
        .ok_or_else(|| refused("its source is no absolute path".into()))?;
    let name = bind(source, has("ro") || has("rro"))?;
    let kept = options
        .iter()
        .filter(|option| BIND_OPTIONS.contains(&option.as_str()))
        .cloned();
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(format!("share:volumes/{name}").into()))
        .set_options(Some(
            ["rbind", "rprivate"]
                .map(String::from)
                .into_iter()
                .chain(kept)
                .collect(),
        ));
    Ok(mount)
}

/// What infra is made of. `id` names the pod whose specification doesn't.
#[must_use]
pub fn infra(spec: &Spec, id: &str) -> InfraSpec {
    let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
    let sysctls = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref());
    InfraSpec {
        hostname: hostname.unwrap_or_else(|| {
            let end = id.floor_char_boundary(HOSTNAME_MAX.min(12));
            id[..end].to_owned()
        }),
        share_process_namespace: false,
        sysctls: sysctls
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        shm_bytes: 0,
    }
}

/// How large the machine is: by what the pod's containers may use together, where the sandbox's annotations tell,
/// else by what its first container may use.
#[must_use]
pub fn size(spec: &Spec, sizing: Sizing) -> MachineSize {
    let number = |name| annotation(spec, name).and_then(|text| text.parse::<i64>().ok());
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let period = number(CPU_PERIOD).or_else(|| cpu?.period()?.try_into().ok());
    let quota = number(CPU_QUOTA).or_else(|| cpu?.quota());
    let memory = number(MEMORY).or_else(|| resources?.memory().as_ref()?.limit());
    let positive = |amount: Option<i64>| {
        amount
            .and_then(|amount| u64::try_from(amount).ok())
            .filter(|amount| *amount > 0)
    };
    let cpu_limit = positive(quota)
        .zip(positive(period))
        .map(|(quota, period)| quota.saturating_mul(1000) / period);
    let memory_limit = positive(memory);
    let amounts = Amounts {
        cpu_limit,
        cpu_request: cpu_limit,
        memory_limit,
        memory_request: memory_limit,
    };
    machine_size_for(&[amounts], sizing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(more: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","process":{{"args":["sh"],"cwd":"/","terminal":true,
                "user":{{"uid":1,"gid":2,"additionalGids":[3]}},"apparmorProfile":"cri"}}{more}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    fn translated(spec: &Spec) -> Result<ContainerSpec, SpecError> {
        container(spec, true, |path, read_only| {
            Ok(format!(
                "{}-{read_only}",
                path.file_name().unwrap().display()
            ))
        })
    }

    #[test]
    fn the_user_is_told_by_number() {
        let container = translated(&spec("")).unwrap();

        assert_eq!(container.user, "1:2");
        assert_eq!(container.additional_gids, [3]);
        assert!(container.exact_groups);
        assert!(container.tty && container.stdin);
        let process = container.spec.process().as_ref().unwrap();
        assert_eq!(process.apparmor_profile(), &None);
    }

    #[test]
    fn what_is_of_the_host_is_bound_into_the_share() {
        let spec = spec(
            r#","mounts":[
                {"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","rshared","ro"]},
                {"destination":"/dev/shm","type":"bind","source":"/run/x/shm","options":["rbind","rw"]}]"#,
        );

        let mounts = translated(&spec).unwrap().spec.mounts().clone().unwrap();

        assert_eq!(mounts[0].typ().as_deref(), Some("proc"));
        assert_eq!(
            mounts[1].source().as_deref(),
            Some(Path::new("share:volumes/data-true"))
        );
        assert_eq!(
            mounts[1].options().as_ref().unwrap(),
            &["rbind", "rprivate", "ro"]
        );
        assert_eq!(mounts[2].typ().as_deref(), Some("tmpfs"));
    }

    #[test]
    fn what_the_guest_can_not_mount_is_refused() {
        let refused = translated(&spec(
            r#","mounts":[{"destination":"/n","type":"nfs","source":"a:/b"}]"#,
        ));

        let message = refused.unwrap_err().to_string();
        assert!(
            message.contains("/n") && message.contains("nfs"),
            "{message}"
        );
    }

    #[test]
    fn devices_of_the_host_are_refused() {
        let with = |path: &str| {
            translated(&spec(&format!(
                r#","linux":{{"devices":[{{"path":{path:?},"type":"c","major":1,"minor":3}}]}}"#
            )))
        };

        let refused = with("/dev/mem").unwrap_err().to_string();

        assert!(refused.starts_with("/dev/mem: a device"), "{refused}");
        assert!(with("/dev/null").is_ok());
        let privileged = translated(&spec(
            r#","linux":{"devices":[{"path":"/dev/mem","type":"c","major":1,"minor":1}],
                "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]}}"#,
        ));
        assert!(privileged.is_ok());
    }

    #[test]
    fn the_hosts_processors_are_not_the_guests() {
        let spec = spec(
            r#","linux":{"resources":{"cpu":{"cpus":"6-7","quota":50000,"period":100000},
                "memory":{"limit":1048576,"swap":1048576},"pids":{"limit":10},
                "blockIO":{"weight":10}},"cgroupsPath":"/a/b","sysctl":{"net.a":"1"}}"#,
        );

        let translated = translated(&spec).unwrap().spec;

        let linux = translated.linux().as_ref().unwrap();
        let resources = linux.resources().as_ref().unwrap();
        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!((cpu.cpus(), cpu.quota()), (&None, Some(50000)));
        assert_eq!(resources.memory().unwrap().swap(), None);
        assert!(resources.block_io().is_none() && linux.cgroups_path().is_none());
        assert!(linux.sysctl().is_none());
        assert_eq!(infra(&spec, "id").sysctls["net.a"], "1");
    }

    #[test]
    fn annotations_of_the_sandbox_size_the_machine() {
        let limited = spec(
            r#","annotations":{"io.kubernetes.cri.sandbox-cpu-period":"100000",
                "io.kubernetes.cri.sandbox-cpu-quota":"100000",
                "io.kubernetes.cri.sandbox-memory":"536870912"}"#,
        );

        let sizing = Sizing::default();
        let size = size(&limited, sizing);

        assert_eq!((size.vcpus, size.memory_mib), (1, 512 + 128));
        assert_eq!(super::size(&spec(""), sizing).memory_mib, 1024);
    }
}
