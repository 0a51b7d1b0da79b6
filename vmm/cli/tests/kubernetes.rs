//! The manifests of scripts/kubernetes: Kubernetes knows every field, and none asks for more than it needs.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use std::path::Path;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, PodSpec};
use k8s_openapi::api::node::v1::RuntimeClass;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// All that is mounted of a node.
const HOST_PATHS: [&str; 4] = ["/etc/containerd", "/etc/hull", "/opt/hull", "/run/hull"];

fn documents() -> Vec<(String, Value)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/kubernetes");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for document in text.split("\n---\n") {
            let value = serde_saphyr::from_str(document).unwrap();
            all.push((path.display().to_string(), value));
        }
    }
    all
}

/// The document as Kubernetes has it. What it doesn't know is lost on the way, and so told.
fn typed<T: DeserializeOwned + Serialize>(name: &str, document: &Value) -> T {
    let typed: T = serde_json::from_value(document.clone()).unwrap();
    assert_eq!(&serde_json::to_value(&typed).unwrap(), document, "{name}");
    typed
}

fn pods() -> Vec<(String, PodSpec)> {
    let mut pods = Vec::new();
    for (name, document) in documents() {
        match document["kind"].as_str() {
            Some("DaemonSet") => {
                let set: DaemonSet = typed(&name, &document);
                pods.push((name, set.spec.unwrap().template.spec.unwrap()));
            }
            Some("RuntimeClass") => {
                let class: RuntimeClass = typed(&name, &document);
                assert_eq!(class.handler, "hull");
            }
            Some("Namespace") => drop(typed::<Namespace>(&name, &document)),
            kind => panic!("{name}: {kind:?}"),
        }
    }
    pods
}

#[test]
fn kubernetes_knows_every_field() {
    assert_eq!(pods().len(), 3);
}

#[test]
fn nothing_has_more_privilege_than_it_needs() {
    for (name, pod) in pods() {
        let host = [pod.host_network, pod.host_pid, pod.host_ipc];
        assert_eq!(host, [None; 3], "{name}");
        assert_eq!(pod.automount_service_account_token, Some(false), "{name}");
        for volume in pod.volumes.iter().flatten() {
            if let Some(source) = &volume.host_path {
                assert!(HOST_PATHS.contains(&source.path.as_str()), "{name}");
            }
        }
        for container in pod
            .containers
            .iter()
            .chain(pod.init_containers.iter().flatten())
        {
            let context = container.security_context.as_ref().unwrap();
            let capabilities = context.capabilities.as_ref().unwrap();
            assert_eq!(context.privileged, None, "{name}");
            assert_eq!(context.allow_privilege_escalation, Some(false), "{name}");
            assert_eq!(context.read_only_root_filesystem, Some(true), "{name}");
            assert_eq!(capabilities.add, None, "{name}");
            assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
        }
    }
}

/// The host's paths are the container's, so that what is written of them is true on the host.
#[test]
fn the_hosts_directories_are_mounted_where_they_are() {
    for (name, pod) in pods() {
        for volume in pod.volumes.iter().flatten() {
            let Some(source) = &volume.host_path else {
                continue;
            };
            let containers = pod
                .containers
                .iter()
                .chain(pod.init_containers.iter().flatten());
            let mounts = containers.flat_map(|container| container.volume_mounts.iter().flatten());
            for mount in mounts.filter(|mount| mount.name == volume.name) {
                assert_eq!(mount.mount_path, source.path, "{name}");
            }
        }
    }
}
