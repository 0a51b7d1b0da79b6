//! Container output on disk, in the format of Kubernetes' container logs.
//!
//! One file for each time that a container was started, `<restart>.log`; a line is
//! `2026-01-02T03:04:05.678901234Z stdout F text`, with `P` in place of `F` when
//! the text goes on in the next line of the same stream.

mod follow;
mod read;
mod write;

pub use follow::{Follow, follow};
pub use read::{LogLine, LogOptions, Since, read};
pub use write::{LogWriter, StreamName};

use std::path::{Path, PathBuf};

/// A longer line is split (CRI's own limit).
pub const LINE_MAX: usize = 16 * 1024;
/// So many files of earlier starts are kept.
const INSTANCES_KEPT: u32 = 4;

/// The file of a container's N-th restart.
fn instance(logs: &Path, restart: u32) -> PathBuf {
    logs.join(format!("{restart}.log"))
}

/// The restarts of which there are files, oldest first.
fn instances(logs: &Path) -> Vec<u32> {
    let mut found: Vec<u32> = std::fs::read_dir(logs)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".log")?.parse().ok())
        .collect();
    found.sort_unstable();
    found
}
