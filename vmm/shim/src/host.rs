//! The host as containerd sees it: the namespaces that the shim came from, for programs that are not the pod's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Held from before the shim has entered its own.
#[derive(Debug)]
pub struct Host {
    network: OwnedFd,
    mounts: OwnedFd,
}

impl Host {
    /// The namespaces that this thread is in.
    ///
    /// # Errors
    /// When they can't be opened.
    pub fn here() -> io::Result<Self> {
        Ok(Self {
            network: File::open("/proc/thread-self/ns/net")?.into(),
            mounts: File::open("/proc/thread-self/ns/mnt")?.into(),
        })
    }

    /// Lets a program start in them, at the root directory.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn enter_with(&self, command: &mut Command) -> io::Result<()> {
        let (network, mounts) = (self.network.try_clone()?, self.mounts.try_clone()?);
        let enter = move || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
            move_into_link_name_space(mounts.as_fd(), Some(LinkNameSpaceType::Mount))?;
            Ok(())
        };
        command.current_dir("/");
        // SAFETY: setns is async-signal-safe, allocates nothing and touches no memory of ours.
        unsafe {
            command.pre_exec(enter);
        }
        Ok(())
    }
}
