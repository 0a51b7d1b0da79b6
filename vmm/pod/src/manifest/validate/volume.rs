//! Rules for volumes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, PodSpec};

use super::super::names;
use super::super::problem::{FieldPath, Problems};
use super::super::quantity::Quantity;
use super::{form, one_of};

/// What `hostPath.type` may be.
const HOST_PATH_TYPES: &[&str] = &[
    "",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
    "CharDevice",
    "BlockDevice",
];

/// Checks the volumes of a Pod, and returns the names to which mounts may refer.
pub fn check<'a>(
    spec: &'a PodSpec,
    path: &FieldPath,
    problems: &mut Problems,
) -> BTreeMap<&'a str, ()> {
    let mut names = BTreeMap::new();
    for (index, volume) in spec.volumes.iter().flatten().enumerate() {
        let at = path.field("volumes").index(index);
        form(problems, at.field("name"), &volume.name, names::LABEL);
        if names.insert(volume.name.as_str(), ()).is_some() {
            problems.add(at.field("name"), "another volume of the Pod has this name");
        }
        if volume.host_path.is_some() && volume.empty_dir.is_some() {
            problems.add(
                at.clone(),
                "must have one source, not both hostPath and emptyDir",
            );
        }
        if let Some(source) = &volume.host_path {
            host_path(source, &at.field("hostPath"), problems);
        }
        if let Some(source) = &volume.empty_dir {
            empty_dir(source, &at.field("emptyDir"), problems);
        }
    }
    names
}

fn host_path(source: &HostPathVolumeSource, path: &FieldPath, problems: &mut Problems) {
    if source.path.is_empty() {
        problems.add(path.field("path"), "is missing");
    } else if !source.path.starts_with('/') {
        problems.add(path.field("path"), "must be an absolute path");
    } else if source.path.split('/').any(|part| part == "..") {
        problems.add(path.field("path"), "must not contain '..'");
    } else if source.path.contains('\0') {
        problems.add(path.field("path"), "must not contain a NUL character");
    }
    one_of(
        problems,
        path.field("type"),
        source.type_.as_deref(),
        HOST_PATH_TYPES,
    );
}

fn empty_dir(source: &EmptyDirVolumeSource, path: &FieldPath, problems: &mut Problems) {
    let medium = source.medium.as_deref();
    one_of(problems, path.field("medium"), medium, &["", "Memory"]);
    let Some(limit) = &source.size_limit else {
        return;
    };
    match Quantity::parse(&limit.0) {
        Err(message) => problems.add(path.field("sizeLimit"), message),
        Ok(limit) if limit.is_negative() => {
            problems.add(path.field("sizeLimit"), "must not be negative");
        }
        Ok(_) if medium != Some("Memory") => problems.add(
            path.field("sizeLimit"),
            "not supported yet on disk; leave it out, or set medium to Memory",
        ),
        Ok(_) => {}
    }
}
