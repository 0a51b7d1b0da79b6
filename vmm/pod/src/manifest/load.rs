//! From a file, or standard input, to checked Pods.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use super::problem::{FieldPath, Problems};
use super::tree::{self, Node};
use super::{ManifestError, PodManifest, support, typed, validate};

/// Reads the Pods of a YAML or JSON file, or of standard input (`-`).
///
/// # Errors
/// When the file can't be read, or anything in it isn't as it must be. Nothing but
/// the file is looked at: that images and host paths exist is checked elsewhere.
pub fn load(source: &Path) -> Result<Vec<PodManifest>, ManifestError> {
    let name = source.display().to_string();
    let text = read(source).map_err(|message| ManifestError::of_file(&name, message))?;
    parse(&name, &text)
}

/// The same from a text; `source` is what messages call it.
///
/// # Errors
/// As [`load`].
pub fn parse(source: &str, text: &str) -> Result<Vec<PodManifest>, ManifestError> {
    let documents = tree::parse(text)
        .map_err(|message| ManifestError::of_file(source, format!("not YAML: {message}")))?;
    let mut pods = Vec::new();
    let mut names = BTreeSet::new();
    for document in &documents {
        let mut problems = Problems::default();
        for (node, path) in objects(document) {
            let Some(manifest) = pod(source, node, &path, &mut problems) else {
                continue;
            };
            if !names.insert((manifest.namespace().to_owned(), manifest.name().to_owned())) {
                problems.add(
                    path.field("metadata.name"),
                    "another Pod of the file has this name",
                );
            }
            pods.push(manifest);
        }
        if !problems.is_empty() {
            return Err(ManifestError::of_fields(source, document, &problems));
        }
    }
    if pods.is_empty() {
        return Err(ManifestError::of_file(source, "there is no Pod in it"));
    }
    Ok(pods)
}

fn read(source: &Path) -> Result<String, String> {
    let limit = tree::MAX_TEXT as u64;
    let mut bytes = Vec::new();
    let read = if source.as_os_str() == "-" {
        std::io::stdin()
            .lock()
            .take(limit + 1)
            .read_to_end(&mut bytes)
    } else {
        std::fs::File::open(source).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
    };
    read.map_err(|error| error.to_string())?;
    if bytes.len() > tree::MAX_TEXT {
        return Err(format!(
            "too large for a manifest: more than {} MiB",
            tree::MAX_TEXT >> 20
        ));
    }
    String::from_utf8(bytes).map_err(|_| "not a text in UTF-8".to_owned())
}

/// The objects of a document: itself, or the items of a List.
fn objects(document: &Node) -> Vec<(&Node, FieldPath)> {
    let root = FieldPath::default();
    let is_list = document.get("kind").and_then(Node::as_str) == Some("List");
    match document.get("items") {
        Some(items) if is_list => {
            let path = root.field("items");
            items
                .items()
                .iter()
                .enumerate()
                .map(|(index, item)| (item, path.index(index)))
                .collect()
        }
        _ => vec![(document, root)],
    }
}

fn pod(
    source: &str,
    node: &Node,
    path: &FieldPath,
    problems: &mut Problems,
) -> Option<PodManifest> {
    if !is_pod(node, path, problems) {
        return None;
    }
    let before = problems.len();
    let pod: k8s_openapi::api::core::v1::Pod = typed::deserialize(node, path, problems)?;
    if problems.len() > before {
        return None;
    }
    support::check(node, path, problems);
    validate::pod(&pod, path, problems);
    let spec = pod.spec.clone()?;
    (problems.len() == before).then(|| PodManifest {
        source: source.to_owned(),
        pod,
        spec,
    })
}

fn is_pod(node: &Node, path: &FieldPath, problems: &mut Problems) -> bool {
    if node.entries().is_empty() {
        problems.add(
            path.clone(),
            "must be a mapping with apiVersion, kind, metadata and spec",
        );
        return false;
    }
    let before = problems.len();
    // Of another kind the apiVersion is another, too: one fault says it all.
    for (field, wanted) in [("kind", "Pod"), ("apiVersion", "v1")] {
        match node.get(field).map(Node::as_str) {
            Some(Some(text)) if text == wanted => {}
            _ if problems.len() > before => {}
            Some(_) => problems.add(path.field(field), format!("not supported; only {wanted}")),
            None => problems.add(
                path.field(field),
                format!("is missing; it must be {wanted}"),
            ),
        }
    }
    problems.len() == before
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        parse("p.yaml", text).unwrap_err().to_string()
    }

    /// The fault of a Pod named `p` with this spec.
    fn spec_fault(spec: &str) -> String {
        fault(&format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {spec}}}"
        ))
    }

    fn container_fault(container: &str) -> String {
        spec_fault(&format!(
            "{{volumes: [{{name: v}}, {{name: w}}], containers: [{{name: a, image: b, {container}}}]}}"
        ))
    }

    #[test]
    fn a_pod_with_every_supported_field_is_accepted() {
        let pods = parse("complete.yaml", include_str!("testdata/complete.yaml")).unwrap();
        assert_eq!(pods.len(), 1);
        assert_eq!(pods[0].name(), "complete");
        assert_eq!(
            pods[0].restart_policy(),
            super::super::RestartPolicy::OnFailure
        );
        assert_eq!(pods[0].termination_grace_period().as_secs(), 5);
        assert_eq!(pods[0].init_containers()[0].name, "first");
    }

    #[test]
    fn a_manifest_survives_being_written_as_json() {
        let pods = parse("complete.yaml", include_str!("testdata/complete.yaml")).unwrap();
        let text = serde_json::to_string(&pods[0]).unwrap();
        let again: PodManifest = serde_json::from_str(&text).unwrap();
        assert_eq!(again.pod, pods[0].pod);
        assert_eq!(again.spec(), pods[0].spec());
    }

    #[test]
    fn what_is_not_a_pod_is_refused() {
        assert_eq!(
            fault("kind: Deployment\napiVersion: v1\n"),
            "p.yaml:1: kind: \"Deployment\": not supported; only Pod"
        );
        assert_eq!(
            fault("kind: Pod\n"),
            "p.yaml:1: apiVersion: is missing; it must be v1"
        );
        assert_eq!(
            fault("- a\n"),
            "p.yaml:1: must be a mapping with apiVersion, kind, metadata and spec"
        );
        assert_eq!(fault("# nothing\n"), "p.yaml: there is no Pod in it");
        assert!(fault("a: [").starts_with("p.yaml: not YAML: "));
        assert_eq!(
            fault("{apiVersion: v1, kind: Pod, metadata: {name: a}}"),
            "p.yaml:1: spec: is missing; a Pod needs spec.containers"
        );
    }

    #[test]
    fn documents_and_lists_are_read() {
        let pod = |name: &str| {
            format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: [{{name: a, image: b}}]}}}}"
            )
        };
        let text = format!("{}\n---\n{}\n", pod("x"), pod("z"));
        let names: Vec<_> = parse("f", &text)
            .unwrap()
            .iter()
            .map(|pod| pod.name().to_owned())
            .collect();
        assert_eq!(names, ["x", "z"]);
        let list = format!(
            "{{apiVersion: v1, kind: List, items: [{}, {}]}}",
            pod("x"),
            pod("x")
        );
        assert_eq!(
            fault(&list),
            "p.yaml:1: items[1].metadata.name: \"x\": another Pod of the file has this name"
        );
    }

    #[test]
    fn unreadable_files_are_named() {
        let error = load(Path::new("/nonexistent/pod.yaml"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("/nonexistent/pod.yaml: No such file"),
            "{error}"
        );
        let error = load(Path::new("/dev/zero")).unwrap_err().to_string();
        assert_eq!(
            error,
            "/dev/zero: too large for a manifest: more than 4 MiB"
        );
    }

    #[test]
    fn bad_names_are_refused() {
        let error = fault(
            "{apiVersion: v1, kind: Pod, metadata: {name: ../x}, spec: {containers: [{name: a, image: b}]}}",
        );
        assert!(
            error.starts_with("p.yaml:1: metadata.name: \"../x\": must be a name of lower-case"),
            "{error}"
        );
        assert!(
            spec_fault("{containers: [{name: A, image: b}]}")
                .contains("containers[0].name: \"A\": must be")
        );
        assert!(
            spec_fault("{containers: [{image: b}]}")
                .contains("containers[0].name: is missing; it must be")
        );
    }

    #[test]
    fn duplicates_are_refused() {
        assert_eq!(
            spec_fault(
                "{initContainers: [{name: a, image: b}], containers: [{name: a, image: b}]}"
            ),
            "p.yaml:1: spec.containers[0].name: \"a\": another container of the Pod has this name"
        );
        assert_eq!(
            spec_fault("{volumes: [{name: v}, {name: v}], containers: [{name: a, image: b}]}"),
            "p.yaml:1: spec.volumes[1].name: \"v\": another volume of the Pod has this name"
        );
        assert_eq!(
            container_fault("volumeMounts: [{name: v, mountPath: /x}, {name: w, mountPath: /x/}]"),
            "p.yaml:1: spec.containers[0].volumeMounts[1].mountPath: \"/x/\": another mount of the container has this path"
        );
    }

    #[test]
    fn mounts_are_checked() {
        assert_eq!(
            container_fault("volumeMounts: [{name: z, mountPath: /x}]"),
            "p.yaml:1: spec.containers[0].volumeMounts[0].name: \"z\": no volume of the Pod has this name; it has: v, w"
        );
        let faults = [
            (
                "{name: v, mountPath: a:b}",
                "mountPath: \"a:b\": must not contain ':'",
            ),
            (
                "{name: v, mountPath: /a/../..}",
                "mountPath: \"/a/../..\": must not contain '..'",
            ),
            (
                "{name: v, mountPath: /./}",
                "mountPath: \"/./\": must not be the root",
            ),
            (
                "{name: v, mountPath: /a, subPath: /etc}",
                "subPath: \"/etc\": must be a relative path",
            ),
            (
                "{name: v, mountPath: /a, subPath: a/../../b}",
                "must not contain '..'",
            ),
            (
                "{name: v, mountPath: /a, subPath: a, subPathExpr: b}",
                "subPathExpr: \"b\": can't be set together",
            ),
            (
                "{name: v, mountPath: /a, recursiveReadOnly: Enabled}",
                "needs readOnly to be true",
            ),
        ];
        for (mount, wanted) in faults {
            let error = container_fault(&format!("volumeMounts: [{mount}]"));
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn values_are_checked() {
        let faults = [
            (
                "imagePullPolicy: Always",
                "imagePullPolicy: \"Always\": not supported yet: images come from",
            ),
            (
                "imagePullPolicy: Sometimes",
                "must be one of Always, IfNotPresent, Never",
            ),
            (
                "ports: [{containerPort: 0}]",
                "containerPort: 0: must be 1 to 65535",
            ),
            ("ports: [{containerPort: 65536}]", "must be 1 to 65535"),
            (
                "ports: [{containerPort: 1, protocol: ICMP}]",
                "must be one of TCP, UDP, SCTP",
            ),
            (
                "ports: [{containerPort: 1, hostPort: 65536}]",
                "hostPort: 65536: must be 0 to 65535",
            ),
            (
                "ports: [{containerPort: 1, hostPort: 1, hostIP: here}]",
                "hostIP: \"here\": must be an IP address",
            ),
            (
                "ports: [{containerPort: 1, hostPort: 1, protocol: SCTP}]",
                "hostPort: 1: not supported yet for SCTP",
            ),
            (
                "ports: [{containerPort: 1, hostPort: 80}, {containerPort: 2, hostPort: 80}]",
                "ports[1].hostPort: 80: another port of the Pod has this",
            ),
            (
                "env: [{name: A=B, value: x}]",
                "env[0].name: \"A=B\": must be of printable",
            ),
            (
                "env: [{name: A, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]",
                "fieldPath: \"status.podIP\": not supported yet",
            ),
            ("env: [{name: A, valueFrom: {}}]", "must have a source"),
            (
                "resources: {limits: {memory: 1 Gi}}",
                "limits.memory: \"1 Gi\": is not a quantity",
            ),
            (
                "resources: {limits: {cpu: 1}, requests: {cpu: 1001m}}",
                "requests.cpu: \"1001m\": must not be more than the limit",
            ),
            ("resources: {limits: {cpu: -1}}", "must not be negative"),
            (
                "resources: {limits: {nvidia.com/gpu: 1}}",
                "limits[\"nvidia.com/gpu\"]: 1: not supported yet",
            ),
            (
                "workingDir: tmp",
                "workingDir: \"tmp\": must be an absolute path",
            ),
            (
                "securityContext: {capabilities: {add: [FLY]}}",
                "add[0]: \"FLY\": is not a capability",
            ),
            (
                "securityContext: {runAsUser: -1}",
                "runAsUser: -1: must be 0 to",
            ),
            (
                "securityContext: {runAsNonRoot: true, runAsUser: 0}",
                "can't be 0 where runAsNonRoot",
            ),
            (
                "securityContext: {seccompProfile: {type: Localhost}}",
                "not supported yet; only RuntimeDefault or Unconfined",
            ),
            (
                "securityContext: {allowPrivilegeEscalation: false, capabilities: {add: [SYS_ADMIN]}}",
                "can't be false",
            ),
        ];
        for (fields, wanted) in faults {
            let error = container_fault(fields);
            assert!(error.contains(wanted), "{fields}: {error}");
        }
    }

    #[test]
    fn pod_values_are_checked() {
        let faults = [
            (
                "restartPolicy: Sometimes",
                "restartPolicy: \"Sometimes\": must be one of Always, OnFailure, Never",
            ),
            ("terminationGracePeriodSeconds: -1", "must be 0 to"),
            ("hostname: a.b", "hostname: \"a.b\": must be"),
            (
                "hostAliases: [{ip: x}]",
                "hostAliases[0].ip: \"x\": must be an IP address",
            ),
            (
                "hostNetwork: true",
                "hostNetwork: true: a pod is a machine of its own",
            ),
            ("dnsPolicy: Best", "must be one of ClusterFirst"),
            ("dnsPolicy: None", "needs at least one of dnsConfig"),
            (
                "dnsConfig: {nameservers: [a]}",
                "nameservers[0]: \"a\": must be an IP address",
            ),
            (
                "dnsConfig: {searches: ['a b']}",
                "searches[0]: \"a b\": must be a name",
            ),
            (
                "dnsConfig: {options: [{name: \"a\\nb\"}]}",
                "options[0].name: \"a\\nb\": must be a word",
            ),
            ("subdomain: a.b", "subdomain: \"a.b\": must be"),
            (
                "subdomain: a23456789-123456789-123456789, setHostnameAsFQDN: true, hostname: b23456789",
                "longer than 64",
            ),
            (
                "securityContext: {sysctls: [{name: kernel.panic, value: '1'}]}",
                "sysctls[0].name: \"kernel.panic\": belongs to no namespace",
            ),
            (
                "securityContext: {sysctls: [{name: kernel.sem_next_id, value: '1'}]}",
                "belongs to no namespace",
            ),
            (
                "securityContext: {sysctls: [{name: net/core/somaxconn, value: '1'}, {name: net.core.somaxconn, value: '2'}]}",
                "sysctls[1].name: \"net.core.somaxconn\": is set twice",
            ),
            (
                "securityContext: {sysctls: [{name: net.x/../y, value: '1'}]}",
                "must be a name of",
            ),
            (
                "volumes: [{name: h, hostPath: {path: x}}]",
                "path: \"x\": must be an absolute path",
            ),
            (
                "volumes: [{name: h, hostPath: {path: /a/../b}}]",
                "must not contain '..'",
            ),
            (
                "volumes: [{name: h, hostPath: {path: /a, type: Dir}}]",
                "type: \"Dir\": must be one of \"\", Directory",
            ),
            (
                "volumes: [{name: h, emptyDir: {medium: HugePages}}]",
                "must be one of \"\", Memory",
            ),
            (
                "volumes: [{name: h, emptyDir: {sizeLimit: 1Gi}}]",
                "sizeLimit: \"1Gi\": not supported yet on disk",
            ),
            (
                "volumes: [{name: h, emptyDir: {}, hostPath: {path: /a}}]",
                "must have one source",
            ),
        ];
        for (fields, wanted) in faults {
            let error = spec_fault(&format!(
                "{{containers: [{{name: a, image: b}}], {fields}}}"
            ));
            assert!(error.contains(wanted), "{fields}: {error}");
        }
        assert!(
            spec_fault("{containers: []}")
                .contains("spec.containers: must have at least one container")
        );
    }

    #[test]
    fn annotations_are_never_options() {
        let text = "{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {hull.dev/kernel: /x}}, spec: {containers: [{name: a, image: b}]}}";
        let plain = text.replace("hull.dev/kernel: /x", "");
        assert_eq!(
            parse("f", text).unwrap()[0].spec(),
            parse("f", &plain).unwrap()[0].spec()
        );
    }
}
