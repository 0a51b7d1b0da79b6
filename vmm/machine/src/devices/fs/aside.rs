//! Putting down what a guest knows of a share, and taking it up in a clone: on a thread with a file server's rights,
//! which this module's callers don't have.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver};

use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use virtiofsd::filesystem::SerializableFileSystem;

use super::known::{Known, KnownError};
use crate::threads::{self, ThreadClass};

/// Bytes of what is put down, at most: some hundred thousand files.
const MAX_BYTES: u64 = 48 << 20;
/// So many files are named when there are some in the way.
const NAMED: usize = 3;
/// What the kernel says of a file's descriptor whose name is gone (proc(5)).
const DELETED: &[u8] = b" (deleted)";

/// Where the share is, to this process.
#[derive(Debug)]
pub(super) struct Place {
    pub root: PathBuf,
    /// `/proc/self/fd`
    pub descriptors: OwnedFd,
}

/// Puts down what the guest of `server` knows. No request is under way.
///
/// # Errors
/// When it can't be found out, is too much, or a file that is open has no name any more.
pub(super) fn put_down(
    server: Arc<impl SerializableFileSystem + Send + Sync + 'static>,
    place: &Arc<Place>,
) -> io::Result<Vec<u8>> {
    let (hand_over, pipe) = mpsc::channel();
    let done = with_rights(move || {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // Who doesn't listen any more has given up.
        let _ = hand_over.send(File::from(reader));
        server.prepare_serialization(Arc::new(AtomicBool::new(false)));
        server.serialize(File::from(writer))
    })?;
    let mut bytes = Vec::new();
    if let Ok(pipe) = pipe.recv() {
        pipe.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    }
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("the guest knows too many of its files"));
    }
    finished(&done)??;
    match Known::of_library(&bytes) {
        Ok(known) => known.bytes().map_err(invalid),
        Err(KnownError::Nameless) => {
            let place = Arc::clone(place);
            let names = with_rights(move || nameless(&place))?;
            Err(io::Error::other(format!(
                "{}: {}",
                KnownError::Nameless,
                finished(&names)?.unwrap_or_default().join(", ")
            )))
        }
        Err(error) => Err(invalid(error)),
    }
}

/// Has `server`, which no guest has asked for anything yet, go on with what was put down.
///
/// # Errors
/// When it is none that [`put_down`] gives, or a file that is open isn't there.
pub(super) fn take_up(
    server: Arc<impl SerializableFileSystem + Send + Sync + 'static>,
    place: &Arc<Place>,
    known: &[u8],
) -> io::Result<()> {
    let known = Known::read(known).map_err(invalid)?;
    let (hand_over, pipe) = mpsc::channel();
    let place = Arc::clone(place);
    let done = with_rights(move || {
        let root = rustix::fs::openat(CWD, &place.root, OFlags::PATH, Mode::empty())?;
        let known = known
            .retain(|path| is_there(&root, path))
            .map_err(invalid)?;
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let _ = hand_over.send((File::from(writer), known.bytes().map_err(invalid)?));
        server.deserialize_and_apply(File::from(reader))
    })?;
    if let Ok((mut pipe, bytes)) = pipe.recv() {
        // A reader that gives up says why.
        let _ = pipe.write_all(&bytes);
    }
    finished(&done)?
}

fn invalid(error: KnownError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// Does `work` where files may be opened.
fn with_rights<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Receiver<T>> {
    let (tell, done) = mpsc::channel();
    threads::spawn(ThreadClass::FileSystem, "fs-aside", move || {
        // Whoever asked waits for it.
        let _ = tell.send(work());
    })?;
    Ok(done)
}

fn finished<T>(done: &Receiver<T>) -> io::Result<T> {
    done.recv()
        .map_err(|_| io::Error::other("the file server has ended"))
}

fn is_there(root: &OwnedFd, path: &str) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), within).is_ok()
}

/// Files of the share that are open and have no name any more, by the names that they had.
fn nameless(place: &Place) -> io::Result<Vec<String>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(&place.descriptors, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::new(directory)? {
        let entry = entry?;
        let Ok(link) = rustix::fs::readlinkat(&place.descriptors, entry.file_name(), Vec::new())
        else {
            continue;
        };
        let Some(path) = link.as_bytes().strip_suffix(DELETED) else {
            continue;
        };
        let root = place.root.as_os_str().as_encoded_bytes();
        let path = path.strip_prefix(root).unwrap_or(path);
        if names.len() < NAMED && is_open(entry.file_name()) {
            let path = String::from_utf8_lossy(path);
            names.push(format!("{:?}", path.trim_start_matches('/')));
        }
    }
    Ok(names)
}

/// Whether a descriptor is of an open file, and not just of a name (`O_PATH`).
fn is_open(number: &CStr) -> bool {
    let number = number
        .to_str()
        .ok()
        .and_then(|number| number.parse::<i32>().ok());
    // SAFETY: F_GETFL looks at the descriptor's flags, whatever it is; one that isn't there is an error.
    let found = number.map(|number| unsafe { libc::fcntl(number, libc::F_GETFL) });
    found.is_some_and(|flags| flags >= 0 && flags & libc::O_PATH == 0)
}
