//! Making a template, by a process of its own beside the pods: what it takes is not the pod's that wants one, and it
//! doesn't end with that pod.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use hull_machine::config::NetLimits;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::boot::Recipe;
use super::console::Console;
use super::failure::PodFailure;
use crate::agent::{Agent, AgentError};
use crate::configuration::Configuration;
use crate::oci;
use crate::templates::{Kind, Policy, TemplateError, Templates, Unfinished};
use crate::text::chain;

/// What a program that supervises pods is called with to be a maker: [`make_ordered`].
pub const MAKE_TEMPLATE: &str = "make-template";

/// Of the console of a template's machine, when it doesn't come.
const CONSOLE_TAIL: usize = 20;
const CONSOLE_DRAIN: Duration = Duration::from_secs(1);
/// Pods go first.
const NICENESS: i32 = 10;
/// Bytes of an order, at most. It is written by the same program.
const ORDER_MAX: u64 = 1 << 16;

/// Where makers live: in the namespaces and the cgroup of who starts pods, which a pod's own processes leave.
#[derive(Debug)]
pub struct Maker {
    network: OwnedFd,
    mounts: OwnedFd,
    /// Of the cgroup. None: the host has no cgroups of version 2.
    processes: Option<File>,
}

impl Maker {
    /// As this thread lives.
    ///
    /// # Errors
    /// When the namespaces can't be opened.
    pub fn here() -> io::Result<Self> {
        let cgroup = std::fs::read_to_string("/proc/self/cgroup")?;
        let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
        let processes = path.and_then(|path| {
            let path = format!("/sys/fs/cgroup{path}/cgroup.procs");
            File::options().write(true).open(path).ok()
        });
        Ok(Self {
            network: File::open("/proc/thread-self/ns/net")?.into(),
            mounts: File::open("/proc/thread-self/ns/mnt")?.into(),
            processes,
        })
    }

    /// Has a template made. Nobody waits for it.
    ///
    /// # Errors
    /// When the process can't be started.
    fn start(&self, order: &Order, log: File) -> io::Result<()> {
        let (network, mounts) = (self.network.try_clone()?, self.mounts.try_clone()?);
        let processes = self.processes.as_ref().map(File::try_clone).transpose()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(MAKE_TEMPLATE)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log));
        let enter = move || {
            rustix::process::setsid()?;
            if let Some(mut processes) = processes.as_ref() {
                // The process that writes it.
                processes.write_all(b"0")?;
            }
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
            move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))?;
            Ok(())
        };
        // SAFETY: setsid, write and setns are async-signal-safe; they allocate nothing and touch no memory of ours.
        unsafe {
            command.pre_exec(enter);
        }
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            serde_json::to_writer(&stdin, order)?;
            stdin.flush()?;
        }
        tokio::task::spawn_blocking(move || child.wait());
        Ok(())
    }
}

/// The templates that a pod may begin with.
#[derive(Debug, Clone)]
pub struct Shelf {
    pub templates: Templates,
    /// See [`Kind::tenant`].
    pub tenant: String,
    data: PathBuf,
    maker: Arc<Maker>,
}

impl Shelf {
    /// Those of a tenant under the data directory. None: machines are not to begin with templates, or they can't, which
    /// is logged.
    ///
    /// # Errors
    /// When it isn't said right whether they are to.
    pub fn open(
        configuration: &Configuration,
        data: PathBuf,
        tenant: &str,
        maker: &Arc<Maker>,
    ) -> Result<Option<Self>, TemplateError> {
        let Some(tenant) = Policy::of(configuration)?.owner(tenant) else {
            return Ok(None);
        };
        match Templates::open(&data) {
            Ok(templates) => Ok(Some(Self {
                templates,
                tenant,
                data,
                maker: Arc::clone(maker),
            })),
            Err(error) => {
                tracing::warn!(error = chain(&error), "machines begin without templates");
                Ok(None)
            }
        }
    }

    /// A template that isn't there.
    #[must_use]
    pub(super) fn wanted(self, recipe: Recipe, kind: Kind) -> Wanted {
        Wanted {
            order: Order {
                data: self.data,
                tenant: self.tenant,
                recipe,
            },
            kind,
            templates: self.templates,
            maker: self.maker,
        }
    }
}

/// A template that there should be.
#[derive(Debug)]
pub struct Wanted {
    order: Order,
    kind: Kind,
    templates: Templates,
    maker: Arc<Maker>,
}

impl Wanted {
    /// Has it made, unless somebody else is at it, or it has come to nothing lately. What fails is logged.
    pub fn order(&self) {
        if self.templates.is_being_made(&self.kind) {
            return;
        }
        if let Some(failure) = self.templates.waits_after(&self.kind) {
            let (why, until) = (&failure.why, failure.until());
            tracing::info!(why, %until, "no template is made, since one came to nothing");
            return;
        }
        let started = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(self.templates.log(&self.kind))
            .and_then(|log| self.maker.start(&self.order, log));
        if let Err(error) = started {
            tracing::warn!(%error, "no template is made");
        }
    }
}

/// A template that is to be made, for machines of this recipe.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// Where templates are: [`Templates::open`].
    pub data: PathBuf,
    /// See [`Kind::tenant`].
    pub tenant: String,
    pub recipe: Recipe,
}

impl Order {
    /// Boots a machine without a pod, puts it aside once its agent has answered, and removes what no pod can begin with
    /// any more. The id of the template.
    ///
    /// # Errors
    /// When the machine doesn't come so far, or can't be written, which is remembered; when somebody else is at it.
    pub async fn make(self) -> Result<String, PodFailure> {
        let templates = Templates::open(&self.data)?;
        let kind = self.recipe.kind(self.tenant)?;
        let unfinished = templates.begin(kind.clone())?;
        if let Err(error) = self.recipe.put_aside(unfinished).await {
            templates.note_failure(&kind, &chain(&error));
            return Err(error);
        }
        let _ = std::fs::remove_file(templates.log(&kind));
        templates.tidy()?;
        Ok(kind.id())
    }
}

impl Recipe {
    async fn put_aside(mut self, unfinished: Unfinished) -> Result<(), PodFailure> {
        let directory = unfinished.directory();
        let share = directory.join("share");
        let console_log = directory.join("console.log");
        let empty = std::fs::create_dir(&share)
            .and_then(|()| File::open(&share))
            .map_err(|source| PodFailure::Open {
                path: share.display().to_string(),
                source,
            })?;
        let (mut console, pipe) = Console::open(&console_log)?;
        for net in &mut self.nets {
            // A pod's own come with its interfaces.
            net.limits = NetLimits::default();
        }
        let made = async {
            let launched = self.boot(pipe, empty.as_fd()).await?;
            // A clone runs as many processors as it needs.
            let (guest, _) = launched.meet_with(0).await?;
            get_ready(guest.agent()).await?;
            guest.machine().snapshot(unfinished.files()?).await?;
            guest.machine().kill();
            guest.machine().wait().await;
            Ok::<_, PodFailure>(())
        }
        .await;
        if let Err(error) = made {
            console.drain(CONSOLE_DRAIN).await;
            for line in console.tail(CONSOLE_TAIL) {
                tracing::warn!(line, "the console of a template's machine");
            }
            return Err(error);
        }
        // What fails is in the way of nobody.
        let _ = std::fs::remove_dir(&share);
        let _ = std::fs::remove_file(&console_log);
        Ok(unfinished.finish()?)
    }
}

/// Has the guest do what its clones would each have to.
async fn get_ready(agent: &Agent) -> Result<(), PodFailure> {
    // Without, its clones are as good, and slower.
    let unready = |error: &dyn std::error::Error| {
        tracing::warn!(
            error = chain(error),
            "a template is less ready than it could be"
        );
    };
    match oci::usual() {
        Ok(usual) => match agent.get_ready(&usual).await {
            // As from an agent that doesn't know how.
            Err(error @ AgentError::Refused { .. }) => unready(&error),
            ready => ready?,
        },
        Err(error) => unready(&error),
    }
    Ok(())
}

/// Makes the template that standard input tells of, and says on standard error why it can't.
///
/// # Errors
/// When there is none.
pub fn make_ordered() -> Result<(), PodFailure> {
    let read = || -> io::Result<Order> {
        let mut order = Vec::new();
        io::stdin().take(ORDER_MAX).read_to_end(&mut order)?;
        Ok(serde_json::from_slice(&order)?)
    };
    let order = read().map_err(|source| PodFailure::Open {
        path: format!("the order on standard input ({MAKE_TEMPLATE} is started by Hull itself)"),
        source,
    })?;
    // Who may not be nicer is as important as pods are.
    let _ = rustix::process::nice(NICENESS);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| PodFailure::Open {
            path: "a runtime for tasks".into(),
            source,
        })?;
    match runtime.block_on(order.make()) {
        Err(PodFailure::Template(TemplateError::BeingMade(_))) | Ok(_) => Ok(()),
        Err(error) => Err(error),
    }
}
