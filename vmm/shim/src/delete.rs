//! `delete`: removes what a shim has left. containerd asks for it once for each container, also after an orderly end.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::arguments::Arguments;
use crate::bundle::{Bundle, Place};
use crate::cgroup;
use crate::events::timestamp;
use crate::metrics;

/// As of a process that was killed: nobody has seen how it ended.
const KILLED: u32 = 137;
/// For the end of a process after SIGKILL. containerd waits 5 s in all.
const LIMIT: Timespec = Timespec {
    tv_sec: 3,
    tv_nsec: 0,
};

#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error("ending the shim")]
    Kill(#[from] rustix::io::Errno),
    #[error("finding the bundle")]
    Bundle(#[source] io::Error),
    #[error("removing the pod's cgroup")]
    Cgroup(#[from] io::Error),
    #[error("writing the answer")]
    Answer(#[from] containerd_shim_protos::protobuf::Error),
}

/// Ends the shim of the container, if that is the pod's first one, and with it machine and mounts. Returns what is to
/// be printed. Done again, it finds nothing and answers the same.
///
/// # Errors
/// See [`DeleteError`].
pub fn delete(arguments: &Arguments) -> Result<Vec<u8>, DeleteError> {
    let directory = if arguments.bundle.as_os_str().is_empty() {
        std::env::current_dir().map_err(DeleteError::Bundle)?
    } else {
        arguments.bundle.clone()
    };
    let bundle = Bundle::read(&directory).ok();
    // Without a specification that can be read there never was a shim for somebody else.
    let is_member = |bundle: &Bundle| matches!(bundle.place, Place::Member { .. });
    if !bundle.as_ref().is_some_and(is_member) {
        end_shim(&directory, &arguments.id)?;
        remove_socket(&directory);
        // Mostly it is gone.
        let _ = fs::remove_file(metrics::socket(arguments));
        if let Some(cgroup) = bundle.and_then(|bundle| cgroup::of(&bundle.spec)) {
            cgroup::remove(&cgroup)?;
        }
    }
    let answer = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    Ok(answer.write_to_bytes()?)
}

/// Kills the shim whose number is in the bundle, if it is that one and lives.
fn end_shim(bundle: &Path, id: &str) -> rustix::io::Result<()> {
    let pid = fs::read_to_string(bundle.join("shim.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .and_then(Pid::from_raw);
    let Some(pid) = pid else { return Ok(()) };
    let shim = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        // It is gone; EINVAL: and its number is still that of its session, in which the machine is.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(()),
        opened => opened?,
    };
    // The descriptor is of whoever has the number now, and so is what is read after it was opened.
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    if !is_shim_of(&line, id) {
        return Ok(());
    }
    match rustix::process::pidfd_send_signal(&shim, Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        sent => sent?,
    }
    let mut ended = [PollFd::new(&shim, PollFlags::IN)];
    rustix::event::poll(&mut ended, Some(&LIMIT))?;
    Ok(())
}

fn is_shim_of(command_line: &[u8], id: &str) -> bool {
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    words.contains(&b"serve".as_slice())
        && words
            .windows(2)
            .any(|pair| pair == [b"-id".as_slice(), id.as_bytes()])
}

fn remove_socket(bundle: &Path) {
    let path = fs::read_to_string(bundle.join("address")).ok();
    let path = path
        .as_deref()
        .and_then(|text| text.strip_prefix("unix://"));
    if let Some(path) = path.map(PathBuf::from)
        && path.is_absolute()
    {
        // Mostly it is gone.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(bundle: &Path) -> Arguments {
        Arguments {
            id: "web".into(),
            bundle: bundle.to_owned(),
            ..Arguments::default()
        }
    }

    fn answered(bundle: &Path) -> u32 {
        let answer = delete(&arguments(bundle)).unwrap();
        DeleteResponse::parse_from_bytes(&answer)
            .unwrap()
            .exit_status
    }

    #[test]
    fn where_nothing_is_left_the_answer_is_the_same() {
        let bundle = tempfile::tempdir().unwrap();

        assert_eq!(answered(bundle.path()), KILLED);
        assert_eq!(answered(bundle.path()), KILLED);
    }

    #[test]
    fn the_socket_goes() {
        let bundle = tempfile::tempdir().unwrap();
        let socket = bundle.path().join("socket");
        fs::write(&socket, "").unwrap();
        let address = format!("unix://{}", socket.display());
        fs::write(bundle.path().join("address"), address).unwrap();

        assert_eq!(answered(bundle.path()), KILLED);

        assert!(!socket.exists());
    }

    #[test]
    fn a_process_that_has_the_number_now_is_left_alone() {
        let bundle = tempfile::tempdir().unwrap();
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        fs::write(bundle.path().join("shim.pid"), other.id().to_string()).unwrap();

        assert_eq!(answered(bundle.path()), KILLED);

        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_shim_is_known_by_its_command_line() {
        let line = b"/usr/bin/containerd-shim-hull-v2\0-namespace\0default\0-id\0web\0serve\0";

        assert!(is_shim_of(line, "web"));
        assert!(!is_shim_of(line, "we") && !is_shim_of(line, "default"));
        assert!(!is_shim_of(b"vi\0-id\0web\0", "web"));
    }
}
