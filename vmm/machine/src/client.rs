//! The supervisor's side of a machine: starts `hull-vmm`, talks to it, sees it end.
//!
//! `hull-vmm` is hostile from the guest's first instruction on. What it says is
//! bounded and checked; what it is (alive, dead, and how) is asked of the kernel.
//!
//! The jailed process is a child of the calling process: nobody there may wait for
//! "any child".

mod accessed;
mod answers;
mod spec;

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};

use self::answers::{Answers, Pending};
pub use self::spec::{MachineSpec, NetSpec, SnapshotFiles};
use crate::channel::{self, AsyncChannel, Channel, ChannelError};
use crate::config::TapDescriptors;
use crate::control::{
    AddedMemory, ConnectRefused, DiskRefused, Event, ExitReason, MemoryRefused, PlugRefused,
    Request, SnapshotRefused,
};
use crate::memory::working_set::WorkingSet;
use crate::steps::Started;
use crate::warnings::WARNING_CHARS;

/// Guest connections that wait for the supervisor; more are closed at once.
const WAITING_CONNECTIONS: usize = 64;
/// Longest reason taken from `hull-vmm`, in characters.
const REASON_CHARS: usize = 2000;
/// Steps of its start that are taken from `hull-vmm`, and the longest name of one, in characters.
const STEPS: usize = 32;
const STEP_CHARS: usize = 40;
/// Warnings that a machine gets into the log in all its life: a guest can cause as many as it likes.
const WARNINGS: u32 = 1000;

/// A connection that the guest made.
#[derive(Debug)]
pub struct GuestConnection {
    /// The host's port, one of [`crate::config::VsockConfig::guest_ports`].
    pub port: u32,
    pub stream: UnixStream,
}

/// Why a machine does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("making the control socket of hull-vmm")]
    Control(#[source] io::Error),
    #[error("starting {binary:?}")]
    Start {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("handing the machine over to hull-vmm")]
    Channel(#[from] ChannelError),
    #[error("hull-vmm ended before it was jailed ({0})")]
    Launcher(ExitStatus),
    #[error("hull-vmm said something else than that it is jailed: {0}")]
    Unexpected(String),
    #[error("the machine did not start")]
    Ended(#[source] ExitReason),
}

/// Why there is no connection to the guest.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("port {port} of the guest")]
    Refused {
        port: u32,
        #[source]
        source: ConnectRefused,
    },
    #[error("making a connection to the guest")]
    Socket(#[source] io::Error),
    #[error("asking hull-vmm for a connection")]
    Channel(#[from] ChannelError),
    #[error("the machine has ended")]
    Ended(#[source] ExitReason),
}

/// Why a network interface has no tap.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    #[error("network interface {index}")]
    Refused {
        index: u8,
        #[source]
        source: PlugRefused,
    },
    #[error("handing a tap over to hull-vmm")]
    Channel(#[from] ChannelError),
    #[error("the machine has ended")]
    Ended(#[source] ExitReason),
}

/// Why a disk is not changed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("disk {index} of the machine")]
    Refused {
        index: u8,
        #[source]
        source: DiskRefused,
    },
    #[error(transparent)]
    Asking(#[from] AskError),
}

/// Why memory is not added, or it is not known how much is.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("changing the machine's memory")]
    Refused(#[source] MemoryRefused),
    #[error(transparent)]
    Asking(#[from] AskError),
}

/// Why a machine is not put aside.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("putting the machine aside")]
    Refused(#[source] SnapshotRefused),
    #[error(transparent)]
    Asking(#[from] AskError),
}

/// Why `hull-vmm` didn't do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("asking hull-vmm")]
    Channel(#[from] ChannelError),
    #[error("the machine has ended")]
    Ended(#[source] ExitReason),
}

impl From<AskError> for ConnectError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Channel(error) => Self::Channel(error),
            AskError::Ended(reason) => Self::Ended(reason),
        }
    }
}

impl From<AskError> for PlugError {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Channel(error) => Self::Channel(error),
            AskError::Ended(reason) => Self::Ended(reason),
        }
    }
}

/// A running machine. Dropping it kills the machine.
#[derive(Debug)]
pub struct Machine {
    pid: i32,
    started: Started,
    control: Arc<AsyncChannel>,
    process: Arc<AsyncFd<OwnedFd>>,
    connects: Arc<Answers<ConnectRefused>>,
    plugs: Arc<Answers<PlugRefused>>,
    disks: Arc<Answers<DiskRefused>>,
    memory: Arc<Answers<MemoryRefused, AddedMemory>>,
    pauses: Arc<Answers<Infallible>>,
    snapshots: Arc<Answers<SnapshotRefused>>,
    ended: watch::Receiver<Option<ExitReason>>,
}

impl Machine {
    /// Starts `hull-vmm` and returns when the guest is about to run, with the
    /// connections that the guest will make.
    ///
    /// Needs a tokio runtime with I/O, which must go on running for as long as the machine is used.
    ///
    /// # Errors
    /// When the machine can't be made; nothing is left of it then.
    pub async fn launch(
        vmm_binary: &Path,
        spec: MachineSpec,
    ) -> Result<(Self, mpsc::Receiver<GuestConnection>), LaunchError> {
        let (mut launcher, control) = start(vmm_binary)?;
        let control = Arc::new(control);
        let (pid, process) = jailed(&mut launcher, &control, spec).await?;
        let process = Arc::new(channel::watch(process).map_err(LaunchError::Control)?);

        let connects = Arc::new(Answers::default());
        let plugs = Arc::new(Answers::default());
        let disks = Arc::new(Answers::default());
        let memory = Arc::new(Answers::default());
        let pauses = Arc::new(Answers::default());
        let snapshots = Arc::new(Answers::default());
        let (running, runs) = oneshot::channel();
        let (guest_connections, accepted) = mpsc::channel(WAITING_CONNECTIONS);
        let (end, ended) = watch::channel(None);
        let follower = Follower {
            control: Arc::clone(&control),
            process: Arc::clone(&process),
            connects: Arc::clone(&connects),
            plugs: Arc::clone(&plugs),
            disks: Arc::clone(&disks),
            memory: Arc::clone(&memory),
            pauses: Arc::clone(&pauses),
            snapshots: Arc::clone(&snapshots),
            running: Some(running),
            guest_connections,
            warnings_left: WARNINGS,
        };
        // From here on the follower reaps the process, and dropping `machine` kills it.
        tokio::spawn(follower.follow(end));
        let mut machine = Self {
            pid,
            started: Started::default(),
            control,
            process,
            connects,
            plugs,
            disks,
            memory,
            pauses,
            snapshots,
            ended,
        };

        launcher.wait().await.map_err(LaunchError::Control)?;
        match runs.await {
            Ok(started) => {
                machine.started = started;
                Ok((machine, accepted))
            }
            Err(_) => Err(LaunchError::Ended(machine.wait().await)),
        }
    }

    /// The jailed process, in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How it came to run, as `hull-vmm` tells it: numbers and names to show, nothing to rely on.
    pub fn started(&self) -> &Started {
        &self.started
    }

    /// Connects to a vsock port in the guest. Waits for the guest's answer: a guest
    /// that never answers is the caller's to time out.
    ///
    /// # Errors
    /// When the guest refuses, or the machine has ended.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, ConnectError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(ConnectError::Socket)?;
        ours.set_nonblocking(true).map_err(ConnectError::Socket)?;
        let stream = UnixStream::from_std(ours).map_err(ConnectError::Socket)?;

        let pending = self.connects.begin();
        let request = Request::Connect {
            id: pending.id,
            port,
        };
        match self.ask(pending, &request, &[theirs.as_fd()]).await? {
            Ok(()) => Ok(stream),
            Err(source) => Err(ConnectError::Refused { port, source }),
        }
    }

    /// Brings a network interface up with a tap; `index` counts the calls of [`MachineSpec::net`] from 0. The guest's
    /// driver is told when there is one.
    ///
    /// # Errors
    /// When there is no such interface, it has a tap already, the descriptors are not what it needs, or the machine
    /// has ended.
    pub async fn plug_net(&self, index: u8, tap: TapDescriptors) -> Result<(), PlugError> {
        let pending = self.plugs.begin();
        let (tap, descriptors) = spec::tap_alone(tap);
        let request = Request::PlugNet {
            id: pending.id,
            index,
            tap,
        };
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let plugged = self.ask(pending, &request, &borrowed).await?;
        plugged.map_err(|source| PlugError::Refused { index, source })
    }

    /// Puts a disk, a regular file or a block device, into a slot; `index` counts the calls of [`MachineSpec::block`]
    /// and [`MachineSpec::disk_slot`] from 0. The guest's driver is told when there is one.
    ///
    /// # Errors
    /// When there is no such slot, it has a disk, the descriptor is none of a disk, or the machine has ended.
    pub async fn insert_disk(
        &self,
        index: u8,
        disk: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<(), DiskError> {
        let pending = self.disks.begin();
        let request = Request::InsertDisk {
            id: pending.id,
            index,
            read_only,
        };
        let inserted = self.ask(pending, &request, &[disk]).await?;
        inserted.map_err(|source| DiskError::Refused { index, source })
    }

    /// Takes the disk out of a slot, if there is one. When this returns the guest writes to it no more.
    ///
    /// # Errors
    /// When there is no such slot, or the machine has ended.
    pub async fn eject_disk(&self, index: u8) -> Result<(), DiskError> {
        let pending = self.disks.begin();
        let request = Request::EjectDisk {
            id: pending.id,
            index,
        };
        let ejected = self.ask(pending, &request, &[]).await?;
        ejected.map_err(|source| DiskError::Refused { index, source })
    }

    /// Has `requested_mib` MiB be added to the memory that the machine has without: more or less than now. Returns when
    /// the guest's driver is told, if there is one; what it makes of that shows in [`Self::added_memory`]. It never gets
    /// more than that, but may take its time, and may be unable to give back what is too much.
    ///
    /// # Errors
    /// When the machine has no device for it ([`MachineSpec::memory_device`]), it is more than the device has addresses for
    /// or not a multiple of 2, or the machine has ended.
    pub async fn resize_memory(&self, requested_mib: u64) -> Result<(), MemoryError> {
        let pending = self.memory.begin();
        let request = Request::ResizeMemory {
            id: pending.id,
            requested_mib,
        };
        let resized = self.ask(pending, &request, &[]).await?;
        resized.map(drop).map_err(MemoryError::Refused)
    }

    /// How much memory has been added, as `hull-vmm` says.
    ///
    /// # Errors
    /// When the machine has no device for it, or has ended.
    pub async fn added_memory(&self) -> Result<AddedMemory, MemoryError> {
        let pending = self.memory.begin();
        let request = Request::AskMemory { id: pending.id };
        let added = self.ask(pending, &request, &[]).await?;
        added.map_err(MemoryError::Refused)
    }

    /// Stops the guest's processors, and returns when they stand. Devices go on with what they were asked to do,
    /// connections stay, and the guest's clock goes on: to it, it was a moment. Done again, it does nothing.
    ///
    /// # Errors
    /// When the machine has ended.
    pub async fn pause(&self) -> Result<(), AskError> {
        let pending = self.pauses.begin();
        let request = Request::Pause { id: pending.id };
        let paused = self.ask(pending, &request, &[]).await?;
        paused.map_err(|never| match never {})
    }

    /// Pauses the machine and puts it aside in two files, which are to be empty and open for writing. Whether that goes well
    /// or not, it stays paused, its devices too, until it is resumed or killed.
    ///
    /// # Errors
    /// When the files can't be written, a device can't be put aside, or the machine has ended.
    pub async fn snapshot(&self, files: SnapshotFiles) -> Result<(), SnapshotError> {
        let pending = self.snapshots.begin();
        let request = Request::Snapshot { id: pending.id };
        let files = [files.state.as_fd(), files.memory.as_fd()];
        let taken = self.ask(pending, &request, &files).await?;
        taken.map_err(SnapshotError::Refused)
    }

    /// The pages of its memory file that a restored machine has accessed so far; what was only read is known of one whose
    /// accesses were [to be seen](crate::memory::working_set::Accesses::ToBeSeen). Blocking: some milliseconds for each
    /// GiB.
    ///
    /// # Errors
    /// When the kernel doesn't tell, or the process is gone.
    pub fn working_set(&self, memory: BorrowedFd<'_>) -> io::Result<WorkingSet> {
        accessed::working_set(self.pid, memory)
    }

    /// Lets the guest's processors go on. Done again, it does nothing.
    ///
    /// # Errors
    /// When the machine has ended.
    pub async fn resume(&self) -> Result<(), AskError> {
        let pending = self.pauses.begin();
        let request = Request::Resume { id: pending.id };
        let resumed = self.ask(pending, &request, &[]).await?;
        resumed.map_err(|never| match never {})
    }

    /// Sends a request, and waits for its answer or the machine's end. The caller's copies of the descriptors are
    /// closed by the caller.
    async fn ask<E, T>(
        &self,
        pending: Pending<E, T>,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Result<T, E>, AskError> {
        if let Err(error) = self.control.send(request, descriptors).await {
            return Err(match &*self.ended.borrow() {
                Some(reason) => AskError::Ended(reason.clone()),
                None => error.into(),
            });
        }
        let mut ended = self.ended.clone();
        tokio::select! {
            answer = pending.answer() => match answer {
                Some(answer) => Ok(answer),
                None => Err(AskError::Ended(self.wait().await)),
            },
            reason = wait_for_end(&mut ended) => Err(AskError::Ended(reason)),
        }
    }

    /// Waits until `hull-vmm` is gone, and says why the machine ended.
    pub async fn wait(&self) -> ExitReason {
        wait_for_end(&mut self.ended.clone()).await
    }

    /// Ends the machine as a power cut would. [`Self::wait`] then gives [`ExitReason::Stopped`].
    pub async fn stop(&self) {
        if self.control.send(&Request::Stop, &[]).await.is_err() {
            self.kill();
        }
    }

    /// Kills `hull-vmm`.
    pub fn kill(&self) {
        kill(&self.process);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn kill(process: &AsyncFd<OwnedFd>) {
    // The only failure is that the process has already ended.
    let _ = pidfd_send_signal(process.get_ref(), Signal::KILL);
}

async fn wait_for_end(ended: &mut watch::Receiver<Option<ExitReason>>) -> ExitReason {
    let reason = ended.wait_for(Option::is_some).await;
    reason
        .ok()
        .and_then(|reason| reason.clone())
        .unwrap_or_else(|| ExitReason::Failed("the supervisor is ending".to_owned()))
}

fn start(vmm_binary: &Path) -> Result<(Child, AsyncChannel), LaunchError> {
    let (ours, theirs) = Channel::pair().map_err(LaunchError::Control)?;
    // The control socket as its standard input: the one descriptor that is passed on without a race.
    // The temporary command, which holds our copy of it, is gone at the end of the statement.
    let launcher = Command::new(vmm_binary)
        .args(["--control-fd", "0"])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| LaunchError::Start {
            binary: vmm_binary.to_owned(),
            source,
        })?;
    let control = AsyncChannel::new(ours).map_err(LaunchError::Control)?;
    Ok((launcher, control))
}

/// Hands the machine over, and gives the jailed process that runs it from here on.
async fn jailed(
    launcher: &mut Child,
    control: &AsyncChannel,
    spec: MachineSpec,
) -> Result<(i32, OwnedFd), LaunchError> {
    let MachineSpec {
        config,
        descriptors,
    } = spec;
    let console = usize::from(config.console.output.0);
    if let Some(console) = descriptors.get(console) {
        rustix::io::ioctl_fionbio(console, true)
            .map_err(|error| LaunchError::Control(error.into()))?;
    }
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let sent = control.send(&Request::Boot(config), &borrowed).await;
    if let Err(error @ (ChannelError::TooLong | ChannelError::TooManyDescriptors)) = sent {
        return Err(error.into());
    }
    drop(descriptors);

    match control.receive::<Event>().await? {
        Some((Event::Jailed { pid }, mut descriptors)) => match descriptors.pop() {
            Some(process) => Ok((pid, process)),
            None => Err(LaunchError::Unexpected("no process".to_owned())),
        },
        Some((Event::Ended(reason), _)) => Err(LaunchError::Ended(reason)),
        Some((event, _)) => Err(LaunchError::Unexpected(format!("{event:?}"))),
        None => {
            let status = launcher.wait().await.map_err(LaunchError::Control)?;
            Err(LaunchError::Launcher(status))
        }
    }
}

/// Listens to one `hull-vmm` until its end.
#[derive(Debug)]
struct Follower {
    control: Arc<AsyncChannel>,
    process: Arc<AsyncFd<OwnedFd>>,
    connects: Arc<Answers<ConnectRefused>>,
    plugs: Arc<Answers<PlugRefused>>,
    disks: Arc<Answers<DiskRefused>>,
    memory: Arc<Answers<MemoryRefused, AddedMemory>>,
    pauses: Arc<Answers<Infallible>>,
    snapshots: Arc<Answers<SnapshotRefused>>,
    running: Option<oneshot::Sender<Started>>,
    guest_connections: mpsc::Sender<GuestConnection>,
    warnings_left: u32,
}

impl Follower {
    async fn follow(mut self, end: watch::Sender<Option<ExitReason>>) {
        let told = self.listen().await;
        // Whatever it said, it is over: nothing waits on a process that says so and goes on.
        kill(&self.process);
        let found = self.reap().await;
        // Those who wait for the start or for a connection find the reason there when they are woken.
        end.send_replace(Some(told.unwrap_or(found)));
    }

    /// Handles events up to the end, and gives the reason if one was told.
    async fn listen(&mut self) -> Option<ExitReason> {
        loop {
            // What was said before the death counts, so the channel comes first.
            tokio::select! {
                biased;
                received = self.control.receive::<Event>() => match received {
                    Ok(Some((event, descriptors))) => {
                        if let Some(reason) = self.handle(event, descriptors) {
                            return Some(reason);
                        }
                    }
                    Ok(None) => return None,
                    Err(error) => return Some(broken(&error.to_string())),
                },
                _ = self.process.readable() => return None,
            }
        }
    }

    fn handle(&mut self, event: Event, mut descriptors: Vec<OwnedFd>) -> Option<ExitReason> {
        match event {
            Event::Running(started) => match self.running.take() {
                // Dropping the future of `launch` drops the machine, which ends it.
                Some(running) => drop(running.send(bounded(started))),
                None => return Some(broken("it started twice")),
            },
            Event::Connected { id, result } => self.connects.finish(id, result),
            Event::Plugged { id, result } => self.plugs.finish(id, result),
            Event::DiskChanged { id, result } => self.disks.finish(id, result),
            Event::AddedMemory { id, result } => self.memory.finish(id, result),
            Event::Paused { id } | Event::Resumed { id } => self.pauses.finish(id, Ok(())),
            Event::SnapshotTaken { id, result } => {
                let shown = |SnapshotRefused(why)| SnapshotRefused(printable(&why, REASON_CHARS));
                self.snapshots.finish(id, result.map_err(shown));
            }
            Event::GuestConnection { port } => {
                if let Some(stream) = descriptors.pop().and_then(|fd| stream(fd).ok()) {
                    // When the supervisor has no room or no interest, closing is the answer.
                    let _ = self
                        .guest_connections
                        .try_send(GuestConnection { port, stream });
                }
            }
            Event::Warning(text) => self.log(&text),
            Event::Ended(ExitReason::Failed(text)) => {
                return Some(ExitReason::Failed(printable(&text, REASON_CHARS)));
            }
            Event::Ended(reason) => return Some(reason),
            Event::Jailed { .. } => return Some(broken("it was jailed twice")),
        }
        None
    }

    fn log(&mut self, text: &str) {
        let Some(left) = self.warnings_left.checked_sub(1) else {
            return;
        };
        self.warnings_left = left;
        let text = printable(text, WARNING_CHARS);
        tracing::warn!(target: "hull-vmm", "{text}");
        if left == 0 {
            tracing::warn!(target: "hull-vmm", "what it says from here on is not written down");
        }
    }

    async fn reap(&self) -> ExitReason {
        if let Err(error) = self.process.readable().await {
            return ExitReason::Failed(format!("watching the process: {error}"));
        }
        let pidfd = WaitId::PidFd(self.process.get_ref().as_fd());
        match waitid(pidfd, WaitIdOptions::EXITED) {
            Ok(Some(status)) => match (status.terminating_signal(), status.exit_status()) {
                // An access to what a mapping of a file has past the file's end. Nothing else is mapped from one.
                (Some(libc::SIGBUS), _) => ExitReason::Failed(
                    "the file of its memory is shorter than it was, or can't be read".to_owned(),
                ),
                (Some(signal), _) => ExitReason::Killed(signal),
                (None, Some(code)) => ExitReason::Exited(code),
                (None, None) => ExitReason::Failed("it ended in an unknown way".to_owned()),
            },
            Ok(None) => ExitReason::Failed("it ended in an unknown way".to_owned()),
            Err(error) => ExitReason::Failed(format!("asking how the process ended: {error}")),
        }
    }
}

/// A stream that `hull-vmm` sent, if it is one.
fn stream(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let kind = (
        sockopt::socket_domain(&descriptor)?,
        sockopt::socket_type(&descriptor)?,
    );
    if kind != (AddressFamily::UNIX, SocketType::STREAM) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let stream = StdUnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

fn broken(how: &str) -> ExitReason {
    ExitReason::Failed(format!("hull-vmm broke the protocol: {how}"))
}

fn bounded(mut started: Started) -> Started {
    started.steps.truncate(STEPS);
    for step in &mut started.steps {
        step.name = printable(&step.name, STEP_CHARS);
    }
    started
}

/// Text of `hull-vmm`, safe to show on a terminal and to keep.
fn printable(text: &str, most: usize) -> String {
    text.chars()
        .take(most)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
