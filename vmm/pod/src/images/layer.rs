//! Layers of the store: each unpacked once, by the digest of its content.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::image::Digest;
use rustix::fs::Mode;
use serde::{Deserialize, Serialize};

use super::Progress;
use super::digest::Verify;
use super::layout::PlannedLayer;
use super::source::{self, Compression, Source};
use super::unpack;

/// A progress report for every so many bytes.
const REPORT: u64 = 1 << 20;
const INFO: &str = "info.json";
const ROOT: &str = "fs";

/// What is written beside a layer.
#[derive(Debug, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Bytes of its files.
    pub size: u64,
}

/// Where a layer's directory is, with its root (`fs`) and [`LayerInfo`] in it.
#[must_use]
pub fn directory(layers: &Path, diff_id: &Digest) -> PathBuf {
    layers
        .join(diff_id.algorithm().as_ref())
        .join(diff_id.digest())
}

/// The unpacked files of a layer.
#[must_use]
pub fn root(layers: &Path, diff_id: &Digest) -> PathBuf {
    directory(layers, diff_id).join(ROOT)
}

/// Bytes of a layer's files; 0 if it isn't there.
#[must_use]
pub fn size(layers: &Path, diff_id: &Digest) -> u64 {
    std::fs::read(directory(layers, diff_id).join(INFO))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<LayerInfo>(&bytes).ok())
        .map_or(0, |info| info.size)
}

/// Unpacks a layer into the store. It is there whole or not at all.
///
/// # Errors
/// When it is damaged, or can't be written.
pub fn install(
    layers: &Path,
    scratch: &Path,
    source: &Source,
    layer: &PlannedLayer,
    progress: &mut dyn FnMut(Progress),
) -> io::Result<()> {
    let target = directory(layers, &layer.diff_id);
    if target.exists() {
        progress(Progress::Present);
        return Ok(());
    }
    let work = tempfile::tempdir_in(scratch)?;
    let root_path = work.path().join(ROOT);
    std::fs::create_dir(&root_path)?;
    let root = source::open_directory(&root_path)?;
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))?;

    let (reader, size) = source.reader(&layer.file)?;
    if layer.digest.is_some() && size != layer.size {
        return Err(io::Error::other(format!(
            "it has {size} bytes, not {}",
            layer.size
        )));
    }
    let reader = Reported {
        source: reader,
        count: 0,
        told: 0,
        progress,
    };
    let size = match &layer.digest {
        Some(digest) => {
            let mut whole = Verify::new(reader, digest)?;
            let size = unpack_stream(&mut whole, &layer.diff_id, &root)?;
            whole.finish()?;
            size
        }
        None => unpack_stream(reader, &layer.diff_id, &root)?,
    };
    let info = serde_json::to_vec(&LayerInfo { size }).map_err(io::Error::other)?;
    std::fs::write(work.path().join(INFO), info)?;
    // All of it is on the disk before its name is.
    rustix::fs::syncfs(&root)?;
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::rename(work.keep(), &target)
}

fn unpack_stream(
    stream: impl Read,
    diff_id: &Digest,
    root: &std::os::fd::OwnedFd,
) -> io::Result<u64> {
    let mut stream = io::BufReader::with_capacity(128 << 10, stream);
    let compression = Compression::of(io::BufRead::fill_buf(&mut stream)?);
    let mut plain = Verify::new(compression.reader(stream)?, diff_id)?;
    let size = unpack::unpack(&mut plain, root)?;
    plain.finish()?;
    Ok(size)
}

/// Tells how much has been read.
struct Reported<'a, R> {
    source: R,
    count: u64,
    told: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl<R: Read> Read for Reported<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.count += count as u64;
        if self.count - self.told >= REPORT || (count == 0 && self.count > self.told) {
            self.told = self.count;
            (self.progress)(Progress::Bytes(self.count));
        }
        Ok(count)
    }
}
