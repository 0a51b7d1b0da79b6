//! Which of Kubernetes' fields Hull acts on, and which it refuses for now.
//!
//! A field is named by its path without list positions. One that is not named here,
//! nor under a name that ends in `.*`, is refused, never ignored: a manifest that
//! runs does what it says.

use super::problem::{FieldPath, Problems};
use super::tree::{Node, Value};

/// What of a Pod is acted on.
const POD: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata.annotations.*",
    "metadata.labels.*",
    "metadata.name",
    "metadata.namespace",
    "spec.dnsConfig.nameservers.*",
    "spec.dnsConfig.options.name",
    "spec.dnsConfig.options.value",
    "spec.dnsConfig.searches.*",
    "spec.dnsPolicy",
    "spec.hostAliases.hostnames.*",
    "spec.hostAliases.ip",
    "spec.hostNetwork",
    "spec.hostname",
    "spec.restartPolicy",
    "spec.securityContext.fsGroup",
    "spec.securityContext.runAsGroup",
    "spec.securityContext.runAsNonRoot",
    "spec.securityContext.runAsUser",
    "spec.securityContext.seccompProfile.type",
    "spec.securityContext.supplementalGroups.*",
    "spec.securityContext.sysctls.name",
    "spec.securityContext.sysctls.value",
    "spec.setHostnameAsFQDN",
    "spec.shareProcessNamespace",
    "spec.subdomain",
    "spec.terminationGracePeriodSeconds",
    "spec.volumes.emptyDir.medium",
    "spec.volumes.emptyDir.sizeLimit",
    "spec.volumes.hostPath.path",
    "spec.volumes.hostPath.type",
    "spec.volumes.name",
];

/// What of a Pod means nothing on one machine, is written by a cluster into what it
/// gives out, or makes no difference to what Hull does: accepted and left alone.
const POD_WITHOUT_MEANING: &[&str] = &[
    "metadata.creationTimestamp",
    "metadata.finalizers.*",
    "metadata.generation",
    "metadata.managedFields.*",
    "metadata.ownerReferences.*",
    "metadata.resourceVersion",
    "metadata.selfLink",
    "metadata.uid",
    "spec.affinity.*",
    "spec.automountServiceAccountToken",
    "spec.enableServiceLinks",
    "spec.imagePullSecrets.*",
    "spec.nodeName",
    "spec.nodeSelector.*",
    "spec.preemptionPolicy",
    "spec.priority",
    "spec.priorityClassName",
    "spec.runtimeClassName",
    "spec.schedulerName",
    "spec.securityContext.fsGroupChangePolicy",
    "spec.serviceAccount",
    "spec.serviceAccountName",
    "spec.tolerations.*",
    "spec.topologySpreadConstraints.*",
    "status.*",
];

/// What of a container is acted on.
const CONTAINER: &[&str] = &[
    "args.*",
    "command.*",
    "env.name",
    "env.value",
    "env.valueFrom.fieldRef.apiVersion",
    "env.valueFrom.fieldRef.fieldPath",
    "image",
    "imagePullPolicy",
    "name",
    "ports.containerPort",
    "ports.hostIP",
    "ports.hostPort",
    "ports.name",
    "ports.protocol",
    "resources.limits.cpu",
    "resources.limits.memory",
    "resources.requests.cpu",
    "resources.requests.memory",
    "securityContext.allowPrivilegeEscalation",
    "securityContext.capabilities.add.*",
    "securityContext.capabilities.drop.*",
    "securityContext.readOnlyRootFilesystem",
    "securityContext.runAsGroup",
    "securityContext.runAsNonRoot",
    "securityContext.runAsUser",
    "securityContext.seccompProfile.type",
    "stdin",
    "stdinOnce",
    "tty",
    "volumeMounts.mountPath",
    "volumeMounts.name",
    "volumeMounts.readOnly",
    "volumeMounts.recursiveReadOnly",
    "volumeMounts.subPath",
    "volumeMounts.subPathExpr",
    "workingDir",
];

const CONTAINER_WITHOUT_MEANING: &[&str] =
    &["resizePolicy.*", "resources.requests.ephemeral-storage"];

/// Fields that may be set to these values only, which are what Hull does anyway.
const POD_FIXED: &[(&str, &[Fixed])] = &[
    ("spec.hostIPC", &[Fixed::Flag(false)]),
    ("spec.hostPID", &[Fixed::Flag(false)]),
    ("spec.hostUsers", &[Fixed::Flag(true)]),
    ("spec.os.name", &[Fixed::Text("linux")]),
    (
        "spec.securityContext.appArmorProfile.type",
        &[Fixed::Text("Unconfined")],
    ),
    (
        "spec.securityContext.supplementalGroupsPolicy",
        &[Fixed::Text("Merge")],
    ),
];

const CONTAINER_FIXED: &[(&str, &[Fixed])] = &[
    (
        "securityContext.appArmorProfile.type",
        &[Fixed::Text("Unconfined")],
    ),
    ("securityContext.privileged", &[Fixed::Flag(false)]),
    ("securityContext.procMount", &[Fixed::Text("Default")]),
    (
        "terminationMessagePath",
        &[Fixed::Text("/dev/termination-log")],
    ),
    ("terminationMessagePolicy", &[Fixed::Text("File")]),
    ("volumeMounts.mountPropagation", &[Fixed::Text("None")]),
];

#[derive(Debug, Clone, Copy)]
enum Fixed {
    Flag(bool),
    Text(&'static str),
}

impl Fixed {
    fn is(self, node: &Node) -> bool {
        match (self, &node.value) {
            (Self::Flag(allowed), Value::Bool(value)) => allowed == *value,
            (Self::Text(allowed), Value::String(value)) => allowed == value,
            _ => false,
        }
    }
}

impl std::fmt::Display for Fixed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(value) => write!(f, "{value}"),
            Self::Text(value) => f.write_str(value),
        }
    }
}

/// The tables that apply to one kind of object.
struct Tables {
    /// Of names of fields that are accepted as they are.
    accepted: &'static [&'static [&'static str]],
    fixed: &'static [(&'static str, &'static [Fixed])],
}

const POD_TABLES: Tables = Tables {
    accepted: &[POD, POD_WITHOUT_MEANING],
    fixed: POD_FIXED,
};
const CONTAINER_TABLES: Tables = Tables {
    accepted: &[CONTAINER, CONTAINER_WITHOUT_MEANING],
    fixed: CONTAINER_FIXED,
};

/// Names every field of a Pod that Hull does not act on.
pub fn check(pod: &Node, path: &FieldPath, problems: &mut Problems) {
    walk(pod, "", path, &POD_TABLES, problems);
}

/// The same for a container by itself.
pub fn check_container(container: &Node, path: &FieldPath, problems: &mut Problems) {
    walk(container, "", path, &CONTAINER_TABLES, problems);
}

fn walk(node: &Node, name: &str, path: &FieldPath, tables: &Tables, problems: &mut Problems) {
    match &node.value {
        Value::Mapping(entries) => {
            for entry in entries.iter().filter(|entry| !entry.value.is_null()) {
                let below = if name.is_empty() {
                    entry.key.clone()
                } else {
                    format!("{name}.{}", entry.key)
                };
                field(
                    &entry.value,
                    &below,
                    &path.key(&entry.key),
                    tables,
                    problems,
                );
            }
        }
        Value::Sequence(items) => {
            for (index, item) in items.iter().enumerate() {
                walk(item, name, &path.index(index), tables, problems);
            }
        }
        _ => {}
    }
}

fn field(node: &Node, name: &str, path: &FieldPath, tables: &Tables, problems: &mut Problems) {
    if name == "spec.containers" || name == "spec.initContainers" {
        return walk(node, "", path, &CONTAINER_TABLES, problems);
    }
    if let Some((_, allowed)) = tables.fixed.iter().find(|(fixed, _)| *fixed == name) {
        if !allowed.iter().any(|value| value.is(node)) {
            let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            problems.add(
                path.clone(),
                format!("not supported yet; only {}", allowed.join(" or ")),
            );
        }
        return;
    }
    match tables.place_of(name) {
        Place::Accepted => {}
        Place::Above => walk(node, name, path, tables, problems),
        Place::Nowhere => problems.add(path.clone(), "not supported yet"),
    }
}

/// Where a name is with regard to the tables.
enum Place {
    Accepted,
    /// Fields beneath it are named.
    Above,
    Nowhere,
}

impl Tables {
    fn place_of(&self, name: &str) -> Place {
        let names = self.accepted.iter().copied().flatten().copied();
        if names
            .clone()
            .any(|accepted| accepted.strip_suffix(".*").unwrap_or(accepted) == name)
        {
            return Place::Accepted;
        }
        let beneath = |other: &str| {
            other
                .strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        if names
            .chain(self.fixed.iter().map(|(name, _)| *name))
            .any(beneath)
        {
            return Place::Above;
        }
        Place::Nowhere
    }
}

#[cfg(test)]
mod tests {
    use super::super::problem::ManifestError;
    use super::super::tree;
    use super::*;

    fn faults(spec: &str) -> String {
        let document = tree::parse(&format!("spec: {spec}")).unwrap().remove(0);
        let mut problems = Problems::default();
        check(&document, &FieldPath::default(), &mut problems);
        ManifestError::of_fields("f", &document, &problems).to_string()
    }

    #[test]
    fn fields_without_a_place_are_refused() {
        assert_eq!(
            faults("{activeDeadlineSeconds: 5}"),
            "f:1: spec.activeDeadlineSeconds: 5: not supported yet"
        );
        assert_eq!(
            faults("{containers: [{name: a, livenessProbe: {exec: {}}}]}"),
            "f:1: spec.containers[0].livenessProbe: not supported yet"
        );
        assert_eq!(
            faults("{initContainers: [{restartPolicy: Always}]}"),
            "f:1: spec.initContainers[0].restartPolicy: \"Always\": not supported yet"
        );
        assert_eq!(
            faults("{volumes: [{name: v, configMap: {name: c}}]}"),
            "f:1: spec.volumes[0].configMap: not supported yet"
        );
    }

    #[test]
    fn fields_that_hull_acts_on_pass() {
        assert_eq!(
            faults(
                "{nodeSelector: {a: b}, hostNetwork: false, containers: [{name: a, securityContext: {capabilities: {drop: [ALL]}}, ports: [{containerPort: 80, hostPort: 0}]}], volumes: [{emptyDir: {}}]}"
            ),
            ""
        );
    }

    #[test]
    fn a_fixed_field_says_what_it_may_be() {
        assert_eq!(
            faults("{hostPID: true}"),
            "f:1: spec.hostPID: true: not supported yet; only false"
        );
        assert_eq!(
            faults("{containers: [{securityContext: {privileged: true}}]}"),
            "f:1: spec.containers[0].securityContext.privileged: true: not supported yet; only false"
        );
    }

    /// Names of all fields of a tree, as the tables write them.
    fn names_of(node: &Node, name: &str, names: &mut Vec<String>) {
        names.push(name.trim_start_matches('.').to_owned());
        node.items()
            .iter()
            .for_each(|item| names_of(item, name, names));
        for entry in node.entries() {
            names_of(&entry.value, &format!("{name}.{}", entry.key), names);
        }
    }

    #[test]
    fn every_named_field_is_one_of_kubernetes() {
        // Every field of the tables is in this manifest, and the typed reader, which
        // knows all of Kubernetes' fields, finds no stranger in it.
        let document = tree::parse(include_str!("testdata/complete.yaml"))
            .unwrap()
            .remove(0);
        let mut problems = Problems::default();
        let pod: Option<k8s_openapi::api::core::v1::Pod> =
            super::super::typed::deserialize(&document, &FieldPath::default(), &mut problems);
        assert_eq!(
            ManifestError::of_fields("f", &document, &problems).to_string(),
            ""
        );
        assert!(pod.is_some());

        let mut present = Vec::new();
        names_of(&document, "", &mut present);
        let mut missing = Vec::new();
        for (tables, prefix) in [(POD_TABLES, ""), (CONTAINER_TABLES, "spec.containers.")] {
            let fixed = tables.fixed.iter().map(|(name, _)| *name);
            for name in tables
                .accepted
                .iter()
                .copied()
                .flatten()
                .copied()
                .chain(fixed)
            {
                let full = format!("{prefix}{}", name.strip_suffix(".*").unwrap_or(name));
                missing.extend((!present.contains(&full)).then_some(full));
            }
        }
        assert_eq!(missing, Vec::<String>::new());
    }
}
