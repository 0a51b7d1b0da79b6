//! The start of a pod, moment by moment: kept as a file with the pod's state, and shown by `hull timeline`.
//!
//! A [`Recorder`] notes it while it happens, and writes it once, when the start is over. All times are taken on the
//! host's `CLOCK_MONOTONIC`; those of the guest's clock are put there by [`GuestClock`]. What `hull-vmm` and the guest
//! say is for looking at, and whatever they say lies between the machine's start and the moment when they said it.

mod guest;
mod recorder;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use guest::GuestClock;
pub use hull_machine::steps::now_micros;
pub use recorder::{Recorder, RunningStep};

use crate::state::StateError;

/// The file's name.
pub const FILE: &str = "timeline.json";
/// No timeline is longer, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// Steps that are kept of one start.
const STEPS_MAX: usize = 128;

/// The moments that every start has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mark {
    /// `hull run` began, or containerd asked for the pod's first container.
    #[serde(rename = "T0")]
    Request,
    /// The machine's processors were let into the guest.
    #[serde(rename = "T1")]
    FirstRun,
    /// The guest kernel's clock began, which it does after its memory. A clone has none: its kernel has begun long before.
    #[serde(rename = "T2")]
    Kernel,
    /// The agent's first instruction. A clone has none.
    #[serde(rename = "T3")]
    Agent,
    /// The agent has answered.
    #[serde(rename = "T4")]
    Answer,
    /// The pod's namespaces are there.
    #[serde(rename = "T5")]
    Infra,
    /// The first container's program runs.
    #[serde(rename = "T6")]
    Exec,
    /// The first byte that a container has printed is on the host.
    #[serde(rename = "T7")]
    Output,
}

impl Mark {
    pub const ALL: [Self; 8] = [
        Self::Request,
        Self::FirstRun,
        Self::Kernel,
        Self::Agent,
        Self::Answer,
        Self::Infra,
        Self::Exec,
        Self::Output,
    ];

    /// As it is called in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["T0", "T1", "T2", "T3", "T4", "T5", "T6", "T7"][self as usize]
    }

    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::FirstRun => "first KVM_RUN",
            Self::Kernel => "kernel entry",
            Self::Agent => "agent's first instruction",
            Self::Answer => "agent answers",
            Self::Infra => "infra up",
            Self::Exec => "first container exec'd",
            Self::Output => "its first byte out",
        }
    }
}

/// Where a step was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The command `hull run`.
    Hull,
    /// The pod's supervisor, or its shim.
    Supervisor,
    HullVmm,
    Guest,
}

impl Place {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hull => "hull run",
            Self::Supervisor => "supervisor",
            Self::HullVmm => "hull-vmm",
            Self::Guest => "guest",
        }
    }
}

/// How a pod started. Times are microseconds since [`Mark::Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timeline {
    /// When [`Mark::Request`] was.
    pub requested: Timestamp,
    /// In their order. A start that failed, and that of a clone, lack some.
    pub stamps: Vec<Stamp>,
    /// By their beginnings. Some overlap.
    pub steps: Vec<Step>,
    pub cpu: CpuTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stamp {
    pub stamp: Mark,
    pub at_micros: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    pub place: Place,
    pub name: String,
    pub at_micros: u64,
    pub took_micros: u64,
}

/// What the start has used of processors, up to [`Mark::Exec`], in microseconds. None: it didn't come so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuTime {
    pub supervisor_micros: Option<u64>,
    /// `hull-vmm`, the guest included.
    pub vmm_micros: Option<u64>,
}

/// Why there is no timeline to look at.
#[derive(Debug, thiserror::Error)]
pub enum TimelineError {
    #[error("{}: the pod has no timeline yet: it is written when the start is over", .0.display())]
    None(PathBuf),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("{}: it is no timeline", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl Timeline {
    /// Reads one: the file, or the directory that it is in.
    ///
    /// # Errors
    /// When it isn't there, or isn't one.
    pub fn read(path: &Path) -> Result<Self, TimelineError> {
        let path = if path.is_dir() {
            path.join(FILE)
        } else {
            path.to_owned()
        };
        let mut content = Vec::new();
        match File::open(&path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut content)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(TimelineError::None(path));
            }
            Err(error) => return Err(StateError::io("read", &path, error).into()),
        }
        serde_json::from_slice(&content).map_err(|source| TimelineError::Malformed { path, source })
    }

    /// When something was.
    #[must_use]
    pub fn at(&self, mark: Mark) -> Option<u64> {
        let stamp = self.stamps.iter().find(|stamp| stamp.stamp == mark)?;
        Some(stamp.at_micros)
    }

    /// The last moment of it.
    #[must_use]
    pub fn end(&self) -> u64 {
        let stamps = self.stamps.iter().map(|stamp| stamp.at_micros);
        let steps = self.steps.iter();
        let steps = steps.map(|step| step.at_micros.saturating_add(step.took_micros));
        stamps.chain(steps).max().unwrap_or(0)
    }
}
