//! The mounts of a container: its kernel's file systems, files of `/etc`, volumes.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, VolumeMount};
use oci_spec::runtime::Mount;

use super::expand::expand;
use super::process::Environment;
use crate::manifest::PodManifest;
use crate::volumes::is_memory;

/// Destination, type, source and options.
type Entry = (
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
);

/// What every container has. The agent puts the pod's own in place of `/dev/shm`.
const FILE_SYSTEMS: &[Entry] = &[
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    (
        "/dev",
        "tmpfs",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ],
    ),
    (
        "/dev/mqueue",
        "mqueue",
        "mqueue",
        &["nosuid", "noexec", "nodev"],
    ),
    (
        "/dev/shm",
        "tmpfs",
        "shm",
        &["nosuid", "noexec", "nodev", "mode=1777"],
    ),
    (
        "/sys",
        "sysfs",
        "sysfs",
        &["nosuid", "noexec", "nodev", "ro"],
    ),
    (
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["nosuid", "noexec", "nodev", "relatime", "ro"],
    ),
];

/// Files of the share that every container has.
const ETC: &[&str] = &["hosts", "hostname", "resolv.conf"];

/// A fault of one of the container's mounts: its position, and what is wrong.
pub type Fault = (usize, String);

/// All mounts, those higher up in the tree first. A volume takes the place of what
/// would otherwise be there.
pub fn of(
    manifest: &PodManifest,
    container: &Container,
    env: &Environment,
) -> Result<Vec<Mount>, Fault> {
    let volumes = container
        .volume_mounts
        .iter()
        .flatten()
        .enumerate()
        .map(|(index, mount)| volume(manifest, mount, env).map_err(|message| (index, message)))
        .collect::<Result<Vec<Mount>, Fault>>()?;
    let mut all: Vec<Mount> = defaults(container)
        .into_iter()
        .filter(|mount| {
            volumes
                .iter()
                .all(|volume| volume.destination() != mount.destination())
        })
        .collect();
    all.extend(volumes);
    // Stable: what is equally deep stays in the manifest's order.
    all.sort_by_key(|mount| mount.destination().components().count());
    Ok(all)
}

fn defaults(container: &Container) -> Vec<Mount> {
    let context = container.security_context.as_ref();
    let read_only = context.and_then(|context| context.read_only_root_filesystem) == Some(true);
    let file_systems = FILE_SYSTEMS
        .iter()
        .map(|(destination, kind, source, options)| make(destination, kind, source, options));
    let access = if read_only { "ro" } else { "rw" };
    let files = ETC.iter().map(|name| {
        let options = ["rbind", "rprivate", access];
        make(
            &format!("/etc/{name}"),
            "bind",
            &format!("share:etc/{name}"),
            &options,
        )
    });
    file_systems.chain(files).collect()
}

fn volume(manifest: &PodManifest, mount: &VolumeMount, env: &Environment) -> Result<Mount, String> {
    let volumes = manifest.spec().volumes.iter().flatten();
    let in_memory = volumes
        .filter(|volume| volume.name == mount.name)
        .any(|volume| {
            volume.host_path.is_none() && volume.empty_dir.as_ref().is_some_and(is_memory)
        });
    let base = if in_memory {
        format!("memory:{}", mount.name)
    } else {
        format!("share:volumes/{}", mount.name)
    };
    let source = match sub_path(mount, env)? {
        Some(sub_path) => format!("{base}/{sub_path}"),
        None => base,
    };
    // By itself readOnly doesn't reach what is mounted beneath (KEP-3857).
    let recursive = matches!(
        mount.recursive_read_only.as_deref(),
        Some("IfPossible" | "Enabled")
    );
    let access = match (mount.read_only == Some(true), recursive) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    let destination = clean(&mount.mount_path);
    Ok(make(
        &destination.to_string_lossy(),
        "bind",
        &source,
        &["rbind", "rprivate", access],
    ))
}

/// The part of the volume to mount, without empty parts and `.`.
fn sub_path(mount: &VolumeMount, env: &Environment) -> Result<Option<String>, String> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let path = match given(&mount.sub_path_expr) {
        Some(expression) => {
            let expanded = expand(&expression, |name| env.get(name));
            if let Some(name) = expanded.unknown {
                return Err(format!(
                    "{expression:?}: the container has no variable {name}"
                ));
            }
            if expanded.text.starts_with('/') {
                return Err(format!(
                    "{expression:?}: becomes {:?}, which is not relative",
                    expanded.text
                ));
            }
            Some(expanded.text)
        }
        None => given(&mount.sub_path),
    };
    let Some(path) = path else {
        return Ok(None);
    };
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    if parts.contains(&"..") {
        return Err(format!("{path:?}: must not contain '..'"));
    }
    Ok((!parts.is_empty()).then(|| parts.join("/")))
}

/// An absolute path without `.` and empty parts.
fn clean(path: &str) -> PathBuf {
    Path::new("/").join(path).components().collect()
}

fn make(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.into()))
        .set_options(Some(
            options.iter().map(|option| (*option).to_owned()).collect(),
        ));
    mount
}
