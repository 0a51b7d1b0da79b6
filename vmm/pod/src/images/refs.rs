//! The index of the store: which names stand for which image.

use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Index {
    pub images: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The full name; None: the image has none.
    pub reference: Option<String>,
    /// Digest of its manifest.
    pub digest: String,
    /// Digest of its configuration.
    pub id: String,
    /// Its name went to another image. It stays while a pod uses it.
    #[serde(default)]
    pub replaced: bool,
}

impl Index {
    /// # Errors
    /// When it can't be read. That there is none yet is no error.
    pub fn read(path: &Path) -> io::Result<Self> {
        match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file: readers see the old index or the new one.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_atomically(path, &serde_json::to_vec_pretty(self)?)
    }

    /// Gives an image a name, which it takes from any other.
    pub fn tag(&mut self, reference: &str, digest: &str, id: &str) {
        for entry in &mut self.images {
            if entry.reference.as_deref() == Some(reference) && entry.digest != digest {
                entry.reference = None;
                entry.replaced = true;
            }
        }
        let named = Entry {
            reference: Some(reference.to_owned()),
            digest: digest.to_owned(),
            id: id.to_owned(),
            replaced: false,
        };
        if !self.images.contains(&named) {
            self.images.push(named);
        }
        // With a name, it needs no entry without.
        self.images
            .retain(|entry| entry.digest != digest || entry.reference.is_some());
    }

    /// Keeps an image that has no name.
    pub fn keep(&mut self, digest: &str, id: &str) {
        if !self
            .images
            .iter()
            .any(|entry| entry.digest == digest && !entry.replaced)
        {
            self.images.retain(|entry| entry.digest != digest);
            let (digest, id) = (digest.to_owned(), id.to_owned());
            self.images.push(Entry {
                reference: None,
                digest,
                id,
                replaced: false,
            });
        }
    }
}

/// Writes a file so that its name always stands for a whole content.
///
/// # Errors
/// When it can't be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    std::fs::File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_moves_to_the_newer_image() {
        let mut index = Index::default();
        index.tag("a:1", "sha256:old", "id-old");
        index.tag("a:1", "sha256:new", "id-new");
        index.tag("a:1", "sha256:new", "id-new");
        let named: Vec<_> = index
            .images
            .iter()
            .filter(|entry| entry.reference.is_some())
            .collect();
        assert_eq!(named.len(), 1);
        assert_eq!(named[0].digest, "sha256:new");
        assert!(
            index
                .images
                .iter()
                .any(|entry| entry.digest == "sha256:old" && entry.replaced)
        );
    }

    #[test]
    fn an_image_with_a_name_has_no_entry_without() {
        let mut index = Index::default();
        index.keep("sha256:x", "id");
        index.keep("sha256:x", "id");
        assert_eq!(index.images.len(), 1);
        index.tag("a:1", "sha256:x", "id");
        index.keep("sha256:x", "id");
        assert_eq!(index.images.len(), 1);
        assert_eq!(index.images[0].reference.as_deref(), Some("a:1"));
    }

    #[test]
    fn the_index_survives_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        assert!(Index::read(&path).unwrap().images.is_empty());
        let mut index = Index::default();
        index.tag("a:1", "sha256:x", "id");
        index.write(&path).unwrap();
        assert_eq!(Index::read(&path).unwrap().images, index.images);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
