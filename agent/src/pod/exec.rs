//! A further process is made in a container.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hull_protocol::agent::ExecRequest;
use oci_spec::runtime::Process as OciProcess;

use super::attach::Attached;
use super::{Pod, write_json};
use crate::container::user::{self, User};
use crate::container::{Container, Running, Slot, check_name, spec};
use crate::error::{Doing, Error, Result};
use crate::helper::{self, Confinement, Request};
use crate::stdio::{Size, Until};

const MAX_ARGUMENTS: usize = 4096;

impl Pod {
    /// Runs a further process in a container.
    pub async fn exec(self: &Arc<Self>, request: ExecRequest) -> Result<u32> {
        check_name("exec", &request.exec_id)?;
        if request.args.is_empty()
            || request.args.len() > MAX_ARGUMENTS
            || request.env.len() > MAX_ARGUMENTS
        {
            return Err(Error::Invalid(format!(
                "an exec has 1 to {MAX_ARGUMENTS} arguments, and no more variables"
            )));
        }
        let container = self.container(&request.container_id)?;
        if !container.is_started() || container.first.has_ended() {
            return Err(Error::State("the container is not running".into()));
        }
        let _moving = container.moving()?;
        container.reserve_exec(&request.exec_id)?;
        let made = self.make_exec(&container, &request).await;
        let mut execs = container.execs();
        match made {
            Ok(running) => {
                let pid = running.process.pid.as_raw_nonzero().get().unsigned_abs();
                execs.insert(request.exec_id, Slot::Ready(Arc::new(running)));
                Ok(pid)
            }
            Err(error) => {
                execs.remove(&request.exec_id);
                Err(error)
            }
        }
    }

    async fn make_exec(&self, container: &Container, request: &ExecRequest) -> Result<Running> {
        let numbers = request.streams.clone().unwrap_or_default();
        let size = Size::new(numbers.columns, numbers.rows)?;
        let claimed = self.claim(&numbers).await?;
        let directory = Scratch::make(
            self.run
                .join("execs")
                .join(self.next_exec.fetch_add(1, Ordering::Relaxed).to_string()),
        )?;
        container.write_running_state(&directory.0.join(&request.container_id))?;
        let (process, confinement, user) = exec_process(container, request, numbers.tty)?;
        let process_path = directory.0.join("process.json");
        write_json(&process_path, &process)?;
        let exec = |console| {
            Request::Exec(Box::new(helper::Exec {
                id: request.container_id.clone(),
                states: directory.0.clone(),
                process: process_path.clone(),
                console,
                confinement,
                terminal_size: numbers.tty.then_some(size),
            }))
        };
        let attached = Attached {
            claimed,
            terminal: numbers.tty,
            console: directory.0.join("console"),
            user: &user,
            filter: container.filter.as_deref(),
            until: Until::Ended,
        };
        let (process, terminal, streams) = self.run_helper(attached, exec).await?;
        let cgroup = Arc::clone(&container.cgroup);
        Ok(Running::new(process, terminal, streams, cgroup, false))
    }
}

/// A directory that is removed with its contents.
struct Scratch(PathBuf);

impl Scratch {
    fn make(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).doing(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("removing {}: {error}", self.0.display());
        }
    }
}

/// The process of an exec: the container's own, with what the request says instead.
fn exec_process(
    container: &Container,
    request: &ExecRequest,
    terminal: bool,
) -> Result<(OciProcess, Confinement, User)> {
    let base = container
        .spec
        .process()
        .clone()
        .ok_or_else(|| Error::State("the container has no process".into()))?;
    let user = if request.user.is_empty() {
        User {
            uid: base.user().uid(),
            gid: base.user().gid(),
            groups: base.user().additional_gids().clone().unwrap_or_default(),
            home: "/".into(),
        }
    } else {
        user::look_up(container.open_root()?, &request.user, &[])?
    };
    let mut process = base.clone();
    process.set_args(Some(request.args.clone()));
    if !request.cwd.is_empty() {
        if !request.cwd.starts_with('/') {
            return Err(Error::Invalid(
                "an exec's directory must be absolute".into(),
            ));
        }
        process.set_cwd(request.cwd.clone().into());
    }
    let mut env = base.env().clone().unwrap_or_default();
    if !request.user.is_empty() {
        env.retain(|entry| !entry.starts_with("HOME="));
    }
    for entry in &request.env {
        let Some((name, _)) = entry.split_once('=') else {
            return Err(Error::Invalid(format!(
                "variable {:?} is not NAME=value",
                crate::error::shorten(entry, 100)
            )));
        };
        let prefix = format!("{name}=");
        env.retain(|old| !old.starts_with(&prefix));
        env.push(entry.clone());
    }
    process.set_env(Some(env));
    let mut process = spec::with_user(process, &user, terminal)?;
    let confinement = spec::confine(&mut process, container.filter.as_deref());
    Ok((process, confinement, user))
}
