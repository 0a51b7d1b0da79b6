//! The agent's side: asks for helpers, and takes over the processes that they make.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Pid;

use super::{MAX_MESSAGE, MAX_REPLY, Reply, Request, infra, parent};
use crate::endpoint::Endpoint;
use crate::error::{Doing, Error, Result};
use crate::message;
use crate::process::{Process, Reaper};

/// Where helpers come from.
#[derive(Debug)]
pub struct Helpers {
    reaper: Arc<Reaper>,
    /// The socket of their parent. None: it has not been started yet.
    parent: Mutex<Option<OwnedFd>>,
    /// The helper that is to make infra, with its namespaces. None: it has not been forked yet, or has been used.
    infra: tokio::sync::Mutex<Option<Endpoint>>,
}

impl Helpers {
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            parent: Mutex::default(),
            infra: tokio::sync::Mutex::default(),
        }
    }

    /// Makes what the pod's beginning will ask for: the helpers' parent, and infra's namespaces.
    pub async fn get_ready(&self) -> Result<()> {
        let mut infra = self.infra.lock().await;
        self.start_parent()?;
        if infra.is_none() {
            *infra = Some(self.for_infra().await?);
        }
        Ok(())
    }

    /// Asks a helper, and takes over the process that it makes.
    pub async fn call(&self, request: &Request, fds: Vec<OwnedFd>) -> Result<Process> {
        let doing = request.doing();
        let bytes =
            serde_json::to_vec(request).map_err(|error| Error::Invalid(error.to_string()))?;
        if bytes.len() > MAX_MESSAGE {
            return Err(Error::Invalid(format!("{doing}: the request is too large")));
        }
        let socket = match request {
            Request::Infra(_) => match self.infra.lock().await.take() {
                Some(waiting) => waiting,
                None => self.for_infra().await?,
            },
            Request::Create(_) | Request::Exec(_) => self.fork()?,
        };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        message::send(&socket, &bytes, &borrowed).doing(|| "asking a helper".into())?;
        drop(fds);
        let pid = match receive(&socket, doing).await? {
            Reply::Made { pid } => Pid::from_raw(pid).ok_or(Error::Helper {
                doing,
                text: "its helper replied with no process".into(),
            })?,
            Reply::NotFound { program } => return Err(Error::ProgramNotFound { program }),
            Reply::NotExecutable { program } => {
                return Err(Error::ProgramNotExecutable { program });
            }
            Reply::Failed { text } => return Err(Error::Helper { doing, text }),
            Reply::Waiting => return Err(out_of_turn(doing)),
        };
        // The helper ends when its socket is closed, and the process is this one's child then.
        self.reaper.adopt(pid).doing(|| "watching a process".into())
    }

    /// A helper that has namespaces for infra.
    async fn for_infra(&self) -> Result<Endpoint> {
        const DOING: &str = "making the pod's namespaces";
        let socket = self.start(infra::NAME)?;
        let socket = Endpoint::new(socket).doing(|| DOING.into())?;
        match receive(&socket, DOING).await? {
            Reply::Waiting => Ok(socket),
            Reply::Failed { text } => Err(Error::Helper { doing: DOING, text }),
            _ => Err(out_of_turn(DOING)),
        }
    }

    fn fork(&self) -> Result<Endpoint> {
        let (ours, theirs) = pair()?;
        let ask = |parent: &OwnedFd| parent::ask(parent, theirs.as_fd());
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        // One that the kernel has killed, for want of memory say, has a successor.
        if parent.as_ref().is_none_or(|parent| ask(parent).is_err()) {
            let started = self.start(parent::NAME)?;
            ask(&started).doing(|| "asking for a helper".into())?;
            *parent = Some(started);
        }
        drop(parent);
        Endpoint::new(ours).doing(|| "asking a helper".into())
    }

    fn start_parent(&self) -> Result<()> {
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        if parent.is_none() {
            *parent = Some(self.start(parent::NAME)?);
        }
        Ok(())
    }

    /// Starts this program anew, in the role of that name. Returns its socket.
    fn start(&self, name: &str) -> Result<OwnedFd> {
        let (ours, theirs) = pair()?;
        self.reaper
            .spawn(
                Command::new("/proc/self/exe")
                    .arg0(name)
                    .env_clear()
                    .stdin(Stdio::from(theirs)),
            )
            .doing(|| "starting a helper".into())?;
        Ok(ours)
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(|| "making a socket for a helper".into())
}

fn out_of_turn(doing: &'static str) -> Error {
    Error::Helper {
        doing,
        text: "its helper replied to what it was not asked".into(),
    }
}

async fn receive(socket: &Endpoint, doing: &'static str) -> Result<Reply> {
    let mut buffer = vec![0; MAX_REPLY];
    let (count, _) = socket
        .receive(&mut buffer, 0)
        .await
        .doing(|| format!("{doing}: waiting for its helper"))?;
    if count == 0 {
        return Err(Error::Helper {
            doing,
            text: "its helper died; see the machine's console".into(),
        });
    }
    serde_json::from_slice(&buffer[..count])
        .map_err(io::Error::from)
        .doing(|| format!("{doing}: reading the reply"))
}
