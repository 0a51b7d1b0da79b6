//! Rules for a container that is in no manifest: it joins a pod that runs.

use k8s_openapi::api::core::v1::Container;

use super::problem::{FieldPath, Problems};
use super::tree::Node;
use super::{ManifestError, PodManifest, support, validate};

/// Checks a container as [`super::load`] checks those of a manifest, and that the pod's can be its
/// neighbours, but for its name, which others may have joined with.
///
/// # Errors
/// All faults, each with field and value.
pub fn check_joining(manifest: &PodManifest, container: &Container) -> Result<(), ManifestError> {
    let source = format!("container {}", container.name);
    let document: Node = serde_json::to_value(container)
        .map_err(|error| ManifestError::of_file(&source, error))?
        .into();
    let (path, mut problems) = (FieldPath::default(), Problems::default());
    support::check_container(&document, &path, &mut problems);
    let volumes = manifest.spec().volumes.as_deref().unwrap_or_default();
    validate::joining_container(container, volumes, &path, &mut problems);
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ManifestError::of_fields(&source, &document, &problems))
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn fault(container: &str) -> String {
        let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {volumes: [{name: v}], \
                   containers: [{name: a, image: b}]}}";
        let manifest = parse("p.yaml", pod).unwrap().remove(0);
        let container = serde_json::from_str(container).unwrap();
        check_joining(&manifest, &container).map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn what_joins_is_checked_as_what_is_there_from_the_beginning() {
        assert_eq!(
            fault(
                r#"{"name": "d", "image": "b", "tty": true, "args": ["sh"],
                    "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": true}]}"#
            ),
            ""
        );
        assert_eq!(
            fault(r#"{"name": "D", "image": "b", "securityContext": {"privileged": true}}"#)
                .lines()
                .map(|line| line.split(" must be").next().unwrap())
                .collect::<Vec<_>>(),
            [
                "container D: securityContext.privileged: true: not supported yet; only false",
                "container D: name: \"D\":"
            ]
        );
        assert_eq!(
            fault(
                r#"{"name": "d", "image": "b", "volumeMounts": [{"name": "z", "mountPath": "/v"}]}"#
            ),
            "container d: volumeMounts[0].name: \"z\": no volume of the Pod has this name; it has: v"
        );
        assert_eq!(
            fault(
                r#"{"name": "d", "image": "b", "ports": [{"containerPort": 80, "hostPort": 80}]}"#
            ),
            "container d: ports[0].hostPort: 80: the ports of a pod that runs can't be published any more"
        );
    }
}
