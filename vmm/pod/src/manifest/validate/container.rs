//! Rules for one container.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, EnvVar, ResourceRequirements, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource;

use super::super::fields;
use super::super::names;
use super::super::problem::{FieldPath, Problems};
use super::super::quantity::Quantity;
use super::{form, one_of, security, within};
use crate::images;

/// Checks a container, and adds its ports' names to those of the Pod.
pub fn check<'a>(
    container: &'a Container,
    volumes: &BTreeMap<&str, ()>,
    ports: &mut BTreeSet<&'a str>,
    path: &FieldPath,
    problems: &mut Problems,
) {
    image(container, path, problems);
    for (index, variable) in container.env.iter().flatten().enumerate() {
        env(variable, &path.field("env").index(index), problems);
    }
    for (index, port) in container.ports.iter().flatten().enumerate() {
        check_port(port, ports, &path.field("ports").index(index), problems);
    }
    if let Some(resources) = &container.resources {
        check_resources(resources, &path.field("resources"), problems);
    }
    if let Some(context) = &container.security_context {
        security::container(context, &path.field("securityContext"), problems);
    }
    if container
        .working_dir
        .as_deref()
        .is_some_and(|dir| !dir.is_empty() && !dir.starts_with('/'))
    {
        problems.add(path.field("workingDir"), "must be an absolute path");
    }
    let mut places = BTreeSet::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let at = path.field("volumeMounts").index(index);
        if !volumes.contains_key(mount.name.as_str()) {
            let declared: Vec<&str> = volumes.keys().copied().collect();
            let known = if declared.is_empty() {
                "none".to_owned()
            } else {
                declared.join(", ")
            };
            problems.add(
                at.field("name"),
                format!("no volume of the Pod has this name; it has: {known}"),
            );
        }
        check_mount(mount, &at, problems);
        if !places.insert(mount.mount_path.trim_end_matches('/')) {
            problems.add(
                at.field("mountPath"),
                "another mount of the container has this path",
            );
        }
    }
}

fn image(container: &Container, path: &FieldPath, problems: &mut Problems) {
    let image = container.image.as_deref().unwrap_or_default();
    if image.is_empty() {
        problems.add(path.field("image"), "is missing");
    } else if let Err(error) = images::parse(image) {
        problems.add(path.field("image"), error.to_string());
    }
    let policy = container.image_pull_policy.as_deref();
    one_of(
        problems,
        path.field("imagePullPolicy"),
        policy,
        &["Always", "IfNotPresent", "Never"],
    );
    if policy == Some("Always") {
        problems.add(
            path.field("imagePullPolicy"),
            "not supported yet: images come from the local store (hull load); set IfNotPresent or Never",
        );
    }
}

fn env(variable: &EnvVar, path: &FieldPath, problems: &mut Problems) {
    form(
        problems,
        path.field("name"),
        &variable.name,
        names::ENV_NAME,
    );
    let Some(source) = &variable.value_from else {
        return;
    };
    if variable
        .value
        .as_deref()
        .is_some_and(|value| !value.is_empty())
    {
        problems.add(path.clone(), "must have value or valueFrom, not both");
    }
    match &source.field_ref {
        None => problems.add(path.field("valueFrom"), "must have a source"),
        Some(field) => {
            if let Err(message) = fields::check(&field.field_path) {
                problems.add(path.field("valueFrom.fieldRef.fieldPath"), message);
            }
        }
    }
}

fn check_port<'a>(
    port: &'a ContainerPort,
    names: &mut BTreeSet<&'a str>,
    path: &FieldPath,
    problems: &mut Problems,
) {
    within(
        problems,
        path.field("containerPort"),
        Some(port.container_port.into()),
        1..=65535,
    );
    one_of(
        problems,
        path.field("protocol"),
        port.protocol.as_deref(),
        &["TCP", "UDP", "SCTP"],
    );
    if let Some(name) = &port.name {
        form(problems, path.field("name"), name, names::PORT_NAME);
        if !names.insert(name) {
            problems.add(path.field("name"), "another port of the Pod has this name");
        }
    }
}

fn check_resources(resources: &ResourceRequirements, path: &FieldPath, problems: &mut Problems) {
    let mut read = |list: &str, name: &str, quantity: Option<&resource::Quantity>| {
        let at = path.field(list).key(name);
        match Quantity::parse(&quantity?.0) {
            Ok(amount) if amount.is_negative() => {
                problems.add(at, "must not be negative");
                None
            }
            Ok(amount) => Some(amount),
            Err(message) => {
                problems.add(at, message);
                None
            }
        }
    };
    let mut above = Vec::new();
    for name in ["cpu", "memory"] {
        let of = |list: &Option<BTreeMap<String, resource::Quantity>>| {
            list.as_ref().and_then(|list| list.get(name)).cloned()
        };
        let limit = read("limits", name, of(&resources.limits).as_ref());
        let request = read("requests", name, of(&resources.requests).as_ref());
        if let (Some(limit), Some(request)) = (limit, request)
            && request > limit
        {
            above.push(name);
        }
    }
    for name in above {
        problems.add(
            path.field("requests").key(name),
            "must not be more than the limit",
        );
    }
}

fn check_mount(mount: &VolumeMount, path: &FieldPath, problems: &mut Problems) {
    let place = path.field("mountPath");
    if mount.mount_path.is_empty() {
        problems.add(place, "is missing");
    } else if mount.mount_path.contains(':') {
        problems.add(place, "must not contain ':'");
    } else if mount.mount_path.split('/').any(|part| part == "..") {
        problems.add(place, "must not contain '..'");
    } else if mount
        .mount_path
        .split('/')
        .all(|part| part.is_empty() || part == ".")
    {
        problems.add(place, "must not be the root of the container");
    }
    for (name, sub_path) in [
        ("subPath", &mount.sub_path),
        ("subPathExpr", &mount.sub_path_expr),
    ] {
        let text = sub_path.as_deref().unwrap_or_default();
        if text.starts_with('/') {
            problems.add(path.field(name), "must be a relative path");
        } else if text.split('/').any(|part| part == "..") {
            problems.add(path.field(name), "must not contain '..'");
        }
    }
    let set = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if set(&mount.sub_path) && set(&mount.sub_path_expr) {
        problems.add(
            path.field("subPathExpr"),
            "can't be set together with subPath",
        );
    }
    let recursive = mount.recursive_read_only.as_deref();
    let at = path.field("recursiveReadOnly");
    one_of(
        problems,
        at.clone(),
        recursive,
        &["Disabled", "IfPossible", "Enabled"],
    );
    let asked = matches!(recursive, Some("IfPossible" | "Enabled"));
    if asked && mount.read_only != Some(true) {
        problems.add(at, "needs readOnly to be true");
    }
}
