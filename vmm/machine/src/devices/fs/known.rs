//! What a guest knows of a share by number, put down so that another server can go on with it: inodes by their paths,
//! and open files by how they were opened.
//!
//! The library writes it, in postcard's form. It is read here before it goes into a snapshot, since not all of it can,
//! and before the library takes it in a clone: whoever wrote it may have been a guest that owned its `hull-vmm`,
//! and the library opens by the names in it, and panics where numbers are there twice. The types are the library's
//! (`passthrough::device_state::serialized`); a version of it that has others doesn't read what this one wrote.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::checked;

const ROOT: u64 = 1;
/// Most names on the way to a file. The host's kernel takes no more in one path.
const MAX_DEPTH: usize = 2048;
/// How a file is opened in a clone: it is there, and what is in it stays.
const NEVER: i32 =
    libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Versions {
    V1(Tables),
    V2(Tables, BTreeMap<u64, String>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tables {
    inodes: Vec<Inode>,
    next_inode: u64,
    handles: Vec<Handle>,
    next_handle: u64,
    negotiated: Negotiated,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Negotiated {
    writeback: bool,
    announce_submounts: bool,
    posix_acl: bool,
    sup_group_extension: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Inode {
    id: u64,
    refcount: u64,
    location: Location,
    file_handle: Option<FileHandle>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Location {
    Root,
    Path { parent: u64, name: String },
    Lost,
    FullPath { path: String },
    Handle { handle: FileHandle },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileHandle {
    mount: u64,
    kind: i32,
    handle: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Handle {
    id: u64,
    inode: u64,
    source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    Opened { flags: i32 },
}

/// Why nobody goes on with what was put down.
#[derive(Debug, thiserror::Error)]
pub(super) enum KnownError {
    #[error("it has no form of the file server's")]
    Form,
    #[error("{0} is in it, which the file server never writes")]
    Forged(&'static str),
    #[error("{0:?} is open in the guest, and isn't there any more")]
    Gone(String),
    #[error("a file is open in the guest that has no name any more")]
    Nameless,
}

/// What a guest knows, each number once, each path within the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known(Tables);

impl Known {
    /// Reads what the library has put down, and leaves out files that nobody has open and that have no name: the guest's
    /// kernel remembers them, and finds on its next look that they are gone.
    ///
    /// # Errors
    /// When a file without a name is open, or it is none that this library writes.
    pub(super) fn of_library(bytes: &[u8]) -> Result<Self, KnownError> {
        let mut tables = tables(bytes)?;
        let mut lost: BTreeSet<u64> = BTreeSet::new();
        // With what is below: as often as directories are nested.
        loop {
            let before = lost.len();
            for inode in &tables.inodes {
                let is_lost = match &inode.location {
                    Location::Lost => true,
                    Location::Path { parent, .. } => lost.contains(parent),
                    _ => false,
                };
                if is_lost {
                    lost.insert(inode.id);
                }
            }
            if lost.len() == before {
                break;
            }
        }
        let mut handles = tables.handles.iter();
        if handles.any(|handle| lost.contains(&handle.inode)) {
            return Err(KnownError::Nameless);
        }
        tables.inodes.retain(|inode| !lost.contains(&inode.id));
        Self::checked(tables)
    }

    /// Reads what [`Self::bytes`] has written, or somebody else.
    ///
    /// # Errors
    /// When the library could not go on with it.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, KnownError> {
        Self::checked(tables(bytes)?)
    }

    fn checked(tables: Tables) -> Result<Self, KnownError> {
        let forged = |what| Err(KnownError::Forged(what));
        let mut children: BTreeMap<u64, u64> = BTreeMap::new();
        let mut parents: BTreeMap<u64, u64> = BTreeMap::new();
        let mut roots = 0;
        for inode in &tables.inodes {
            if inode.id == 0
                || inode.id >= tables.next_inode.max(ROOT + 1)
                || inode.file_handle.is_some()
            {
                return forged("an inode of a number that nobody gave");
            }
            let parent = match &inode.location {
                Location::Root if inode.id == ROOT => {
                    roots += 1;
                    ROOT
                }
                Location::Path { parent, name } if inode.id != ROOT => {
                    if checked::is_name(name.as_bytes()).is_err() || name.contains('\0') {
                        return forged("a name that is none");
                    }
                    *children.entry(*parent).or_default() += 1;
                    *parent
                }
                _ => return forged("an inode without a path"),
            };
            if parents.insert(inode.id, parent).is_some() {
                return forged("an inode that is there twice");
            }
        }
        if roots != 1 {
            return forged("no root");
        }
        // Each inode holds its parent.
        for inode in &tables.inodes {
            if inode.refcount < children.remove(&inode.id).unwrap_or(0).max(1) {
                return forged("an inode that nobody holds");
            }
        }
        if !children.is_empty() || !all_end_at_root(&parents) {
            return forged("a path that doesn't begin at the root");
        }
        let mut handles = BTreeSet::new();
        for handle in &tables.handles {
            let Source::Opened { flags } = handle.source;
            let known = parents.contains_key(&handle.inode) && handle.id < tables.next_handle;
            if !known || flags & NEVER != 0 || !handles.insert(handle.id) {
                return forged("an open file that nobody can have opened");
            }
        }
        Ok(Self(tables))
    }

    /// As the library reads it.
    ///
    /// # Errors
    /// Never, but for want of memory.
    pub(super) fn bytes(&self) -> Result<Vec<u8>, KnownError> {
        postcard::to_allocvec(&Versions::V2(self.0.clone(), BTreeMap::new()))
            .map_err(|_| KnownError::Form)
    }

    /// Leaves out what is not there, as `is_there` says of paths below the root: nobody has it open, and the guest's
    /// kernel finds that it is gone.
    ///
    /// # Errors
    /// When somebody has one of these open, or something below it.
    pub(super) fn retain(
        mut self,
        mut is_there: impl FnMut(&str) -> bool,
    ) -> Result<Self, KnownError> {
        let tables = &mut self.0;
        let paths = paths(&tables.inodes);
        let gone: BTreeSet<u64> = paths
            .iter()
            .filter(|(id, path)| **id != ROOT && !is_there(path))
            .map(|(id, _)| *id)
            .collect();
        if let Some(open) = tables
            .handles
            .iter()
            .find(|handle| gone.contains(&handle.inode))
        {
            let path = paths.get(&open.inode).cloned().unwrap_or_default();
            return Err(KnownError::Gone(path));
        }
        let mut released: BTreeMap<u64, u64> = BTreeMap::new();
        for inode in &tables.inodes {
            if let Location::Path { parent, .. } = &inode.location
                && gone.contains(&inode.id)
            {
                *released.entry(*parent).or_default() += 1;
            }
        }
        tables.inodes.retain(|inode| !gone.contains(&inode.id));
        for inode in &mut tables.inodes {
            let fewer = released.get(&inode.id).copied().unwrap_or(0);
            inode.refcount = inode.refcount.saturating_sub(fewer).max(1);
        }
        Self::checked(self.0)
    }
}

fn tables(bytes: &[u8]) -> Result<Tables, KnownError> {
    match postcard::take_from_bytes(bytes) {
        Ok((Versions::V2(tables, mounts), [])) if mounts.is_empty() => Ok(tables),
        _ => Err(KnownError::Form),
    }
}

/// Whether each way up comes to the root, and none is too long.
fn all_end_at_root(parents: &BTreeMap<u64, u64>) -> bool {
    let mut depths = BTreeMap::from([(ROOT, 0)]);
    for id in parents.keys() {
        let mut way = Vec::new();
        let mut at = *id;
        let above = loop {
            if let Some(depth) = depths.get(&at) {
                break *depth;
            }
            way.push(at);
            match parents.get(&at) {
                Some(parent) if way.len() <= MAX_DEPTH => at = *parent,
                _ => return false,
            }
        };
        if above + way.len() > MAX_DEPTH {
            return false;
        }
        depths.extend(way.iter().rev().copied().zip(above + 1..));
    }
    true
}

/// Of inodes whose ways are known to be good: their paths below the root.
fn paths(inodes: &[Inode]) -> BTreeMap<u64, String> {
    let ways: BTreeMap<u64, (u64, &str)> = inodes
        .iter()
        .filter_map(|inode| match &inode.location {
            Location::Path { parent, name } => Some((inode.id, (*parent, name.as_str()))),
            _ => None,
        })
        .collect();
    let path = |id: u64| {
        let mut names = Vec::new();
        let mut at = id;
        while let Some((parent, name)) = ways.get(&at) {
            names.push(*name);
            at = *parent;
        }
        names.reverse();
        names.join("/")
    };
    inodes
        .iter()
        .map(|inode| (inode.id, path(inode.id)))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inode(id: u64, refcount: u64, location: Location) -> Inode {
        Inode {
            id,
            refcount,
            location,
            file_handle: None,
        }
    }

    fn path(parent: u64, name: &str) -> Location {
        Location::Path {
            parent,
            name: name.into(),
        }
    }

    fn handle(id: u64, inode: u64, flags: i32) -> Handle {
        Handle {
            id,
            inode,
            source: Source::Opened { flags },
        }
    }

    /// `dir/file`, which is open, and `other`.
    fn sample() -> Tables {
        Tables {
            inodes: vec![
                inode(ROOT, 4, Location::Root),
                inode(2, 2, path(ROOT, "dir")),
                inode(3, 1, path(2, "file")),
                inode(4, 1, path(ROOT, "other")),
            ],
            next_inode: 5,
            handles: vec![handle(0, 3, libc::O_RDWR)],
            next_handle: 1,
            negotiated: Negotiated {
                writeback: false,
                announce_submounts: true,
                posix_acl: true,
                sup_group_extension: false,
            },
        }
    }

    fn written(tables: &Tables) -> Vec<u8> {
        postcard::to_allocvec(&Versions::V2(tables.clone(), BTreeMap::new())).unwrap()
    }

    fn refused(change: impl FnOnce(&mut Tables)) {
        let mut tables = sample();
        change(&mut tables);
        assert!(Known::read(&written(&tables)).is_err(), "{tables:?}");
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = written(&sample());

        assert_eq!(Known::read(&bytes).unwrap().bytes().unwrap(), bytes);
    }

    #[test]
    fn what_the_library_never_writes_is_refused() {
        for name in ["..", ".", "", "a/b", "/etc", "a\0b", &"x".repeat(256)] {
            refused(|tables| tables.inodes[2].location = path(2, name));
        }
        refused(|tables| tables.inodes[2].location = path(3, "itself"));
        refused(|tables| tables.inodes[2].location = path(9, "nowhere"));
        refused(|tables| {
            tables.inodes[1].location = path(3, "round");
            tables.inodes[2].refcount = 2;
        });
        refused(|tables| tables.inodes[2].id = 4);
        refused(|tables| tables.inodes[2].id = 5);
        refused(|tables| tables.inodes[2].refcount = 0);
        refused(|tables| tables.inodes[0].refcount = 1);
        refused(|tables| drop(tables.inodes.remove(0)));
        refused(|tables| tables.inodes[2].location = Location::Root);
        refused(|tables| tables.inodes[2].location = Location::Lost);
        refused(|tables| {
            tables.inodes[2].location = Location::FullPath {
                path: "../../etc/shadow".into(),
            }
        });
        for flags in [libc::O_CREAT, libc::O_TRUNC, libc::O_TMPFILE | libc::O_RDWR] {
            refused(|tables| tables.handles[0] = handle(0, 3, flags));
        }
        refused(|tables| tables.handles[0] = handle(0, 9, 0));
        refused(|tables| tables.handles[0] = handle(1, 3, 0));
        refused(|tables| tables.handles.push(handle(0, 3, 0)));
        let mounts = BTreeMap::from([(1, "/etc".to_owned())]);
        let bytes = postcard::to_allocvec(&Versions::V2(sample(), mounts)).unwrap();
        assert!(Known::read(&bytes).is_err());
        let bytes = postcard::to_allocvec(&Versions::V1(sample())).unwrap();
        assert!(Known::read(&bytes).is_err());
    }

    #[test]
    fn directories_are_opened_as_such() {
        let mut tables = sample();
        tables.handles[0] = handle(0, 2, libc::O_DIRECTORY);

        assert!(Known::read(&written(&tables)).is_ok());
    }

    #[test]
    fn lost_files_are_left_out_unless_they_are_open() {
        let mut tables = sample();
        tables.inodes[3].location = Location::Lost;
        let known = Known::of_library(&written(&tables)).unwrap();
        assert_eq!(known.0.inodes.len(), 3);
        let mut below = tables.clone();
        below.inodes.insert(0, inode(1000, 1, path(4, "below")));
        below.next_inode = 1001;
        assert_eq!(Known::of_library(&written(&below)).unwrap(), {
            let mut known = known.clone();
            known.0.next_inode = 1001;
            known
        });

        tables.handles.push(handle(0, 4, 0));

        let refused = Known::of_library(&written(&tables));
        assert!(matches!(refused, Err(KnownError::Nameless)));
    }

    #[test]
    fn files_that_are_gone_are_left_out_unless_they_are_open() {
        let known = Known::read(&written(&sample())).unwrap();

        let left = known.clone().retain(|path| path != "other").unwrap();
        assert_eq!(left.0.inodes.len(), 3);
        assert_eq!(left.0.inodes[0].refcount, 3);

        let refused = known.retain(|path| path != "dir/file");
        assert!(matches!(refused, Err(KnownError::Gone(path)) if path == "dir/file"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            // A panic is the failure.
            drop(Known::read(&bytes));
            drop(Known::of_library(&bytes));
        }

        #[test]
        fn what_is_read_of_changed_bytes_stays_in_the_share(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = written(&sample());
            for (place, value) in changes {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }

            if let Ok(known) = Known::read(&bytes) {
                for path in paths(&known.0.inodes).values() {
                    let outside = path.split('/').any(|name| name == ".." || name == ".");
                    prop_assert!(!outside && !path.starts_with('/'), "{path}");
                }
                prop_assert_eq!(Known::read(&known.bytes().unwrap()).unwrap(), known);
            }
        }
    }
}
