//! vhost-net: the host's kernel moves packets between a tap and the guest.

use std::env;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

use serde::Deserialize;

use super::{Result, WiringError};
use crate::configuration::Configuration;

const DEVICE: &str = "/dev/vhost-net";
/// The host's choice.
const VARIABLE: &str = "HULL_VHOST_NET";

/// Whether the kernel moves packets, and not `hull-vmm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostNet {
    /// Where it can.
    #[default]
    Auto,
    /// Or there is no pod.
    On,
    Off,
}

impl VhostNet {
    /// By `HULL_VHOST_NET`: `auto`, `on` or `off`. Without it as the configuration has it.
    ///
    /// # Errors
    /// [`WiringError::BadVhost`] when it is something else.
    pub fn of(configuration: &Configuration) -> Result<Self> {
        match env::var_os(VARIABLE) {
            None => Ok(configuration.vhost_net),
            Some(value) => Self::parse(&value.to_string_lossy()),
        }
    }

    fn parse(value: &str) -> Result<Self> {
        match value {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(WiringError::BadVhost(value.into())),
        }
    }

    /// The device, opened for each pair of queues. Empty: `hull-vmm` moves packets.
    pub(super) fn open(self, queue_pairs: u8) -> Result<Vec<OwnedFd>> {
        let open = || -> io::Result<Vec<OwnedFd>> {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            (0..queue_pairs)
                .map(|_| options.open(DEVICE).map(OwnedFd::from))
                .collect()
        };
        match self {
            Self::Off => Ok(Vec::new()),
            Self::Auto => Ok(open().unwrap_or_default()),
            Self::On => open().map_err(WiringError::NoVhost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_chooses_with_three_words() {
        assert_eq!(VhostNet::parse("auto").unwrap(), VhostNet::Auto);
        assert_eq!(VhostNet::parse("on").unwrap(), VhostNet::On);
        assert_eq!(VhostNet::parse("off").unwrap(), VhostNet::Off);
        for wrong in ["", "1", "ON", "auto "] {
            assert!(matches!(
                VhostNet::parse(wrong),
                Err(WiringError::BadVhost(value)) if value == wrong
            ));
        }
    }
}
