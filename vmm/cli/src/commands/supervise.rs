//! The process behind a pod, which `hull run` starts: `hull supervise`, no command for people.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use hull_pod::state::{Directories, PodId};
use hull_pod::supervisor;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::prelude::*;

use crate::Host;
use crate::failure::Failure;

const NAME: &str = "supervise";

/// What a supervisor is started with.
///
/// It is read before the command line that people write: to describe all of that takes longer than all else until a
/// supervisor is at work.
#[derive(Debug)]
pub struct Order {
    pub host: Host,
    pub id: PodId,
}

impl Order {
    /// The arguments that say it.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let directories = &self.host.directories;
        let configuration = self.host.configuration.iter();
        [
            NAME.into(),
            self.id.as_str().into(),
            directories.run().into(),
            directories.data().into(),
        ]
        .into_iter()
        .chain(configuration.map(OsString::from))
        .collect()
    }

    /// What the arguments after the program's name say. None: something else.
    #[must_use]
    pub fn read(arguments: &[OsString]) -> Option<Self> {
        let [name, id, run, data, configuration @ ..] = arguments else {
            return None;
        };
        if name != NAME || configuration.len() > 1 {
            return None;
        }
        Some(Self {
            id: PodId::try_from(id.to_str()?.to_owned()).ok()?,
            host: Host {
                directories: Directories::new(run, data),
                configuration: configuration.first().map(PathBuf::from),
                // Its starter tells when the pod's start began.
                began: 0,
            },
        })
    }

    /// Supervises the pod, to its end.
    pub fn run(&self) -> Result<(), Failure> {
        let configuration = self.host.configuration()?;
        // Not the library's filter from the environment, which brings regular expressions.
        let filter = std::env::var("HULL_LOG")
            .ok()
            .and_then(|filter| filter.parse::<Targets>().ok())
            .unwrap_or_else(|| Targets::new().with_default(configuration.log_level));
        let log = fmt::layer().with_writer(io::stderr).with_ansi(false);
        tracing_subscriber::registry().with(log).with(filter).init();
        supervisor::supervise(&self.host.directories, &self.id, configuration)
            .inspect_err(supervisor::report)
            .map_err(Failure::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(configuration: Option<&str>) -> Order {
        Order {
            host: Host {
                directories: Directories::new("/run/hull", "/var/lib/hull"),
                configuration: configuration.map(PathBuf::from),
                began: 0,
            },
            id: PodId::try_from("0123456789ab".to_owned()).unwrap(),
        }
    }

    #[test]
    fn an_order_is_read_as_it_was_written() {
        for configuration in [None, Some("/etc/hull/other.toml")] {
            let written = order(configuration).arguments();

            let read = Order::read(&written).unwrap();

            assert_eq!(format!("{read:?}"), format!("{:?}", order(configuration)));
        }
    }

    #[test]
    fn what_people_write_is_none() {
        for line in [
            vec!["run", "pod.yaml"],
            vec!["supervise"],
            vec!["supervise", "no/id", "/run/hull", "/var/lib/hull"],
        ] {
            let line: Vec<OsString> = line.into_iter().map(OsString::from).collect();
            assert!(Order::read(&line).is_none(), "{line:?}");
        }
    }
}
