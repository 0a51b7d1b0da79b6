//! The local image store: load, list, remove, and layers unpacked once.
//!
//! ```text
//! images/
//!   index.json                names, replaced atomically
//!   blobs/sha256/HEX          manifests and configurations
//!   layers/sha256/HEX/fs      unpacked layers by diff id, shared by all images
//!   leases/HEX                locked (shared) by whoever uses the image of this id
//!   tmp/                      what is not finished
//!   lock, load.lock           see `locks`
//! ```

mod digest;
mod error;
mod layer;
mod layout;
mod locks;
mod reference;
mod refs;
mod source;
mod store;
#[cfg(test)]
pub(crate) mod tests;
mod unpack;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use error::ImageError;
use oci_spec::image::ImageConfiguration;
pub use reference::parse;
pub use store::Store;
#[cfg(test)]
pub(crate) use tests::test_image;

/// An image that is ready for use. As long as it (or a clone of it) exists, no
/// process removes its layers.
#[derive(Debug, Clone)]
pub struct Image {
    /// The full name, for example `docker.io/library/busybox:latest`, or what it was
    /// asked for by.
    pub reference: String,
    /// Digest of the image's configuration (what Docker calls the image ID).
    pub id: String,
    /// Digest of its manifest.
    pub digest: String,
    pub config: ImageConfiguration,
    /// Unpacked layers, lowest first. May be empty.
    pub layers: Vec<PathBuf>,
    /// Locked, shared.
    _lease: Arc<OwnedFd>,
}

/// What `hull images` lists.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ImageSummary {
    /// None: it has no name, or lost it to another image while a pod used it.
    pub reference: Option<String>,
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
    /// So many bytes of that layer are read, of `size` above.
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
