//! Runs netavark, bounded in time and output.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use super::{Doing, NetworkError};
use crate::state::Directories;
use crate::text::{cut, printable};

/// Where distributions put it; podman looks at the same places.
const PLACES: [&str; 4] = [
    "/usr/local/libexec/podman",
    "/usr/local/lib/podman",
    "/usr/libexec/podman",
    "/usr/lib/podman",
];
/// What netavark itself looks for: a service's PATH may lack them.
const TOOLS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Its answer names every interface; longer ones are cut off by the kernel.
const OUTPUT_MAX: u64 = 256 << 10;
/// From here on it drives nftables, before that iptables.
const NFTABLES_SINCE: (u32, u32) = (1, 10);
/// Of its reason for a failure so much is told.
const MESSAGE_MAX: usize = 1024;

/// What netavark is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Setup,
    Teardown,
}

impl Action {
    fn as_str(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Teardown => "teardown",
        }
    }
}

/// netavark and aardvark-dns as they are installed.
#[derive(Debug)]
pub struct Netavark {
    program: PathBuf,
    aardvark: PathBuf,
    /// Where aardvark-dns keeps what it answers.
    config: PathBuf,
    limit: Duration,
    mounts: Option<OwnedFd>,
}

impl Netavark {
    /// No run of it takes longer than `limit`.
    ///
    /// # Errors
    /// When one of the two is not installed; names its package.
    pub fn find(directories: &Directories, limit: Duration) -> Result<Self, NetworkError> {
        Self::find_in(PLACES.map(Path::new).as_slice(), directories, limit)
    }

    fn find_in(
        places: &[&Path],
        directories: &Directories,
        limit: Duration,
    ) -> Result<Self, NetworkError> {
        let find = |name: &'static str| {
            places
                .iter()
                .map(|place| place.join(name))
                .find(|path| path.is_file())
                .or_else(|| on_path(name))
                .ok_or(NetworkError::Missing {
                    program: name,
                    package: name,
                })
        };
        Ok(Self {
            program: find("netavark")?,
            aardvark: find("aardvark-dns")?,
            config: directories.run().join("networks"),
            limit,
            mounts: None,
        })
    }

    /// Runs it in another mount namespace than ours: aardvark-dns outlives the pod that was the first
    /// to need it, and would keep all that the supervisor has mounted.
    #[must_use]
    pub fn in_mounts(mut self, mounts: OwnedFd) -> Self {
        self.mounts = Some(mounts);
        self
    }

    /// Runs it for the network namespace with its options, and waits for its end.
    pub(super) fn run(
        &self,
        action: Action,
        netns: BorrowedFd<'_>,
        options: &Value,
    ) -> Result<(), NetworkError> {
        let doing = || format!("running {}", self.program.display());
        crate::state::private_dir(&self.config)?;
        let input =
            memory_file("netavark-options", None, options.to_string().as_bytes()).doing(doing)?;
        let mut output = memory_file("netavark-output", Some(OUTPUT_MAX), b"").doing(doing)?;
        let mut command = Command::new(&self.program);
        command
            .arg("--config")
            .arg(&self.config)
            .args(["--rootless", "false", "--aardvark-binary"])
            .arg(&self.aardvark)
            .arg(action.as_str())
            // By our descriptor: it is the namespace whatever is mounted where.
            .arg(format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                netns.as_raw_fd()
            ))
            .env("PATH", tools())
            .current_dir("/")
            // With its helpers it can be ended as one.
            .process_group(0)
            .stdin(input)
            .stdout(output.try_clone().doing(doing)?)
            .stderr(output.try_clone().doing(doing)?);
        if let Some(mounts) = &self.mounts {
            let mounts = mounts.try_clone().doing(doing)?;
            let enter = move || {
                move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&mounts),
                    Some(LinkNameSpaceType::Mount),
                )
                .map_err(io::Error::from)
            };
            // SAFETY: setns is async-signal-safe, allocates nothing and touches no memory of ours.
            unsafe {
                command.pre_exec(enter);
            }
        }
        let mut child = command.spawn().doing(doing)?;
        let status = wait(&mut child, self.limit)
            .doing(doing)?
            .ok_or(NetworkError::TimedOut {
                action: action.as_str(),
                limit: self.limit,
            })?;
        if status.success() {
            return Ok(());
        }
        let said = read_written(&mut output).doing(doing)?;
        if let Some(missing) = self.missing_firewall(&said) {
            return Err(missing);
        }
        let words = words(&said);
        if action == Action::Teardown && nothing_there(&words) {
            return Ok(());
        }
        Err(NetworkError::Netavark {
            action: action.as_str(),
            message: reason(&words, status),
        })
    }

    /// netavark runs iptables or nft, and when that isn't there says no more than that a file isn't.
    fn missing_firewall(&self, said: &str) -> Option<NetworkError> {
        if !said.contains("No such file or directory") {
            return None;
        }
        let version = Command::new(&self.program).arg("--version").output().ok()?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        let (program, package) = firewall(&version)?;
        on_path(program)
            .is_none()
            .then_some(NetworkError::Missing { program, package })
    }
}

/// What the netavark of that version (`netavark 1.4.0`) drives, and its package.
fn firewall(version: &str) -> Option<(&'static str, &'static str)> {
    let mut numbers = version.trim().rsplit(' ').next()?.split('.');
    let version = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    Some(if version < NFTABLES_SINCE {
        ("iptables", "iptables")
    } else {
        ("nft", "nftables")
    })
}

fn tools() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push(TOOLS);
    path
}

fn on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&tools())
        .filter(|place| place.is_absolute())
        .map(|place| place.join(program))
        .find(|path| path.is_file())
}

/// A file in memory, at its start. With a size, it can't grow beyond it.
fn memory_file(name: &str, size: Option<u64>, content: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.write_all(content)?;
    if let Some(size) = size {
        file.set_len(size)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// What a child has written to a file whose position it shares.
fn read_written(file: &mut File) -> io::Result<String> {
    let length = file.stream_position()?;
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for a child; None: it took too long and was killed, with all of its group.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => break,
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // It may have ended just now.
    let _ = kill_process_group(pid, Signal::KILL);
    child.wait().map(|_| None)
}

/// netavark's own words: `{"error": "..."}` on a line; else all that was said.
fn words(said: &str) -> String {
    let error = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        Some(value.get("error")?.as_str()?.to_owned())
    };
    let found = said.lines().rev().find_map(error);
    found.unwrap_or_else(|| said.trim().to_owned())
}

/// Whether all that a teardown complains of is that something isn't there any more. It goes on after
/// each complaint, so that the rest is gone, too.
fn nothing_there(words: &str) -> bool {
    let mut complaints = words
        .lines()
        .filter(|line| !line.starts_with("netavark encountered multiple errors"))
        .peekable();
    complaints.peek().is_some()
        && complaints.all(|line| line.ends_with("(os error 2)") || line.ends_with("(os error 19)"))
}

fn reason(words: &str, status: ExitStatus) -> String {
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    if words.is_empty() {
        return format!("ended with {status} without a word");
    }
    printable(cut(&words, MESSAGE_MAX).as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use super::*;

    /// A netavark that is this script.
    fn netavark(script: &str) -> (tempfile::TempDir, Netavark) {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in [("netavark", script), ("aardvark-dns", "")] {
            let path = root.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{content}")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let run = root.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let directories = Directories::new(run, root.path().join("data"));
        let limit = Duration::from_secs(20);
        let netavark = Netavark::find_in(&[root.path()], &directories, limit).unwrap();
        (root, netavark)
    }

    fn run(netavark: &Netavark) -> Result<(), NetworkError> {
        let netns = File::open("/proc/self/ns/net").unwrap();
        netavark.run(Action::Setup, netns.as_fd(), &json!({"a": "b"}))
    }

    #[test]
    fn it_gets_its_options_and_the_namespace() {
        let (root, netavark) = netavark(
            "cat >$(dirname $0)/in; readlink $8 >$(dirname $0)/ns; echo $* >$(dirname $0)/args",
        );

        run(&netavark).unwrap();

        let read = |name| std::fs::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(read("in"), r#"{"a":"b"}"#);
        assert!(read("ns").starts_with("net:["), "{}", read("ns"));
        assert!(read("args").contains("--rootless false --aardvark-binary /"));
    }

    #[test]
    fn its_reason_is_told() {
        let (_root, netavark) =
            netavark(r#"echo noise >&2; printf '%s\n' '{"error":"no\u001b[2J\n\tway"}'; exit 1"#);

        let error = run(&netavark).unwrap_err().to_string();

        assert_eq!(error, "netavark setup: no\\u{1b}[2J way");
    }

    #[test]
    fn one_that_never_ends_is_killed_with_its_helpers() {
        let (root, mut netavark) = netavark("sleep 1000 & echo $! >$(dirname $0)/pid; wait");
        netavark.limit = Duration::from_millis(500);

        let error = run(&netavark);

        assert!(matches!(error, Err(NetworkError::TimedOut { .. })));
        let pid = std::fs::read_to_string(root.path().join("pid")).unwrap();
        let runs = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            stat.is_ok_and(|stat| !stat.contains(") Z"))
        };
        let begun = Instant::now();
        while runs() {
            assert!(begun.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn endless_output_ends() {
        let (_root, netavark) = netavark("yes no || exit 1");

        let error = run(&netavark).unwrap_err().to_string();

        assert!(error.len() < 2000 && error.contains("no no"), "{error}");
    }

    #[test]
    fn a_teardown_of_nothing_is_one() {
        let gone = "netavark encountered multiple errors:\n\t- IO error: No such file or directory \
                    (os error 2)\n\t- failed to delete container veth eth0: Netlink error: No such \
                    device (os error 19)";

        assert!(nothing_there(gone));
        assert!(!nothing_there(
            &gone.replace("(os error 2)", "(os error 13)")
        ));
        assert!(!nothing_there(""));
    }

    #[test]
    fn what_is_missing_is_named_by_its_package() {
        let (program, package) = firewall("netavark 1.4.0\n").unwrap();
        let missing = NetworkError::Missing { program, package };

        assert!(missing.to_string().contains("the package iptables"));
        assert_eq!(firewall("netavark 1.14.0"), Some(("nft", "nftables")));
        assert_eq!(firewall("odd"), None);
    }
}
