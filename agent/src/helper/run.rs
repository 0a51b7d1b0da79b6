//! A helper's side: takes the request, makes the process, replies.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::set_name;
use tracing::level_filters::LevelFilter;

use super::launch::{Launch, Limits};
use super::{Confinement, Create, Exec, MAX_MESSAGE, Reply, Request, infra, launch};
use crate::container::seccomp::Program;
use crate::error::shorten;
use crate::message;

/// Longest text of a failure, in bytes.
const MAX_TEXT: usize = 900;

/// Runs the helper that makes infra: it has the namespaces before it is asked.
pub fn for_infra(socket: &OwnedFd) -> io::Result<ExitCode> {
    match infra::make_namespaces() {
        Ok(()) => send(socket, &Reply::Waiting)?,
        Err(text) => {
            send(socket, &Reply::Failed { text })?;
            return Ok(ExitCode::FAILURE);
        }
    }
    main(socket)
}

/// Runs the helper, which the agent asks on `socket`.
pub fn main(socket: &OwnedFd) -> io::Result<ExitCode> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (count, fds) = message::receive(socket, &mut buffer, message::MAX_FDS)?;
    if count == 0 {
        // The agent has gone, or given up.
        return Ok(ExitCode::SUCCESS);
    }
    let request: Request = serde_json::from_slice(&buffer[..count])?;
    drop(buffer);
    // It is only for who looks.
    let _ = set_name(request.name());
    let log = Log::start()?;

    let answer = match request {
        Request::Infra(request) => match infra::start(&request) {
            Ok(pid) => Reply::Made { pid },
            Err(text) => Reply::Failed { text },
        },
        Request::Create(request) => reply(create(*request, fds), log),
        Request::Exec(request) => reply(exec(*request, fds), log),
    };
    send(socket, &answer)?;
    // The agent closes its end when it watches the process.
    message::receive(socket, &mut [0], 0)?;
    Ok(ExitCode::SUCCESS)
}

fn send(socket: &OwnedFd, reply: &Reply) -> io::Result<()> {
    message::send(socket, &serde_json::to_vec(reply)?, &[])
}

fn limits(confinement: Confinement, fds: &mut Vec<OwnedFd>) -> Result<Limits, LibcontainerError> {
    let filter = match confinement.filter_flags {
        None => None,
        Some(flags) => {
            let program = fds
                .pop()
                .ok_or_else(|| LibcontainerError::Other("the seccomp filter is missing".into()))?;
            Some(Program::read(&program, flags).map_err(LibcontainerError::OtherIO)?)
        }
    };
    Ok(Limits {
        filter,
        capabilities: confinement.capabilities,
    })
}

fn builder(
    id: String,
    states: &std::path::Path,
    console: Option<std::path::PathBuf>,
    fds: Vec<OwnedFd>,
    launch: Launch,
) -> Result<ContainerBuilder, LibcontainerError> {
    let mut builder = ContainerBuilder::new(id, SyscallType::default())
        .with_executor(launch)
        .with_root_path(states)?
        .with_console_socket(console);
    let mut fds = fds.into_iter();
    builder.stdin = fds.next();
    builder.stdout = fds.next();
    builder.stderr = fds.next();
    builder.validate_id()
}

fn create(request: Create, mut fds: Vec<OwnedFd>) -> Result<i32, LibcontainerError> {
    let launch = Launch::first(limits(request.confinement, &mut fds)?);
    let container = builder(request.id, &request.states, request.console, fds, launch)?
        .as_init(request.bundle)
        .with_systemd(false)
        .build()?;
    container
        .pid()
        .map(|pid| pid.as_raw())
        .ok_or_else(|| LibcontainerError::Other("the container has no process".into()))
}

fn exec(request: Exec, mut fds: Vec<OwnedFd>) -> Result<i32, LibcontainerError> {
    let limits = limits(request.confinement, &mut fds)?;
    let launch = Launch::exec(limits, request.terminal_size);
    let pid = builder(request.id, &request.states, request.console, fds, launch)?
        .as_tenant()
        .with_process(Some(request.process))
        .with_detach(true)
        .build()?;
    Ok(pid.as_raw())
}

fn reply(made: Result<i32, LibcontainerError>, log: Log) -> Reply {
    let error = match made {
        Ok(pid) => return Reply::Made { pid },
        Err(error) => error,
    };
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&part);
        }
        cause = error.source();
    }
    if let Some(reply) = launch::refusal(&text) {
        return reply;
    }
    // libcontainer's processes send each other only the outermost error; the
    // innermost is what they logged first.
    if let Some(first) = log.first_line() {
        text.push_str(": ");
        text.push_str(&first);
    }
    let text = text.replace('\0', "");
    Reply::Failed {
        text: shorten(&text, MAX_TEXT).to_owned(),
    }
}

/// Keeps what libcontainer's processes log, for the reply.
struct Log {
    reader: std::fs::File,
}

impl Log {
    fn start() -> io::Result<Self> {
        // Not blocking: a container lives on with the writing end until it is started.
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let writer = std::fs::File::from(writer);
        tracing_subscriber::fmt()
            .with_max_level(LevelFilter::ERROR)
            .with_ansi(false)
            .without_time()
            .with_level(false)
            .with_target(false)
            .with_writer(std::sync::Mutex::new(writer))
            .init();
        Ok(Self {
            reader: reader.into(),
        })
    }

    fn first_line(mut self) -> Option<String> {
        let mut buffer = vec![0; 4096];
        let count = self.reader.read(&mut buffer).ok()?;
        let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
        let line = text.lines().next()?.trim();
        (!line.is_empty()).then(|| line.to_owned())
    }
}
