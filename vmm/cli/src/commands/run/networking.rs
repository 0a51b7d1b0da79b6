//! Which networks the pods get, and which of their ports are the host's.

use hull_pod::manifest::PodManifest;
use hull_pod::networks::{Asked, Choice, DEFAULT_NETWORK, Netavark, Networks, Publication};
use hull_pod::state::Claim;
use rustix::fs::statfs;

use crate::Host;
use crate::failure::Failure;

/// `f_type` of a namespace's file (statfs(2)).
const NSFS_MAGIC: i64 = 0x6e73_6673;

#[derive(Debug, clap::Args)]
pub struct NetworkArgs {
    /// A network for the pods, repeatedly for several: a name (hull network ls), none, or ns: and the
    /// path of a network namespace that is set up already [default: hull]
    #[arg(long = "network", value_name = "NETWORK")]
    networks: Vec<String>,
    /// Make a port of the pod the host's, as hostPort does: [IP:]HOST:CONTAINER[/tcp|udp]
    #[arg(short, long, value_name = "PORTS")]
    publish: Vec<Publication>,
}

/// What the pods of a manifest are to have; checked, as far as it can be without changing anything.
#[derive(Debug)]
pub struct Networking {
    choice: Choice,
    publish: Vec<Publication>,
}

impl Networking {
    pub fn check(
        args: &NetworkArgs,
        manifests: &[PodManifest],
        host: &Host,
    ) -> Result<Self, Failure> {
        let networking = Self {
            choice: Choice::parse(&args.networks).map_err(Failure::Input)?,
            publish: args.publish.clone(),
        };
        if let (Some(port), [first, _, ..]) = (args.publish.first(), manifests) {
            return Err(Failure::Input(format!(
                "--publish {port}: {} has several pods; set hostPort in it instead",
                first.source
            )));
        }
        let without_ports = match &networking.choice {
            Choice::None => Some("the pod has no network (--network none)"),
            Choice::Namespace(_) => Some(
                "the pod's network is somebody else's (--network ns:), who has to publish its ports",
            ),
            Choice::Named(_) => None,
        };
        let mut asked = manifests.iter().flat_map(|m| networking.ports(m));
        if let (Some(why), Some(port)) = (without_ports, asked.next()) {
            return Err(Failure::Input(format!("{}: {why}", port.origin)));
        }
        match &networking.choice {
            Choice::None => {}
            Choice::Namespace(path) => {
                let is_namespace = statfs(path)
                    .map_err(|e| Failure::Input(format!("--network ns:{}: {e}", path.display())))?
                    .f_type
                    == NSFS_MAGIC;
                if !is_namespace {
                    return Err(Failure::Input(format!(
                        "--network ns:{}: is not a network namespace",
                        path.display()
                    )));
                }
            }
            Choice::Named(names) => {
                let known = Networks::open(&host.directories)?;
                // The default one is made at its first use.
                for name in names.iter().filter(|name| *name != DEFAULT_NETWORK) {
                    known.find(name)?;
                }
                Netavark::find(&host.directories, host.limits().call)?;
            }
        }
        Ok(networking)
    }

    /// Gives a claimed pod its addresses and ports.
    pub fn reserve(
        &self,
        networks: &Networks,
        claim: &Claim,
        manifest: &PodManifest,
    ) -> Result<(), Failure> {
        let ports = self.ports(manifest);
        networks.reserve(&claim.dir, manifest, &self.choice, &ports)?;
        Ok(())
    }

    fn ports(&self, manifest: &PodManifest) -> Vec<Asked> {
        let flags = self.publish.iter().cloned().map(Asked::by_flag);
        Asked::of_manifest(manifest)
            .into_iter()
            .chain(flags)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_pod::manifest;
    use hull_pod::state::Directories;

    fn check(networks: &[&str], publish: &[&str], manifest: &str) -> String {
        let args = NetworkArgs {
            networks: networks.iter().map(|n| (*n).to_owned()).collect(),
            publish: publish.iter().map(|p| p.parse().unwrap()).collect(),
        };
        let manifests = manifest::parse("p.yaml", manifest).unwrap();
        let host = Host {
            directories: Directories::new("/nonexistent/run", "/nonexistent/data"),
            configuration: None,
            began: 0,
        };
        match Networking::check(&args, &manifests, &host) {
            Err(Failure::Input(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    fn pod(name: &str, port: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: [{{name: a, image: b, ports: [{{containerPort: 80{port}}}]}}]}}}}\n"
        )
    }

    #[test]
    fn ports_need_a_network_of_hulls() {
        let published = pod("web", ", hostPort: 8080");

        assert_eq!(
            check(&["none"], &[], &published),
            "p.yaml: spec.containers[0].ports[0].hostPort: 8080: the pod has no network (--network none)"
        );
        assert!(
            check(&["ns:/proc/self/ns/net"], &["8080:80"], &pod("web", ""))
                .starts_with("--publish 8080:80/tcp: the pod's network is somebody else's")
        );
    }

    #[test]
    fn a_flag_publishes_for_one_pod() {
        let two = format!("{}---\n{}", pod("a", ""), pod("b", ""));

        assert!(
            check(&[], &["8080:80"], &two)
                .starts_with("--publish 8080:80/tcp: p.yaml has several pods")
        );
    }

    #[test]
    fn a_namespace_must_be_one() {
        let plain = pod("web", "");

        assert!(check(&["ns:/dev/null"], &[], &plain).ends_with("is not a network namespace"));
        assert!(
            check(&["ns:/nonexistent"], &[], &plain).starts_with("--network ns:/nonexistent: ")
        );
    }
}
