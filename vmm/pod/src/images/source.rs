//! The files of an archive or of a layout directory, by name.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

/// An archive has a file for each layer and a few more.
const MAX_ENTRIES: usize = 100_000;
/// Links from one name of an archive to another (old `docker save`).
const MAX_LINKS: usize = 8;
/// Manifests and configurations.
pub const MAX_DOCUMENT: u64 = 4 << 20;

#[derive(Debug)]
pub enum Source {
    Directory(OwnedFd),
    Tar(TarIndex),
}

#[derive(Debug)]
pub struct TarIndex {
    file: File,
    entries: HashMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    Data { offset: u64, size: u64 },
    Link(String),
}

impl Source {
    /// Opens a directory, or an archive: plain, gzip or zstd. A compressed one is
    /// unpacked in `scratch` first, because its files are read in any order.
    ///
    /// # Errors
    /// When it can't be read, or is no tar archive.
    pub fn open(path: &Path, scratch: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let kind = file.metadata()?;
        if kind.is_dir() {
            return Ok(Self::Directory(file.into()));
        }
        if !kind.is_file() {
            return Err(io::Error::other("neither a file nor a directory"));
        }
        TarIndex::new(plain(file, scratch)?).map(Self::Tar)
    }

    /// Whether there is a file of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.reader(name).is_ok()
    }

    /// A file's content and size.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn reader(&self, name: &str) -> io::Result<(Box<dyn Read + '_>, u64)> {
        match self {
            Self::Directory(root) => {
                let fd = rustix::fs::openat2(
                    root,
                    name,
                    OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
                    Mode::empty(),
                    ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
                )?;
                let file = File::from(fd);
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    return Err(io::Error::other("not a regular file"));
                }
                Ok((Box::new(file), metadata.len()))
            }
            Self::Tar(index) => {
                let (offset, size) = index.find(name)?;
                Ok((
                    Box::new(Slice {
                        file: &index.file,
                        offset,
                        left: size,
                    }),
                    size,
                ))
            }
        }
    }

    /// A small file, whole.
    ///
    /// # Errors
    /// When there is no such file, or it is larger than any document.
    pub fn document(&self, name: &str) -> io::Result<Vec<u8>> {
        let (reader, size) = self.reader(name)?;
        if size > MAX_DOCUMENT {
            return Err(io::Error::other("too large for a document"));
        }
        let mut bytes = Vec::new();
        reader.take(MAX_DOCUMENT).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl TarIndex {
    fn new(file: File) -> io::Result<Self> {
        let mut entries = HashMap::new();
        let mut archive = tar::Archive::new(&file);
        for entry in archive.entries_with_seek()? {
            let entry =
                entry.map_err(|error| io::Error::other(format!("no tar archive: {error}")))?;
            if entries.len() == MAX_ENTRIES {
                return Err(io::Error::other("too many files in the archive"));
            }
            let name = clean(&String::from_utf8_lossy(&entry.path_bytes()));
            let kind = entry.header().entry_type();
            if kind.is_file() || kind.is_contiguous() {
                let (offset, size) = (entry.raw_file_position(), entry.size());
                entries.insert(name, Entry::Data { offset, size });
            } else if let Some(target) = entry.link_name_bytes() {
                let target = String::from_utf8_lossy(&target).into_owned();
                let base = if kind.is_hard_link() {
                    ""
                } else {
                    name.rsplit_once('/').map_or("", |(parent, _)| parent)
                };
                let target = clean(&format!("{base}/{target}"));
                entries.insert(name, Entry::Link(target));
            }
        }
        Ok(Self { file, entries })
    }

    fn find(&self, name: &str) -> io::Result<(u64, u64)> {
        let mut name = clean(name);
        for _ in 0..MAX_LINKS {
            match self.entries.get(&name) {
                Some(Entry::Data { offset, size }) => return Ok((*offset, *size)),
                Some(Entry::Link(target)) => name = target.clone(),
                None => break,
            }
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "not in the archive",
        ))
    }
}

/// A name without `.`, `..` and empty parts.
fn clean(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// A part of a file, read without moving the file's own position.
struct Slice<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Slice<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = self.file.read_at(&mut buffer[..room], self.offset)?;
        if count == 0 && room > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive is cut short",
            ));
        }
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// The archive itself, or its unpacked content.
fn plain(file: File, scratch: &Path) -> io::Result<File> {
    let mut magic = [0; 4];
    let count = file.read_at(&mut magic, 0)?;
    let compression = Compression::of(&magic[..count]);
    if compression == Compression::None {
        return Ok(file);
    }
    let mut unpacked = tempfile::tempfile_in(scratch)?;
    io::copy(&mut compression.reader(file)?, &mut unpacked)?;
    unpacked.rewind()?;
    Ok(unpacked)
}

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By a stream's first bytes. Media types are not trusted for this, and a wrong
    /// guess does no harm: the digest of the result is checked.
    #[must_use]
    pub fn of(magic: &[u8]) -> Self {
        match magic {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// # Errors
    /// When the decompressor can't be set up.
    pub fn reader<'a, R: Read + 'a>(self, source: R) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(source),
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(source)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::new(source)?),
        })
    }
}

/// Opens a directory by path, for use with the `*at` calls.
///
/// # Errors
/// When it isn't one.
pub fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned() {
        assert_eq!(clean("./a//b/../c"), "a/c");
        assert_eq!(clean("../../etc/passwd"), "etc/passwd");
    }

    #[test]
    fn a_link_loop_ends() {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for (name, target) in [("a", "b"), ("b", "a")] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, name, target).unwrap();
        }
        let mut file = builder.into_inner().unwrap();
        file.rewind().unwrap();
        let index = TarIndex::new(file).unwrap();
        assert!(index.find("a").is_err());
    }

    #[test]
    fn a_layout_directory_does_not_lead_out_of_itself() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("index.json")).unwrap();
        let source = Source::open(dir.path(), dir.path()).unwrap();
        assert!(!source.has("index.json"));
        assert!(!source.has("../../../../etc/passwd"));
    }
}
