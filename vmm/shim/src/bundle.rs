//! A bundle: the directory that containerd makes for a container, with its specification.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// A specification is never longer.
const SPEC_MAX: u64 = 16 << 20;

/// What the CRI plugins of containerd, and CRI-O, say of a container.
const KIND: &str = "io.kubernetes.cri.container-type";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("reading {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is no runtime specification", path.display())]
    Spec {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the container has annotation {KIND}={0:?}, and not {SANDBOX}")]
    NoSandbox(String),
}

/// What a container is in its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The sandbox: infra stands for it, and its image never runs.
    Sandbox,
    /// One of a sandbox's.
    Member { sandbox: String },
    /// Without a pod around it: a pod of its own.
    Alone,
}

/// A bundle that has been read.
#[derive(Debug, Clone)]
pub struct Bundle {
    pub path: PathBuf,
    pub spec: Spec,
    pub place: Place,
}

/// A namespace, as a container's specification has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// Somebody has made it, and pinned it here.
    Path(PathBuf),
    /// To be made.
    New,
    /// The host's own.
    Host,
}

impl Bundle {
    /// # Errors
    /// When there is no specification that can be read.
    pub fn read(path: &Path) -> Result<Self, BundleError> {
        let file = path.join("config.json");
        let io_error = |source| BundleError::Io {
            path: file.clone(),
            source,
        };
        let mut content = Vec::new();
        File::open(&file)
            .map_err(io_error)?
            .take(SPEC_MAX)
            .read_to_end(&mut content)
            .map_err(io_error)?;
        let spec: Spec = serde_json::from_slice(&content).map_err(|source| BundleError::Spec {
            path: file.clone(),
            source,
        })?;
        let place = place(&spec)?;
        Ok(Self {
            path: path.to_owned(),
            spec,
            place,
        })
    }

    /// The container for which the pod's shim is: `id` itself, if it isn't another's member.
    #[must_use]
    pub fn owner<'a>(&'a self, id: &'a str) -> &'a str {
        match &self.place {
            Place::Member { sandbox } => sandbox,
            Place::Sandbox | Place::Alone => id,
        }
    }

    /// The network. That of its first container is the pod's.
    #[must_use]
    pub fn network(&self) -> Namespace {
        self.namespace(LinuxNamespaceType::Network)
    }

    /// Whose processes are seen.
    #[must_use]
    pub fn processes(&self) -> Namespace {
        self.namespace(LinuxNamespaceType::Pid)
    }

    fn namespace(&self, kind: LinuxNamespaceType) -> Namespace {
        let namespaces = self.spec.linux().iter().flat_map(|l| l.namespaces().iter());
        let mut found = namespaces
            .flatten()
            .filter(|namespace| namespace.typ() == kind);
        match found.next().map(|namespace| namespace.path()) {
            Some(Some(path)) if !path.as_os_str().is_empty() => Namespace::Path(path.clone()),
            Some(_) => Namespace::New,
            None => Namespace::Host,
        }
    }
}

/// An annotation of a specification.
#[must_use]
pub fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    let annotations = spec.annotations().as_ref()?;
    annotations.get(name).map(String::as_str)
}

fn place(spec: &Spec) -> Result<Place, BundleError> {
    let sandbox = annotation(spec, SANDBOX);
    match (annotation(spec, KIND), sandbox) {
        (Some("sandbox"), _) => Ok(Place::Sandbox),
        (Some(_), Some(sandbox)) => Ok(Place::Member {
            sandbox: sandbox.to_owned(),
        }),
        (Some(kind), None) => Err(BundleError::NoSandbox(kind.to_owned())),
        (None, _) => Ok(Place::Alone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(json: &str) -> Result<Bundle, BundleError> {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("config.json"), json).unwrap();
        Bundle::read(root.path())
    }

    #[test]
    fn annotations_tell_the_place() {
        let member = bundle(
            r#"{"ociVersion":"1.0.2","annotations":{
                "io.kubernetes.cri.container-type":"container",
                "io.kubernetes.cri.sandbox-id":"abc"}}"#,
        )
        .unwrap();
        let sandbox = bundle(
            r#"{"ociVersion":"1.0.2","annotations":{
                "io.kubernetes.cri.container-type":"sandbox",
                "io.kubernetes.cri.sandbox-id":"abc"}}"#,
        )
        .unwrap();
        let alone = bundle(r#"{"ociVersion":"1.0.2"}"#).unwrap();

        assert_eq!(member.owner("def"), "abc");
        assert_eq!(sandbox.place, Place::Sandbox);
        assert_eq!(sandbox.owner("abc"), "abc");
        assert_eq!(alone.place, Place::Alone);
    }

    #[test]
    fn a_member_of_nothing_is_refused() {
        let refused = bundle(
            r#"{"ociVersion":"1.0.2","annotations":{
                "io.kubernetes.cri.container-type":"container"}}"#,
        );

        assert!(matches!(refused, Err(BundleError::NoSandbox(_))));
    }

    #[test]
    fn the_network_is_a_path_or_new_or_the_hosts() {
        let network = |namespaces: &str| {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{{"type":"pid"}}{namespaces}]}}}}"#
            );
            bundle(&json).unwrap().network()
        };

        assert_eq!(
            network(r#",{"type":"network","path":"/run/netns/x"}"#),
            Namespace::Path("/run/netns/x".into())
        );
        assert_eq!(network(r#",{"type":"network"}"#), Namespace::New);
        assert_eq!(network(""), Namespace::Host);
    }
}
