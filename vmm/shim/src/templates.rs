//! Which templates containerd's pods begin with: those of their tenant, in Hull's data directory.

use std::path::PathBuf;

use hull_pod::supervisor::{PodFailure, make_ordered};
use tracing_subscriber::filter::LevelFilter;

use crate::arguments::Arguments;
use crate::bundle::{Bundle, annotation};

/// Where Hull keeps what stays; the same as for `hull`.
const DATA_DIR: &str = "/var/lib/hull";
const VARIABLE: &str = "HULL_DATA_DIR";

/// The pod's namespace, as containerd's CRI plugin says.
const NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

#[must_use]
pub fn data_directory() -> PathBuf {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    named.unwrap_or_else(|| DATA_DIR.into())
}

/// Whose a pod is: containerd's namespace, and that of Kubernetes within it. Neither can have a slash.
#[must_use]
pub fn tenant(arguments: &Arguments, bundle: &Bundle) -> String {
    let containerd = &arguments.namespace;
    match annotation(&bundle.spec, NAMESPACE) {
        Some(namespace) => format!("{containerd}/{namespace}"),
        None => containerd.clone(),
    }
}

/// Is the process that makes a template, which a shim has started.
///
/// # Errors
/// When there is none.
pub fn make() -> Result<(), PodFailure> {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(LevelFilter::INFO)
        .with_writer(std::io::stderr)
        .init();
    make_ordered()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Place;

    fn tenant_of(annotations: &str) -> String {
        let spec = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}}}}"#);
        let bundle = Bundle {
            path: PathBuf::new(),
            spec: serde_json::from_str(&spec).unwrap(),
            place: Place::Alone,
        };
        let arguments = Arguments {
            namespace: "k8s.io".into(),
            ..Arguments::default()
        };
        tenant(&arguments, &bundle)
    }

    #[test]
    fn namespaces_are_tenants() {
        assert_eq!(tenant_of(""), "k8s.io");
        let annotation = format!(r#""{NAMESPACE}":"team""#);
        assert_eq!(tenant_of(&annotation), "k8s.io/team");
    }
}
