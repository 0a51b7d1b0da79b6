//! A `hull run` with its pods: shows how far they are and what they print, passes Ctrl-C on, and
//! says how they ended.

use std::sync::Arc;

use hull_pod::client::{Client, ClientError};
use hull_pod::logs::{self, Follow, LogOptions};
use hull_pod::state::{ContainerStatus, Phase, PodDir, PodRecord, PodStatus, Registry};
use hull_pod::text::chain;
use tokio::sync::mpsc;

use super::Args;
use crate::commands::logs::{label, reader_is_gone};
use crate::failure::{Failure, exit};
use crate::interrupts::{INTERRUPTED, Interrupts};
use crate::pods;
use crate::printer::{Printer, Style};
use crate::progress::Progress;

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
pub struct Attendance {
    pods: Vec<Attended>,
    interrupts: Interrupts,
    interrupted: u32,
    progress: Progress,
    news: mpsc::Receiver<News>,
    tell: mpsc::Sender<News>,
    detach: bool,
}

impl Attendance {
    pub fn new(clients: Vec<Client>, interrupts: Interrupts, args: &Args) -> Self {
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

    pub async fn attend(mut self, registry: &Registry, args: &Args) -> Result<(), Failure> {
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
                let label = label(&record, &container.name);
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
