//! The supervisor's side of a machine: starts `hull-vmm`, talks to it, sees it end.
//!
//! `hull-vmm` is hostile from the guest's first instruction on. What it says is
//! bounded and checked; what it is (alive, dead, and how) is asked of the kernel.
//!
//! The jailed process is a child of the calling process: nobody there may wait for
//! "any child".

mod accessed;
mod answers;
mod failures;
mod follower;
mod launch;
mod spec;

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;

use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use self::answers::{Answers, Pending};
pub use self::failures::{
    AskError, ConnectError, DiskError, LaunchError, MemoryError, PlugError, SnapshotError,
};
use self::follower::Follower;
pub use self::spec::{MachineSpec, NetSpec, SnapshotFiles};
use crate::channel::{self, AsyncChannel};
use crate::config::TapDescriptors;
use crate::control::{
    AddedMemory, ConnectRefused, DiskRefused, ExitReason, MemoryRefused, PlugRefused, Request,
    SnapshotRefused,
};
use crate::memory::working_set::WorkingSet;
use crate::steps::Started;

/// Guest connections that wait for the supervisor; more are closed at once.
const WAITING_CONNECTIONS: usize = 64;
/// A connection that the guest made.
#[derive(Debug)]
pub struct GuestConnection {
    /// The host's port, one of [`crate::config::VsockConfig::guest_ports`].
    pub port: u32,
    pub stream: UnixStream,
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
        let (mut launcher, control) = launch::start(vmm_binary)?;
        let control = Arc::new(control);
        let (pid, process) = launch::jailed(&mut launcher, &control, spec).await?;
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
            warnings_left: follower::WARNINGS,
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
