//! What the store offers.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Digest, ImageConfiguration};
use rustix::fs::FlockOperation;

use super::layout::{self, Planned};
use super::locks::lock;
use super::refs::{Entry, Index, write_atomically};
use super::source::Source;
use super::{Image, ImageError, ImageSummary, Loaded, Progress, Removed, layer, parse};

/// Shortest prefix of an id that is taken for one, as Docker shows them.
const SHORT_ID: usize = 12;

/// The store, under `<data dir>/images`. Any number of processes may use it at once.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store of a data directory, and makes it if it isn't there.
    ///
    /// # Errors
    /// When its directories can't be made.
    pub fn open(data_dir: &Path) -> Result<Self, ImageError> {
        let store = Self {
            root: data_dir.join("images"),
        };
        let directories = [
            store.root.clone(),
            store.blobs(),
            store.layers(),
            store.path("leases"),
            store.path("tmp"),
        ];
        for directory in directories {
            let doing = format!("making {}", directory.display());
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)
                .map_err(ImageError::store(doing))?;
        }
        // Unpacked layers have setuid programs of anybody's making.
        std::fs::set_permissions(&store.root, PermissionsExt::from_mode(0o700))
            .map_err(ImageError::store("setting permissions"))?;
        Ok(store)
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
        let archive = |error: io::Error| ImageError::archive(path, error);
        let _loading = self.lock("load.lock", FlockOperation::LockExclusive)?;
        let scratch = self.path("tmp");
        empty(&scratch).map_err(ImageError::store("removing what an earlier load left"))?;
        let source = Source::open(path, &scratch).map_err(archive)?;
        let planned = layout::plan(&source).map_err(archive)?;
        let mut loaded = Vec::new();
        for image in &planned {
            let count = image.layers.len();
            for (position, part) in image.layers.iter().enumerate() {
                progress(Progress::Layer {
                    index: position + 1,
                    count,
                    digest: part.diff_id.to_string(),
                    size: part.size,
                });
                layer::install(&self.layers(), &scratch, &source, part, progress).map_err(
                    |error| ImageError::archive(path, format!("layer {}: {error}", part.file)),
                )?;
            }
            loaded.extend(self.publish(image, progress)?);
        }
        let _index = self.lock("lock", FlockOperation::LockExclusive)?;
        self.collect()?;
        Ok(loaded)
    }

    /// All images with their names, sorted by name.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let _lock = self.lock("lock", FlockOperation::LockShared)?;
        let mut images = Vec::new();
        for entry in self.index()?.images {
            let config = self.config(&entry)?;
            let size = self
                .diff_ids(&entry, &config)?
                .iter()
                .map(|id| layer::size(&self.layers(), id))
                .sum();
            images.push(ImageSummary {
                reference: entry.reference,
                id: entry.id,
                digest: entry.digest,
                size,
                created: config.created().clone(),
            });
        }
        images.sort_by(|a, b| (&a.reference, &a.id).cmp(&(&b.reference, &b.id)));
        Ok(images)
    }

    /// Takes a name away from its image, and with the last name the image. By id or
    /// digest, all names.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], and [`ImageError::InUse`] when it would be the last
    /// name of an image that a pod uses.
    pub fn remove(&self, reference: &str) -> Result<Removed, ImageError> {
        let _loading = self.lock("load.lock", FlockOperation::LockExclusive)?;
        let _lock = self.lock("lock", FlockOperation::LockExclusive)?;
        let mut index = self.index()?;
        let found = find(&index, reference)?;
        let by_name = found.reference.is_some() && !names_by_digest(reference);
        let goes = |entry: &Entry| {
            if by_name {
                *entry == found
            } else {
                entry.id == found.id
            }
        };
        let last = !index
            .images
            .iter()
            .any(|entry| entry.id == found.id && !goes(entry));
        if last && self.is_used(&found.id)? {
            return Err(ImageError::InUse(reference.to_owned()));
        }
        let untagged = index
            .images
            .iter()
            .filter(|entry| goes(entry))
            .filter_map(|entry| entry.reference.clone())
            .collect();
        index.images.retain(|entry| !goes(entry));
        self.write_index(&index)?;
        self.collect()?;
        Ok(Removed {
            untagged,
            deleted: last.then_some(found.id),
        })
    }

    /// Finds an image by name (short names as Docker has them), digest or id.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], or when the store can't be read.
    pub fn resolve(&self, reference: &str) -> Result<Image, ImageError> {
        let _lock = self.lock("lock", FlockOperation::LockShared)?;
        let entry = find(&self.index()?, reference)?;
        let lease = self.lease(&entry.id, FlockOperation::NonBlockingLockShared)?;
        let config = self.config(&entry)?;
        let layers: Vec<PathBuf> = self
            .diff_ids(&entry, &config)?
            .iter()
            .map(|id| layer::root(&self.layers(), id))
            .collect();
        if let Some(missing) = layers.iter().find(|path| !path.is_dir()) {
            return Err(ImageError::damaged(missing, "the layer is missing"));
        }
        Ok(Image {
            reference: entry.reference.unwrap_or_else(|| reference.to_owned()),
            id: entry.id,
            digest: entry.digest,
            config,
            layers,
            _lease: Arc::new(lease),
        })
    }

    /// Writes an image's documents, and then its names.
    fn publish(
        &self,
        image: &Planned,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Loaded>, ImageError> {
        for (digest, bytes) in [(&image.digest, &image.manifest), (&image.id, &image.config)] {
            let path = self.blob(digest)?;
            write_atomically(&path, bytes)
                .map_err(ImageError::store(format!("writing {}", path.display())))?;
        }
        let _lock = self.lock("lock", FlockOperation::LockExclusive)?;
        let mut index = self.index()?;
        if image.names.is_empty() {
            index.keep(&image.digest, &image.id);
        }
        for name in &image.names {
            index.tag(name, &image.digest, &image.id);
        }
        self.write_index(&index)?;
        let loaded = |reference| Loaded {
            reference,
            id: image.id.clone(),
        };
        if image.names.is_empty() {
            return Ok(vec![loaded(None)]);
        }
        for name in &image.names {
            progress(Progress::Tagged(name.clone()));
        }
        Ok(image
            .names
            .iter()
            .map(|name| loaded(Some(name.clone())))
            .collect())
    }

    /// Removes what no name stands for and nobody uses. Both locks are held.
    fn collect(&self) -> Result<(), ImageError> {
        let mut index = self.index()?;
        let mut kept = Vec::new();
        for entry in index.images.drain(..) {
            if !entry.replaced || self.is_used(&entry.id)? {
                kept.push(entry);
            }
        }
        index.images = kept;
        self.write_index(&index)?;
        let mut blobs = BTreeSet::new();
        let mut layers = BTreeSet::new();
        for entry in &index.images {
            // What is damaged can't say what it needs: then nothing is removed.
            let config = self.config(entry)?;
            layers.extend(
                self.diff_ids(entry, &config)?
                    .iter()
                    .map(|id| layer::directory(&self.layers(), id)),
            );
            blobs.extend([self.blob(&entry.digest)?, self.blob(&entry.id)?]);
        }
        self.sweep(&self.blobs(), &blobs)?;
        self.sweep(&self.layers(), &layers)?;
        let leases = index
            .images
            .iter()
            .map(|entry| self.lease_path(&entry.id))
            .collect();
        self.sweep_flat(&self.path("leases"), &leases)?;
        empty(&self.path("tmp")).map_err(ImageError::store("removing layers"))
    }

    /// Moves away what is under `<root>/<algorithm>/` and not in `keep`.
    fn sweep(&self, root: &Path, keep: &BTreeSet<PathBuf>) -> Result<(), ImageError> {
        for algorithm in children(root)? {
            self.sweep_flat(&algorithm, keep)?;
        }
        Ok(())
    }

    fn sweep_flat(&self, directory: &Path, keep: &BTreeSet<PathBuf>) -> Result<(), ImageError> {
        for path in children(directory)? {
            if keep.contains(&path) {
                continue;
            }
            // By a rename first, so that a layer is never seen half removed.
            let name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
            std::fs::rename(&path, self.path("tmp").join(name))
                .map_err(ImageError::store(format!("removing {}", path.display())))?;
        }
        Ok(())
    }

    fn is_used(&self, id: &str) -> Result<bool, ImageError> {
        match self.lease(id, FlockOperation::NonBlockingLockExclusive) {
            Ok(_) => Ok(false),
            Err(ImageError::Store { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }

    fn lease(&self, id: &str, operation: FlockOperation) -> Result<OwnedFd, ImageError> {
        let path = self.lease_path(id);
        lock(&path, operation).map_err(ImageError::store(format!("locking {}", path.display())))
    }

    fn lease_path(&self, id: &str) -> PathBuf {
        self.path("leases").join(id.replace(':', "-"))
    }

    fn lock(&self, name: &str, operation: FlockOperation) -> Result<OwnedFd, ImageError> {
        lock(&self.path(name), operation).map_err(ImageError::store(format!("locking {name}")))
    }

    fn index(&self) -> Result<Index, ImageError> {
        let path = self.path("index.json");
        Index::read(&path).map_err(ImageError::store(format!("reading {}", path.display())))
    }

    fn write_index(&self, index: &Index) -> Result<(), ImageError> {
        let path = self.path("index.json");
        index
            .write(&path)
            .map_err(ImageError::store(format!("writing {}", path.display())))
    }

    fn config(&self, entry: &Entry) -> Result<ImageConfiguration, ImageError> {
        let path = self.blob(&entry.id)?;
        let bytes = std::fs::read(&path).map_err(|error| ImageError::damaged(&path, error))?;
        serde_json::from_slice(&bytes).map_err(|error| ImageError::damaged(&path, error))
    }

    fn diff_ids(
        &self,
        entry: &Entry,
        config: &ImageConfiguration,
    ) -> Result<Vec<Digest>, ImageError> {
        let ids = config
            .rootfs()
            .diff_ids()
            .iter()
            .map(|id| id.parse::<Digest>());
        ids.collect::<Result<_, _>>()
            .map_err(|error| ImageError::damaged(Path::new(&entry.id), error))
    }

    fn blob(&self, digest: &str) -> Result<PathBuf, ImageError> {
        let parsed: Digest = digest
            .parse()
            .map_err(|error| ImageError::damaged(Path::new(digest), error))?;
        let directory = self.blobs().join(parsed.algorithm().as_ref());
        std::fs::create_dir_all(&directory)
            .map_err(ImageError::store(format!("making {}", directory.display())))?;
        Ok(directory.join(parsed.digest()))
    }

    fn blobs(&self) -> PathBuf {
        self.path("blobs")
    }

    fn layers(&self) -> PathBuf {
        self.path("layers")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// Whether an image is asked for by what it is, and not by name.
fn names_by_digest(reference: &str) -> bool {
    let hex = reference.strip_prefix("sha256:").unwrap_or(reference);
    hex.len() >= SHORT_ID
        && hex.len() <= 64
        && hex
            .bytes()
            .all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

fn find(index: &Index, reference: &str) -> Result<Entry, ImageError> {
    let entries = || index.images.iter().filter(|entry| !entry.replaced);
    let bad = |error: &dyn std::fmt::Display| ImageError::BadReference {
        reference: reference.to_owned(),
        message: error.to_string(),
    };
    let parsed = parse(reference);
    if let Ok(parsed) = &parsed {
        let whole = parsed.whole();
        let by_name = entries().find(|entry| match parsed.digest() {
            // NAME@DIGEST: the digest decides, of an image of that repository.
            Some(digest) => {
                entry.digest == digest
                    && entry
                        .reference
                        .as_deref()
                        .and_then(|name| parse(name).ok())
                        .is_some_and(|known| {
                            (known.registry(), known.repository())
                                == (parsed.registry(), parsed.repository())
                        })
            }
            None => entry.reference.as_ref() == Some(&whole),
        });
        if let Some(entry) = by_name {
            return Ok(entry.clone());
        }
    }
    if names_by_digest(reference) {
        let prefix = format!(
            "sha256:{}",
            reference.strip_prefix("sha256:").unwrap_or(reference)
        );
        let matches = |entry: &&Entry| entry.id.starts_with(&prefix) || entry.digest == prefix;
        let ids: BTreeSet<&str> = entries()
            .filter(matches)
            .map(|entry| entry.id.as_str())
            .collect();
        if ids.len() > 1 {
            return Err(bad(&"several images have an id that begins so"));
        }
        if let Some(entry) = entries().find(matches) {
            return Ok(entry.clone());
        }
    }
    match parsed {
        Ok(parsed) => Err(ImageError::NotFound(parsed.whole())),
        Err(_) if names_by_digest(reference) => Err(ImageError::NotFound(reference.to_owned())),
        Err(error) => Err(bad(&error)),
    }
}

fn children(directory: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    read().map_err(ImageError::store(format!(
        "reading {}",
        directory.display()
    )))
}

/// Removes all that is in a directory; links are removed, not followed.
fn empty(directory: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
