//! `hull snapshot` and `hull restore`: pods that are put aside in a directory, and go on from there.

use std::path::{Path, PathBuf};

use hull_pod::client::Client;
use hull_pod::images::{ImageError, Store};
use hull_pod::networks::{Netavark, Networks, Publication};
use hull_pod::snapshots::{Contents, Snapshot, Unfinished};
use hull_pod::state::{Claim, Liveness, Phase, PodRecord, PodStatus, Registry};
use hull_pod::supervisor::Installation;
use hull_pod::text::chain;
use hull_pod::volumes::{self, VolumeError};

use crate::Host;
use crate::commands::supervise::Order;
use crate::failure::Failure;
use crate::interrupts::{INTERRUPTED, Interrupts};
use crate::pods;

/// Put a running pod aside in a directory, from which hull restore lets it go on
///
/// The pod stands still meanwhile, and goes on after that. In the directory are the machine's memory, with all secrets
/// in it, what the containers have written into their root file systems and emptyDir volumes, and their logs; not what is
/// in hostPath volumes, and no images. Ctrl-C gives it up: the pod goes on, and nothing is left in the directory.
#[derive(Debug, clap::Args)]
pub struct SnapshotArgs {
    /// Name or id
    #[arg(value_name = "POD")]
    pod: String,
    /// A directory that is empty or doesn't exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Let a pod go on that hull snapshot has put aside, and print its name
///
/// It is a new pod of the same name, unless --name gives another, with an address of its own: connections have ended,
/// and all else goes on. The ports of the host that it had are its again, and must be free; --publish gives others. One
/// snapshot can be restored any number of times. While such pods run, the directory may be removed, but not changed.
#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Another name than the pod had; its hostname stays
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Make a port of the pod the host's, and none of those that it had: [IP:]HOST:CONTAINER[/tcp|udp]
    #[arg(short, long, value_name = "PORTS")]
    publish: Vec<Publication>,
}

pub fn snapshot(host: &Host, args: &SnapshotArgs) -> Result<(), Failure> {
    let record = host.registry()?.find(&args.pod)?;
    if record.liveness == Liveness::Dead {
        return Err(Failure::Failed(format!(
            "pod {} is not running",
            record.status.name
        )));
    }
    pods::runtime()?.block_on(async {
        let mut interrupts = Interrupts::new()?;
        tokio::select! {
            taken = take(&record, &args.directory) => taken,
            () = interrupts.next() => {
                eprintln!("hull: interrupted; the pod goes on, and nothing is left of its snapshot");
                Err(Failure::Exit(INTERRUPTED))
            }
        }
    })
}

/// Dropped, it leaves nothing.
async fn take(record: &PodRecord, directory: &Path) -> Result<(), Failure> {
    let unfinished = Unfinished::begin(directory)?;
    let files = unfinished.files()?;
    Client::connect(&record.dir)?.snapshot(&files).await?;
    drop(files);
    Ok(unfinished.finish().await?)
}

pub fn restore(host: &Host, args: RestoreArgs) -> Result<(), Failure> {
    let mut snapshot = Snapshot::open(&args.directory)?;
    if let Some(name) = &args.name {
        let manifest = snapshot.contents.manifest.clone();
        snapshot.contents.manifest = manifest
            .renamed(name)
            .map_err(|why| Failure::Input(format!("--name: {why}")))?;
    }
    publish(&mut snapshot.contents, args.publish)?;
    examine(host, &args.directory, &snapshot)?;
    let registry = host.registry()?;
    pods::runtime()?.block_on(async {
        let client = start(host, &registry, snapshot)?;
        goes_on(&client).await
    })
}

/// Gives a pod other ports of the host than it had, if there are any.
fn publish(contents: &mut Contents, ports: Vec<Publication>) -> Result<(), Failure> {
    match ports.first() {
        Some(port) if contents.networks.is_empty() => Err(Failure::Input(format!(
            "--publish {port}: the pod has no network"
        ))),
        Some(_) => {
            contents.ports = ports;
            Ok(())
        }
        None => Ok(()),
    }
}

/// Refuses what can be known before anything is started.
fn examine(host: &Host, directory: &Path, snapshot: &Snapshot) -> Result<(), Failure> {
    Installation::find(&host.configuration()?)?;
    let contents = &snapshot.contents;
    let store = Store::open(host.directories.data())?;
    for (id, name) in contents.images() {
        match store.resolve(&id) {
            Ok(_) => {}
            Err(ImageError::NotFound(_)) => {
                return Err(Failure::Failed(format!(
                    "{}: its containers run image {name} ({id}), which is not on this host; hull load it first",
                    directory.display()
                )));
            }
            Err(error) => return Err(error.into()),
        }
    }
    match volumes::check(&contents.manifest) {
        Ok(_) => {}
        Err(VolumeError::Refused(message)) => return Err(Failure::Failed(message)),
        Err(error) => return Err(Failure::Failed(chain(&error))),
    }
    if !contents.networks.is_empty() {
        Netavark::find(&host.directories, host.limits().call)?;
    }
    Ok(())
}

/// Claims the name, and starts the supervisor.
fn start(host: &Host, registry: &Registry, snapshot: Snapshot) -> Result<Client, Failure> {
    let manifest = snapshot.contents.manifest.clone();
    let (choice, ports) = (snapshot.contents.choice(), snapshot.contents.asked());
    let status = &snapshot.contents.status;
    let mut claim = registry.claim(
        manifest.name(),
        &status.restart_policy,
        status.init_containers.clone(),
        status.containers.clone(),
        status.manifest.clone(),
    )?;
    let ready = |claim: &mut Claim| {
        let networks = Networks::open(registry.directories())?;
        networks.reserve(&claim.dir, &manifest, &choice, &ports)?;
        Ok::<_, Failure>(snapshot.restore(claim)?)
    };
    let restored = match ready(&mut claim) {
        Ok(restored) => restored,
        Err(failure) => {
            registry.abandon(claim)?;
            return Err(failure);
        }
    };
    let program = std::env::current_exe().map_err(|e| Failure::io("finding hull itself", e))?;
    let order = Order {
        host: host.clone(),
        id: claim.dir.id().clone(),
    };
    Ok(Client::start(
        claim,
        &manifest,
        &program,
        order.arguments(),
        host.began,
        Some(&restored),
    )?)
}

/// Waits until the pod goes on, and prints its name.
async fn goes_on(client: &Client) -> Result<(), Failure> {
    client.follow().await?;
    let mut last: Option<PodStatus> = None;
    while let Some(status) = client.changed().await? {
        if status.phase == Phase::Running {
            println!("{}", status.name);
            return Ok(());
        }
        last = Some(status);
    }
    let why = last.and_then(|status| status.message);
    Err(Failure::Failed(format!(
        "the pod did not go on: {}",
        why.unwrap_or_else(|| "its supervisor has ended; see supervisor.log of the pod".into())
    )))
}
