//! `hull run`: the pods of a manifest, from start to end.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use hull_pod::client::{Client, ClientError};
use hull_pod::images::{ImageError, Store};
use hull_pod::logs::{self, Follow, LogOptions};
use hull_pod::manifest::{self, PodManifest, RestartPolicy};
use hull_pod::oci::{self, SpecError};
use hull_pod::state::{
    Claim, ContainerStatus, Liveness, Phase, PodDir, PodRecord, PodStatus, Registry, StateError,
};
use hull_pod::supervisor::Installation;
use hull_pod::text::chain;
use hull_pod::volumes::{self, VolumeError};
use k8s_openapi::api::core::v1::Container;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::logs::reader_is_gone;
use crate::Host;
use crate::failure::{Failure, exit};
use crate::pods;
use crate::printer::{Printer, Style};
use crate::progress::Progress;

/// As a shell says that Ctrl-C ended it.
const INTERRUPTED: u8 = 130;

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
    Installation::find()?;

    pods::runtime()?.block_on(async {
        // From here on a Ctrl-C waits until it can be done right.
        let interrupts = Interrupts::new()?;
        let clients = start(&registry, &manifests, args.replace).await?;
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
    registry: &Registry,
    manifests: &[PodManifest],
    replace: bool,
) -> Result<Vec<Client>, Failure> {
    let mut claims: Vec<Claim> = Vec::new();
    for manifest in manifests {
        if replace
            && let Ok(record) = registry.find(manifest.name())
            && record.liveness == Liveness::Alive
        {
            pods::stop(&record, None).await?;
        }
        match claim(registry, manifest) {
            Ok(claim) => claims.push(claim),
            Err(error) => {
                for claim in claims {
                    registry.abandon(claim)?;
                }
                return Err(error.into());
            }
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
        let args = supervisor_args(registry, &claim.dir);
        match Client::start(claim, manifest, &program, args) {
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

fn supervisor_args(registry: &Registry, dir: &PodDir) -> Vec<OsString> {
    let directories = registry.directories();
    vec![
        "--run-dir".into(),
        directories.run().into(),
        "--data-dir".into(),
        directories.data().into(),
        "supervise".into(),
        dir.id().as_str().into(),
    ]
}

/// Whatever asks a foreground command to end.
struct Interrupts([Signal; 3]);

impl Interrupts {
    fn new() -> Result<Self, Failure> {
        let watch = |kind| signal(kind).map_err(|e| Failure::io("watching signals", e));
        Ok(Self([
            watch(SignalKind::interrupt())?,
            watch(SignalKind::terminate())?,
            watch(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// What the attendant hears.
enum News {
    Pod(usize, Box<PodStatus>),
    /// Its supervisor has ended.
    Ended(usize),
    Broken(ClientError),
    /// Nobody reads what we print.
    ReaderGone,
}

/// One pod of this command.
struct Attended {
    client: Arc<Client>,
    status: Option<Box<PodStatus>>,
    ended: bool,
    /// It was done by itself, and we have asked for its end.
    dismissed: bool,
}

impl Attended {
    fn is_up(&self) -> bool {
        self.ended
            || self
                .status
                .as_ref()
                .is_some_and(|s| s.started_at.is_some() || s.phase.ended())
    }
}

/// A foreground command with its pods.
struct Attendance {
    pods: Vec<Attended>,
    interrupts: Interrupts,
    interrupted: u32,
    progress: Progress,
    news: mpsc::Receiver<News>,
    tell: mpsc::Sender<News>,
    detach: bool,
}

impl Attendance {
    fn new(clients: Vec<Client>, interrupts: Interrupts, args: &Args) -> Self {
        let (tell, news) = mpsc::channel(64);
        let pods = clients
            .into_iter()
            .map(|client| Attended {
                client: Arc::new(client),
                status: None,
                ended: false,
                dismissed: false,
            })
            .collect();
        Self {
            pods,
            interrupts,
            interrupted: 0,
            progress: Progress::new(),
            news,
            tell,
            detach: args.detach,
        }
    }

    async fn attend(mut self, registry: &Registry, args: &Args) -> Result<(), Failure> {
        for (n, pod) in self.pods.iter().enumerate() {
            tokio::spawn(listen(n, Arc::clone(&pod.client), self.tell.clone()));
        }
        let printers = if args.detach {
            Vec::new()
        } else {
            self.print_logs(args.timestamps)?
        };

        while !self.is_done() {
            let Self {
                interrupts, news, ..
            } = &mut self;
            tokio::select! {
                () = interrupts.next() => self.interrupt().await?,
                Some(news) = news.recv() => self.hear(news).await?,
            }
        }
        self.progress.finish();
        // They end by themselves when they have printed all.
        for printer in printers {
            let _ = tokio::task::spawn_blocking(|| printer.join()).await;
        }
        self.conclude(registry, args)
    }

    fn is_done(&self) -> bool {
        if self.detach && self.interrupted == 0 {
            self.pods.iter().all(Attended::is_up)
        } else {
            self.pods.iter().all(|pod| pod.ended)
        }
    }

    async fn hear(&mut self, news: News) -> Result<(), Failure> {
        match news {
            News::Pod(n, status) => {
                if status.phase == Phase::Pending
                    && let Some(message) = &status.message
                {
                    self.progress.say(&format!("{}: {message}", status.name));
                }
                if self.pods.iter().all(Attended::is_up) {
                    self.progress.finish();
                }
                let pod = &mut self.pods[n];
                let dismiss = status.completed && !pod.dismissed && !self.detach;
                pod.status = Some(status);
                if dismiss {
                    pod.dismissed = true;
                    pod.client.stop(None).await?;
                }
            }
            News::Ended(n) => {
                let pod = &mut self.pods[n];
                pod.ended = true;
                if let Ok(record) = PodRecord::read(pod.client.dir()) {
                    pod.status = Some(Box::new(record.status));
                }
            }
            // Every printer says so, and the user may have been first.
            News::ReaderGone if self.interrupted == 0 => self.interrupt().await?,
            News::ReaderGone => {}
            News::Broken(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// First in order, then at once.
    async fn interrupt(&mut self) -> Result<(), Failure> {
        self.interrupted += 1;
        let grace = match self.interrupted {
            1 => {
                self.progress
                    .bar()
                    .suspend(|| eprintln!("hull: stopping; Ctrl-C again to kill"));
                None
            }
            2 => Some(0),
            _ => return Err(Failure::Exit(INTERRUPTED)),
        };
        for pod in &self.pods {
            pod.client.stop(grace).await?;
        }
        Ok(())
    }

    /// A thread for each container.
    fn print_logs(&self, timestamps: bool) -> Result<Vec<std::thread::JoinHandle<()>>, Failure> {
        let mut wanted = Vec::new();
        for pod in &self.pods {
            let record = PodRecord::read(pod.client.dir())?;
            for container in record.status.all_containers() {
                let label = super::logs::label(&record, &container.name);
                wanted.push((record.dir.clone(), container.name.clone(), label));
            }
        }
        let labels: Vec<String> = wanted.iter().map(|w| w.2.clone()).collect();
        let style = Style {
            prefix: true,
            timestamps,
        };
        let printer = Arc::new(Printer::new(style, &labels, self.progress.bar()));
        let options = LogOptions {
            from_first: true,
            ..LogOptions::default()
        };
        let start = |(dir, container, label): (PodDir, String, String)| {
            let (printer, tell) = (Arc::clone(&printer), self.tell.clone());
            std::thread::Builder::new()
                .name("print".into())
                .spawn(move || {
                    let each = |line| follow_if(printer.print(&label, line).is_ok());
                    let idle = || follow_if(!reader_is_gone());
                    let followed = logs::follow(&dir, &container, options, each, idle);
                    if let Err(error) = followed {
                        eprintln!("hull: {label}: {}", chain(&error));
                    }
                    if printer.finish(&label).is_err() || reader_is_gone() {
                        // The attendant may be gone as well.
                        let _ = tell.blocking_send(News::ReaderGone);
                    }
                })
                .map_err(|e| Failure::io("starting a thread", e))
        };
        wanted.into_iter().map(start).collect()
    }

    /// Says how it went, and gives the exit code.
    fn conclude(self, registry: &Registry, args: &Args) -> Result<(), Failure> {
        let mut code = 0;
        for pod in &self.pods {
            let Some(status) = &pod.status else {
                eprintln!("hull: the pod's state is gone");
                code = 1;
                continue;
            };
            report(status);
            if status.reason.as_deref() == Some("SupervisorDied") {
                eprintln!("hull: its last words: {}", last_line(pod.client.dir()));
            }
            let pods_code = if self.detach {
                i32::from(status.phase.ended() || has_start_error(status))
            } else {
                status.exit_code()
            };
            if code == 0 {
                code = pods_code;
            }
            if self.detach && !status.phase.ended() && self.interrupted == 0 {
                println!("{}", status.name);
            }
        }
        if args.rm {
            for pod in &self.pods {
                let record = PodRecord::read(pod.client.dir())?;
                pods::wait_for_death(&record)?;
                registry.remove(&record)?;
            }
        }
        match self.interrupted {
            0 => exit(code),
            _ => Err(Failure::Exit(INTERRUPTED)),
        }
    }
}

fn follow_if(go_on: bool) -> Follow {
    if go_on { Follow::On } else { Follow::Stop }
}

/// Passes on what a pod's supervisor says.
async fn listen(n: usize, client: Arc<Client>, tell: mpsc::Sender<News>) {
    let mut heard = client.follow().await;
    while heard.is_ok() {
        let news = match client.changed().await {
            Ok(Some(status)) => News::Pod(n, Box::new(status)),
            Ok(None) => {
                client.ended().await;
                let _ = tell.send(News::Ended(n)).await;
                return;
            }
            Err(error) => {
                heard = Err(error);
                break;
            }
        };
        if tell.send(news).await.is_err() {
            return;
        }
    }
    if let Err(error) = heard {
        let _ = tell.send(News::Broken(error)).await;
    }
}

/// What went wrong, on standard error.
fn report(status: &PodStatus) {
    for container in status.all_containers() {
        if let Some(end) = container.terminated()
            && end.reason == "StartError"
        {
            eprintln!(
                "hull: {}/{}: not started: {}",
                status.name,
                container.name,
                end.message.as_deref().unwrap_or_default()
            );
        }
    }
    let failed = status.phase == Phase::Failed;
    if let Some(message) = &status.message
        && failed
        && status.reason.as_deref() != Some("Stopped")
    {
        eprintln!("hull: pod {}: {message}", status.name);
        if !status.console_tail.is_empty() {
            eprintln!("The end of the guest's console:");
        }
        for line in &status.console_tail {
            eprintln!("    {line}");
        }
    }
}

fn has_start_error(status: &PodStatus) -> bool {
    status
        .all_containers()
        .filter_map(ContainerStatus::terminated)
        .any(|end| end.reason == "StartError")
}

/// Of what a supervisor has written.
fn last_line(dir: &PodDir) -> String {
    std::fs::read_to_string(dir.supervisor_log())
        .ok()
        .and_then(|text| text.lines().next_back().map(str::to_owned))
        .unwrap_or_else(|| "it has left no word".into())
}
