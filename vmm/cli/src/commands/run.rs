//! `hull run`: the pods of a manifest, from start to end.

mod attendance;
mod networking;

use std::path::PathBuf;

use hull_pod::client::Client;
use hull_pod::images::{ImageError, Store};
use hull_pod::manifest::{self, PodManifest, RestartPolicy};
use hull_pod::networks::Networks;
use hull_pod::oci::{self, SpecError};
use hull_pod::state::{Claim, ContainerStatus, Liveness, Registry, StateError};
use hull_pod::supervisor::Installation;
use hull_pod::text::chain;
use hull_pod::volumes::{self, VolumeError};
use k8s_openapi::api::core::v1::Container;

use crate::Host;
use crate::commands::supervise::Order;
use crate::failure::Failure;
use crate::interrupts::Interrupts;
use crate::pods;
use attendance::Attendance;
use networking::{NetworkArgs, Networking};

/// Run the pods of a manifest
///
/// In the foreground: prints what the containers print, each line behind the names of pod and
/// container, until all of them have ended for good or Ctrl-C stops the pods (a second Ctrl-C
/// kills them). A pod that has ended stays listed (hull ps -a) until it is removed or its name is
/// run again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A file of Pods in YAML or JSON, or - for standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Return when every container has been started, and print the pods' names
    #[arg(short, long)]
    detach: bool,
    /// Stop running pods of the same names first
    #[arg(long)]
    replace: bool,
    /// Remove the pods, with their logs, when they have ended
    #[arg(long, conflicts_with = "detach")]
    rm: bool,
    /// When each line was printed
    #[arg(long, conflicts_with = "detach")]
    timestamps: bool,
    #[command(flatten)]
    networking: NetworkArgs,
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    // First everything that changes nothing.
    let manifests = manifest::load(&args.file)?;
    unique_names(&manifests)?;
    let registry = host.registry()?;
    let store = Store::open(host.directories.data())?;
    for manifest in &manifests {
        examine(manifest, &store)?;
    }
    Installation::find(&host.configuration()?)?;
    let networking = Networking::check(&args.networking, &manifests, host)?;

    pods::runtime()?.block_on(async {
        // From here on a Ctrl-C waits until it can be done right.
        let interrupts = Interrupts::new()?;
        let clients = start(host, &registry, &manifests, &networking, args.replace).await?;
        Attendance::new(clients, interrupts, &args)
            .attend(&registry, &args)
            .await
    })
}

fn unique_names(manifests: &[PodManifest]) -> Result<(), Failure> {
    for (n, manifest) in manifests.iter().enumerate() {
        if manifests[..n].iter().any(|m| m.name() == manifest.name()) {
            return Err(Failure::Input(format!(
                "{}: metadata.name: {:?} is there twice",
                manifest.source,
                manifest.name()
            )));
        }
    }
    Ok(())
}

/// Refuses what can be known before anything is started.
fn examine(manifest: &PodManifest, store: &Store) -> Result<(), Failure> {
    let lists = [
        ("initContainers", manifest.init_containers()),
        ("containers", manifest.containers()),
    ];
    for (list, containers) in lists {
        for (n, container) in containers.iter().enumerate() {
            let field = format!("spec.{list}[{n}]");
            let image = match store.resolve(container.image.as_deref().unwrap_or_default()) {
                Ok(image) => image,
                Err(error @ ImageError::NotFound(_)) => {
                    return Err(Failure::Input(format!(
                        "{}: {field}.image: {error}",
                        manifest.source
                    )));
                }
                Err(error) => return Err(error.into()),
            };
            match oci::container(manifest, container, &image, "") {
                Ok(_) => {}
                Err(SpecError::Refused(message)) => return Err(Failure::Input(message)),
                Err(error) => return Err(Failure::Failed(chain(&error))),
            }
        }
    }
    match volumes::check(manifest) {
        Ok(notices) => {
            for notice in notices {
                eprintln!("hull: {}", notice.0);
            }
            Ok(())
        }
        Err(VolumeError::Refused(message)) => Err(Failure::Input(message)),
        Err(error) => Err(Failure::Failed(chain(&error))),
    }
}

/// Claims every name, and then starts every supervisor. All or none.
async fn start(
    host: &Host,
    registry: &Registry,
    manifests: &[PodManifest],
    networking: &Networking,
    replace: bool,
) -> Result<Vec<Client>, Failure> {
    let networks = Networks::open(registry.directories())?;
    let mut claims: Vec<Claim> = Vec::new();
    for manifest in manifests {
        if replace
            && let Ok(record) = registry.find(manifest.name())
            && record.liveness == Liveness::Alive
        {
            pods::stop(&record, None).await?;
        }
        let claimed = claim(registry, manifest).map_err(Failure::from);
        let ready = claimed.and_then(|claim| {
            let reserved = networking.reserve(&networks, &claim, manifest);
            claims.push(claim);
            reserved
        });
        if let Err(failure) = ready {
            for claim in claims {
                registry.abandon(claim)?;
            }
            return Err(failure);
        }
    }

    let program = std::env::current_exe().map_err(|e| Failure::io("finding hull itself", e))?;
    let mut clients: Vec<Client> = Vec::new();
    let mut failure = None;
    for (claim, manifest) in claims.into_iter().zip(manifests) {
        if failure.is_some() {
            registry.abandon(claim)?;
            continue;
        }
        let order = Order {
            host: host.clone(),
            id: claim.dir.id().clone(),
        };
        match Client::start(
            claim,
            manifest,
            &program,
            order.arguments(),
            host.began,
            None,
        ) {
            Ok(client) => clients.push(client),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        None => Ok(clients),
        Some(error) => {
            for client in clients {
                client.stop(Some(0)).await?;
                client.ended().await;
            }
            Err(error.into())
        }
    }
}

fn claim(registry: &Registry, manifest: &PodManifest) -> Result<Claim, StateError> {
    let statuses = |containers: &[Container]| {
        containers
            .iter()
            .map(|c| ContainerStatus::new(&c.name, c.image.clone().unwrap_or_default()))
            .collect()
    };
    let policy = match manifest.restart_policy() {
        RestartPolicy::Always => "Always",
        RestartPolicy::OnFailure => "OnFailure",
        RestartPolicy::Never => "Never",
    };
    registry.claim(
        manifest.name(),
        policy,
        statuses(manifest.init_containers()),
        statuses(manifest.containers()),
        Some(manifest.source.clone()),
    )
}
