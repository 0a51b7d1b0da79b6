//! Whose processes a pod's containers see.
//!
//! containerd names a PID namespace by the path of a task's: `/proc/PID/ns/pid`. All of a pod's tasks have one pid, the
//! shim's, so a path says that a container is to see others, and not whose. There are two such modes of CRI: POD, which
//! all containers of a pod have (`shareProcessNamespace`), and TARGET, which a container has that comes later to look at
//! another (`kubectl debug --target`). So what the pod's containers before it have tells which one it is.

use std::collections::BTreeSet;

use hull_pod::oci::Pids;

use crate::bundle::{Bundle, Namespace, Place};
use crate::failure::TaskError;

/// What the pod's containers have.
#[derive(Debug, Default)]
pub struct Sharing {
    /// The pod has one PID namespace, and this is known.
    shared: bool,
    /// The containers that have one of their own, by name.
    own: BTreeSet<String>,
}

impl Sharing {
    /// Whose processes a new container sees.
    ///
    /// # Errors
    /// When they are the host's or another pod's, or when it can't be told whose they are.
    pub fn place(&mut self, name: &str, bundle: &Bundle) -> Result<Pids, TaskError> {
        check(bundle)?;
        if !matches!(bundle.processes(), Namespace::Path(_)) {
            self.own.insert(name.to_owned());
            return Ok(Pids::Own);
        }
        let mut own = self.own.iter();
        match (self.shared, own.next(), own.next()) {
            (true, ..) | (false, None, _) => {
                self.shared = true;
                Ok(Pids::Pod)
            }
            (false, Some(one), None) => Ok(Pids::Of(one.clone())),
            (false, ..) => Err(TaskError::Unsupported(format!(
                "a container is to see another's processes, and containerd can't say which of the pod's {} it is; \
                 without a target (kubectl debug without --target) it runs",
                self.own.len()
            ))),
        }
    }

    /// A container is gone.
    pub fn forget(&mut self, name: &str) {
        self.own.remove(name);
    }
}

/// Whether what a container asks for can be had, before there is a machine.
///
/// # Errors
/// When the processes that it is to see are the host's or another pod's.
pub fn check(bundle: &Bundle) -> Result<(), TaskError> {
    match (bundle.processes(), &bundle.place) {
        (Namespace::Host, _) => Err(TaskError::Unsupported(
            "the host's processes can't be seen from a machine; a pod of Hull has a PID namespace of its own (no \
             hostPID, no --pid=host)"
                .into(),
        )),
        (Namespace::Path(path), Place::Alone) => Err(TaskError::Unsupported(format!(
            "the processes of {} are not those of this container's machine, and can't be seen",
            path.display()
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(place: Place, namespace: &str) -> Bundle {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{{"type":"mount"}}{namespace}]}}}}"#
        );
        Bundle {
            path: "/b".into(),
            spec: serde_json::from_str(&json).unwrap(),
            place,
        }
    }

    fn member(namespace: &str) -> Bundle {
        let sandbox = "pod".into();
        bundle(Place::Member { sandbox }, namespace)
    }

    const OWN: &str = r#",{"type":"pid"}"#;
    const JOINS: &str = r#",{"type":"pid","path":"/proc/7/ns/pid"}"#;

    #[test]
    fn containers_of_a_pod_that_shares_see_the_pods() {
        let mut sharing = Sharing::default();

        assert_eq!(sharing.place("a", &member(JOINS)).unwrap(), Pids::Pod);
        sharing.forget("a");
        assert_eq!(sharing.place("b", &member(OWN)).unwrap(), Pids::Own);
        assert_eq!(sharing.place("c", &member(JOINS)).unwrap(), Pids::Pod);
    }

    #[test]
    fn a_container_that_comes_later_sees_the_only_one_there_is() {
        let mut sharing = Sharing::default();
        sharing.place("init", &member(OWN)).unwrap();
        sharing.forget("init");
        sharing.place("web", &member(OWN)).unwrap();

        let debug = Pids::Of("web".into());
        assert_eq!(sharing.place("d1", &member(JOINS)).unwrap(), debug);
        assert_eq!(sharing.place("d2", &member(JOINS)).unwrap(), debug);
        sharing.place("sidecar", &member(OWN)).unwrap();
        let error = sharing.place("d3", &member(JOINS)).unwrap_err();
        assert!(
            error.to_string().contains("which of the pod's 2"),
            "{error}"
        );
    }

    #[test]
    fn what_is_outside_the_machine_is_refused() {
        let mut sharing = Sharing::default();

        assert!(sharing.place("a", &member("")).is_err());
        assert!(sharing.place("a", &bundle(Place::Alone, JOINS)).is_err());
        let alone = bundle(Place::Alone, OWN);
        assert_eq!(sharing.place("a", &alone).unwrap(), Pids::Own);
    }
}
