//! Kubernetes' rules for a Pod, and those of Hull.

mod container;
mod network;
mod security;
mod volume;

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Volume};

use super::bandwidth;
use super::names::{self, Form};
use super::problem::{FieldPath, Problems};

/// Kubernetes' bound on the annotations of an object.
const MAX_ANNOTATIONS: usize = 256 << 10;

/// Checks a Pod whose types are right.
pub fn pod(pod: &Pod, path: &FieldPath, problems: &mut Problems) {
    let metadata = path.field("metadata");
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    form(problems, metadata.field("name"), name, names::SUBDOMAIN);
    if let Some(namespace) = &pod.metadata.namespace {
        form(
            problems,
            metadata.field("namespace"),
            namespace,
            names::LABEL,
        );
    }
    for (key, value) in pod.metadata.labels.iter().flatten() {
        let at = metadata.field("labels").key(key);
        if !(names::QUALIFIED.fits)(key) {
            problems.add(at.clone(), format!("the key {}", names::QUALIFIED.rule));
        }
        form(problems, at, value, names::LABEL_VALUE);
    }
    let annotations = pod.metadata.annotations.iter().flatten();
    for (key, _) in annotations
        .clone()
        .filter(|(key, _)| !(names::QUALIFIED.fits)(&key.to_lowercase()))
    {
        problems.add(
            metadata.field("annotations").key(key),
            format!("the key {}", names::QUALIFIED.rule),
        );
    }
    if annotations
        .map(|(key, value)| key.len() + value.len())
        .sum::<usize>()
        > MAX_ANNOTATIONS
    {
        problems.add(
            metadata.field("annotations"),
            "must be at most 256 KiB together",
        );
    }
    bandwidth::check(&pod.metadata, &metadata, problems);
    match &pod.spec {
        Some(spec) => {
            check_spec(spec, &path.field("spec"), problems);
            network::check(pod, spec, &path.field("spec"), problems);
        }
        None => problems.add(
            path.field("spec"),
            "is missing; a Pod needs spec.containers",
        ),
    }
}

fn check_spec(spec: &PodSpec, path: &FieldPath, problems: &mut Problems) {
    one_of(
        problems,
        path.field("restartPolicy"),
        spec.restart_policy.as_deref(),
        &["Always", "OnFailure", "Never"],
    );
    within(
        problems,
        path.field("terminationGracePeriodSeconds"),
        spec.termination_grace_period_seconds,
        0..=i64::from(i32::MAX),
    );
    if let Some(context) = &spec.security_context {
        security::pod(context, &path.field("securityContext"), problems);
    }
    let volumes = volume::check(spec, path, problems);
    if spec.containers.is_empty() {
        problems.add(path.field("containers"), "must have at least one container");
    }
    let mut names = BTreeSet::new();
    let lists = [
        (
            "initContainers",
            spec.init_containers.as_deref().unwrap_or_default(),
        ),
        ("containers", &spec.containers),
    ];
    for (list, containers) in lists {
        let mut ports = BTreeSet::new();
        for (index, container) in containers.iter().enumerate() {
            let at = path.field(list).index(index);
            form(problems, at.field("name"), &container.name, names::LABEL);
            if !names.insert(container.name.as_str()) {
                problems.add(
                    at.field("name"),
                    "another container of the Pod has this name",
                );
            }
            container::check(container, &volumes, &mut ports, &at, problems);
        }
    }
}

/// Checks a container that joins a pod with these volumes while it runs.
pub fn joining_container(
    joining: &Container,
    volumes: &[Volume],
    path: &FieldPath,
    problems: &mut Problems,
) {
    form(problems, path.field("name"), &joining.name, names::LABEL);
    let volumes = volumes.iter().map(|v| (v.name.as_str(), ())).collect();
    container::check(joining, &volumes, &mut BTreeSet::new(), path, problems);
    for (index, port) in joining.ports.iter().flatten().enumerate() {
        if port.host_port.unwrap_or(0) != 0 {
            problems.add(
                path.field("ports").index(index).field("hostPort"),
                "the ports of a pod that runs can't be published any more",
            );
        }
    }
}

/// Adds a problem if a text hasn't the form that it must have.
fn form(problems: &mut Problems, path: FieldPath, text: &str, form: Form) {
    if !(form.fits)(text) {
        problems.add(
            path,
            if text.is_empty() {
                missing(form.rule)
            } else {
                form.rule.to_owned()
            },
        );
    }
}

fn missing(rule: &str) -> String {
    format!("is missing; it {rule}")
}

fn one_of(problems: &mut Problems, path: FieldPath, value: Option<&str>, allowed: &[&str]) {
    if value.is_some_and(|value| !allowed.contains(&value)) {
        let list = allowed
            .iter()
            .map(|text| if text.is_empty() { "\"\"" } else { text });
        problems.add(
            path,
            format!("must be one of {}", list.collect::<Vec<_>>().join(", ")),
        );
    }
}

fn within(
    problems: &mut Problems,
    path: FieldPath,
    value: Option<i64>,
    range: RangeInclusive<i64>,
) {
    if value.is_some_and(|value| !range.contains(&value)) {
        problems.add(
            path,
            format!("must be {} to {}", range.start(), range.end()),
        );
    }
}
