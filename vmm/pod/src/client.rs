//! Asks a running pod's supervisor over its socket, and starts one.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use std::time::Duration;

use hull_machine::channel::{self, AsyncChannel, Channel, ChannelError, SocketError};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::manifest::PodManifest;
use crate::snapshots::{Files, Restored};
use crate::state::{Claim, PodDir, PodStatus, StateError, read_record, replace_file};
use crate::supervisor::ENVIRONMENT;
use crate::supervisor::api::{Exec, Join, Refusal, Reply, Request, Size, Streams, Target};

/// From the end of a supervisor's connections to its own.
const LAST_MOMENTS: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("starting the pod's supervisor")]
    Start(#[source] io::Error),
    #[error("the pod's supervisor is not there")]
    Connect(#[from] SocketError),
    #[error("talking to the pod's supervisor")]
    Channel(#[from] ChannelError),
    #[error("{message}")]
    Refused { kind: Refusal, message: String },
    #[error("watching the pod's supervisor")]
    Process(#[source] io::Error),
    #[error("the pod has ended")]
    Ended,
    #[error("the pod's supervisor gave an answer to something else")]
    Unexpected,
    #[error("the pod's files")]
    State(#[from] StateError),
    #[error("writing the pod's manifest")]
    Manifest(#[source] serde_json::Error),
}

/// A connection to a pod's supervisor.
#[derive(Debug)]
pub struct Client {
    channel: AsyncChannel,
    dir: PodDir,
    /// The supervisor itself; none: it has ended already.
    process: Option<AsyncFd<OwnedFd>>,
}

impl Client {
    /// Connects to the supervisor of a pod.
    ///
    /// # Errors
    /// When there is none.
    pub fn connect(dir: &PodDir) -> Result<Self, ClientError> {
        let channel = AsyncChannel::connect(&dir.socket())?;
        let pid = channel.peer().map_err(ClientError::Process)?.pid;
        Ok(Self {
            process: watch_process(pid).map_err(ClientError::Process)?,
            channel,
            dir: dir.clone(),
        })
    }

    /// Starts a supervisor for a claimed pod: `program` with `args`, which end in
    /// [`crate::supervisor::supervise`]. The pod's name is the supervisor's from now on. When it was `requested` is told
    /// on [`crate::timeline::now_micros`]. One that is `restored` goes on where it was put aside.
    ///
    /// # Errors
    /// When it can't be started. The claim is then gone.
    pub fn start(
        claim: Claim,
        manifest: &PodManifest,
        program: &Path,
        args: Vec<OsString>,
        requested: u64,
        restored: Option<&Restored>,
    ) -> Result<Self, ClientError> {
        let Claim { dir, lock, .. } = claim;
        let content = serde_json::to_vec(manifest).map_err(ClientError::Manifest)?;
        replace_file(&dir.manifest(), &content)?;
        let log = File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(dir.supervisor_log())
            .map_err(ClientError::Start)?;
        let (ours, theirs) = Channel::pair().map_err(ClientError::Start)?;
        let mut command = Command::new(program);
        command
            .args(args)
            .envs(ENVIRONMENT)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(log.try_clone().map_err(ClientError::Start)?))
            .stderr(Stdio::from(log));
        // SAFETY: setsid is async-signal-safe, allocates nothing and touches no memory of ours.
        unsafe {
            // A session of its own from the first moment: a Ctrl-C is ours to pass on.
            command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
        }
        // It outlives us, so nobody waits for it here.
        let child = command.spawn().map_err(ClientError::Start)?;
        // Our copy of its end of the channel goes, so that its death is seen.
        drop(command);
        let process = watch_process(Pid::from_child(&child)).map_err(ClientError::Process)?;
        let start = Request::Start {
            requested,
            restored: restored.map(|restored| restored.size),
        };
        let mut descriptors = vec![lock.as_fd()];
        if let Some(Restored { machine, .. }) = restored {
            descriptors.extend([machine.state.as_fd(), machine.memory.as_fd()]);
        }
        ours.send(&start, &descriptors)?;
        Ok(Self {
            channel: AsyncChannel::new(ours).map_err(ClientError::Start)?,
            dir,
            process,
        })
    }

    #[must_use]
    pub fn dir(&self) -> &PodDir {
        &self.dir
    }

    /// Asks for word of every change; see [`Self::changed`].
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn follow(&self) -> Result<(), ClientError> {
        match self.channel.send(&Request::Follow, &[]).await {
            // An end is told by `changed`.
            Ok(()) | Err(ChannelError::Send(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the next change, after [`Self::follow`]. None: the supervisor has ended.
    ///
    /// # Errors
    /// When the pod's state can't be read.
    pub async fn changed(&self) -> Result<Option<PodStatus>, ClientError> {
        loop {
            match self.channel.receive::<Reply>().await {
                Ok(Some((Reply::Changed, _))) => {
                    return Ok(Some(read_record(self.dir.clone())?.status));
                }
                // The answer to a Stop.
                Ok(Some(_)) => {}
                Ok(None) | Err(ChannelError::Receive(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Asks for the pod's end; [`Self::ended`] waits for it. `None`: as the manifest has it.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn stop(&self, grace_seconds: Option<u64>) -> Result<(), ClientError> {
        match self
            .channel
            .send(&Request::Stop { grace_seconds }, &[])
            .await
        {
            // It has ended already.
            Ok(()) | Err(ChannelError::Send(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the supervisor is gone, and with it every mount of its own.
    pub async fn ended(&self) {
        while let Ok(Some(_)) = self.channel.receive::<Reply>().await {}
        if let Some(process) = &self.process {
            // Readable once the process has ended (pidfd_open(2)). When it can't be watched, the end
            // of the connection has to do.
            let _ = timeout(LAST_MOMENTS, process.readable()).await;
        }
    }

    /// Makes the pod stand still; done again, it does nothing.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it is not up yet, or ending.
    pub async fn pause(&self) -> Result<(), ClientError> {
        self.done(&Request::Pause).await
    }

    /// Lets the pod go on; done again, it does nothing.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it is not up yet, or ending.
    pub async fn resume(&self) -> Result<(), ClientError> {
        self.done(&Request::Resume).await
    }

    /// Puts the pod aside in these files; returns when all is in them and the pod goes on.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it can't be.
    pub async fn snapshot(&self, files: &Files) -> Result<(), ClientError> {
        let descriptors = files.descriptors().map(AsFd::as_fd);
        match self.ask_with(&Request::Snapshot, &descriptors).await? {
            (Reply::Done, _) => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when there is nobody to take it.
    pub async fn kill(&self, target: Target, signal: u32) -> Result<(), ClientError> {
        self.done(&Request::Kill { target, signal }).await
    }

    async fn done(&self, request: &Request) -> Result<(), ClientError> {
        match self.ask(request).await? {
            (Reply::Done, _) => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Runs a process in a container.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it can't be run.
    pub async fn exec(self, exec: Exec) -> Result<Session, ClientError> {
        let (reply, streams) = self.ask(&Request::Exec(exec)).await?;
        let Reply::ExecStarted { stdin, stderr } = reply else {
            return Err(ClientError::Unexpected);
        };
        self.session(Streams { stdin, stderr }, streams)
    }

    /// Adds a container to the running pod. Returns its name when it has been started, and a session
    /// if that was asked for ([`Join::attach`]).
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it can't be.
    pub async fn join(self, join: Join) -> Result<(String, Option<Session>), ClientError> {
        match self.ask(&Request::Join(Box::new(join))).await? {
            (Reply::Joined { name, streams }, descriptors) => {
                let session = streams.map(|streams| self.session(streams, descriptors));
                Ok((name, session.transpose()?))
            }
            _ => Err(ClientError::Unexpected),
        }
    }

    fn session(self, which: Streams, streams: Vec<OwnedFd>) -> Result<Session, ClientError> {
        // The channel has checked that there are as many as the reply says.
        let mut streams = streams.into_iter();
        let stdin = which.stdin.then(|| streams.next()).flatten();
        let stdout = streams.next().ok_or(ClientError::Unexpected)?;
        let stderr = which.stderr.then(|| streams.next()).flatten();
        Ok(Session {
            channel: self.channel,
            stdin,
            stdout: Some(stdout),
            stderr,
        })
    }

    /// Connects to a TCP port of the pod, as if from within it. The connection is a socket in
    /// blocking mode, and outlives this client.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when nobody listens there.
    pub async fn forward(&self, port: u16) -> Result<OwnedFd, ClientError> {
        match self.ask(&Request::Forward { port }).await? {
            (Reply::Forwarded, mut streams) => streams.pop().ok_or(ClientError::Unexpected),
            _ => Err(ClientError::Unexpected),
        }
    }

    async fn ask(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        self.ask_with(request, &[]).await
    }

    async fn ask_with(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        self.channel.send(request, descriptors).await?;
        match self.channel.receive().await? {
            Some((Reply::Refused { kind, message }, _)) => {
                Err(ClientError::Refused { kind, message })
            }
            Some(answer) => Ok(answer),
            None => Err(ClientError::Ended),
        }
    }
}

/// A descriptor that tells of a process's end. None: it has ended.
fn watch_process(pid: Pid) -> io::Result<Option<AsyncFd<OwnedFd>>> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => channel::watch(pidfd).map(Some),
        // EINVAL: it has, and its number is still that of its session.
        Err(Errno::SRCH | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A process in a container, or a container that has joined. Dropping it hangs up.
#[derive(Debug)]
pub struct Session {
    channel: AsyncChannel,
    /// Sockets in blocking mode, to be taken. Shutting standard input down is its end.
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

impl Session {
    /// Tells the size of the client's terminal.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn resize(&self, size: Size) -> Result<(), ClientError> {
        Ok(self.channel.send(&Request::Resize(size), &[]).await?)
    }

    /// Waits for the process's end, and returns its exit code.
    ///
    /// # Errors
    /// When the pod ends before it.
    pub async fn ended(&self) -> Result<i32, ClientError> {
        match self.channel.receive::<Reply>().await? {
            Some((Reply::Ended { exit_code }, _)) => Ok(exit_code),
            Some((Reply::Refused { kind, message }, _)) => {
                Err(ClientError::Refused { kind, message })
            }
            Some(_) => Err(ClientError::Unexpected),
            None => Err(ClientError::Ended),
        }
    }
}
