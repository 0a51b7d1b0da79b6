//! The shim's metrics, for the process that asks all pods of a node (`hull monitor`).

use std::path::PathBuf;
use std::sync::Arc;

use hull_pod::metrics::{Endpoint, Identity, Manager, PodMetrics, endpoint_path};
use hull_pod::text::chain;

use crate::arguments::Arguments;
use crate::bundle::{Bundle, annotation};
use crate::machine::MachinePod;

/// Where Hull's sockets are; the same as for `hull`.
const RUN_DIR: &str = "/run/hull";
const VARIABLE: &str = "HULL_RUN_DIR";

/// What Kubernetes calls the pod, as containerd's CRI plugin says.
const NAME: &str = "io.kubernetes.cri.sandbox-name";
const NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

/// The socket of a container's pod.
#[must_use]
pub fn socket(arguments: &Arguments) -> PathBuf {
    let run = std::env::var_os(VARIABLE).unwrap_or_else(|| RUN_DIR.into());
    endpoint_path(&PathBuf::from(run), &arguments.namespace, &arguments.id)
}

#[must_use]
pub fn identity(arguments: &Arguments, bundle: &Bundle) -> Identity {
    let said = |name, otherwise: &str| {
        let said = annotation(&bundle.spec, name);
        said.unwrap_or(otherwise).to_owned()
    };
    Identity {
        manager: Manager::Containerd,
        namespace: said(NAMESPACE, &arguments.namespace),
        name: said(NAME, &arguments.id),
        id: arguments.id.clone(),
    }
}

/// Answers who asks, until it is dropped. The pod runs all the same where that can't be.
pub async fn serve(arguments: &Arguments, identity: Identity, pod: Arc<MachinePod>) {
    match Endpoint::bind(&socket(arguments)) {
        Ok(endpoint) => {
            let measure = move || PodMetrics::measure(identity.clone(), pod.meter().as_deref());
            endpoint.serve(measure).await;
        }
        Err(error) => {
            tracing::warn!(error = chain(&error), "nobody will see the pod's metrics");
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identified(annotations: &str) -> Identity {
        let root = tempfile::tempdir().unwrap();
        let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}}}}"#);
        std::fs::write(root.path().join("config.json"), spec).unwrap();
        let arguments = Arguments {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            ..Arguments::default()
        };
        identity(&arguments, &Bundle::read(root.path()).unwrap())
    }

    #[test]
    fn a_pod_is_called_what_kubernetes_calls_it() {
        let pod = identified(
            r#""io.kubernetes.cri.container-type":"sandbox",
            "io.kubernetes.cri.sandbox-name":"web","io.kubernetes.cri.sandbox-namespace":"shop""#,
        );
        let alone = identified("");

        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("shop", "web"));
        assert_eq!(
            (alone.namespace.as_str(), alone.name.as_str()),
            ("k8s.io", "abc")
        );
    }
}
