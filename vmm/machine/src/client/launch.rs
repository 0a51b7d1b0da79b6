//! Starting `hull-vmm`, up to the jailed process that runs the machine.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

use super::{LaunchError, MachineSpec};
use crate::channel::{AsyncChannel, Channel, ChannelError};
use crate::control::{Event, Request};

pub(super) fn start(vmm_binary: &Path) -> Result<(Child, AsyncChannel), LaunchError> {
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
pub(super) async fn jailed(
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
