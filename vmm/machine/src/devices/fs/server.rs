//! What answers FUSE messages, and the file server that does it: `virtiofsd`, as a library.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{self, NegotiationMode, PassthroughFs};
use virtiofsd::server::Server;

use super::aside::{self, Place};
use super::checked::Checked;
use super::{FsConfig, FsError};
use crate::config::CachePolicy;

/// How long [`CachePolicy::Auto`] believes attributes and names.
const AUTO_TIMEOUT: Duration = Duration::from_secs(1);
/// How long [`CachePolicy::Always`] does.
const ALWAYS_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Answers FUSE messages, many at a time.
pub(super) trait MessageServer: Send + Sync {
    /// Reads one message, does it, writes the answer. Returns how many bytes the answer has, 0 for those that have none.
    ///
    /// # Errors
    /// When the message is malformed: nothing was done and nothing usable was written.
    fn serve(&self, session: Session, message: Reader<'_>, answer: Writer<'_>)
    -> io::Result<usize>;

    /// Forgets all that a guest held. No message is under way.
    fn reset(&self);

    /// Whether a guest has a session: inodes and files that it knows by number.
    fn is_in_session(&self) -> bool;

    /// What the guest knows by number. No message is under way.
    ///
    /// # Errors
    /// When another server could not go on with it; says why.
    fn put_down(&self) -> io::Result<Vec<u8>>;

    /// Goes on with a session that another server has put down. There has been none here.
    ///
    /// # Errors
    /// When that can't be.
    fn take_up(&self, known: &[u8]) -> io::Result<()>;
}

/// What a message does to the session between guest and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Session {
    /// Starts it (`FUSE_INIT`), or starts it anew.
    Begins,
    /// Ends it (`FUSE_DESTROY`).
    Ends,
    /// Happens in it.
    Within,
}

/// Opens the share.
pub(super) fn open(config: FsConfig) -> Result<Arc<dyn MessageServer>, FsError> {
    let Some(root) = config.root.to_str().filter(|_| config.root.is_absolute()) else {
        return Err(FsError::Root {
            tag: config.tag,
            root: config.root,
        });
    };
    let failed = |source| FsError::Open {
        tag: config.tag.clone(),
        root: config.root.clone(),
        source,
    };
    // The library opens the root when the guest mounts; that it can is to be known now.
    std::fs::read_dir(root).map_err(failed)?;

    let (timeout, cache_policy) = match config.cache {
        CachePolicy::Never => (Duration::ZERO, passthrough::CachePolicy::Never),
        CachePolicy::Auto => (AUTO_TIMEOUT, passthrough::CachePolicy::Auto),
        CachePolicy::Always => (ALWAYS_TIMEOUT, passthrough::CachePolicy::Always),
    };
    let descriptors = config.proc_self_fd.try_clone().map_err(failed)?;
    let place = Arc::new(Place {
        root: config.root.clone(),
        descriptors,
    });
    let options = passthrough::Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        // Without a page cache a shared mapping needs this; see FUSE_DIRECT_IO_ALLOW_MMAP.
        allow_mmap: config.cache == CachePolicy::Never,
        cache_policy,
        writeback: false,
        root_dir: root.to_owned(),
        xattr: true,
        proc_sfd_rawfd: Some(File::from(config.proc_self_fd)),
        announce_submounts: true,
        // A handle is opened by CAP_DAC_READ_SEARCH of the host, which this process does not have.
        inode_file_handles: passthrough::InodeFileHandlesMode::Never,
        readdirplus: true,
        allow_direct_io: true,
        killpriv_v2: true,
        posix_acl: NegotiationMode::Auto,
        security_label: NegotiationMode::Never,
        guest_fd_limit: config.guest_descriptors,
        ..passthrough::Config::default()
    };
    Ok(if config.read_only {
        let server = PassthroughFsRo::new(options).map_err(failed)?;
        Arc::new(Virtiofsd::new(server, place))
    } else {
        let server = PassthroughFs::new(options).map_err(failed)?;
        Arc::new(Virtiofsd::new(server, place))
    })
}

/// The library's server.
struct Virtiofsd<F: FileSystem + Sync> {
    server: Arc<Server<Checked<F>>>,
    place: Arc<Place>,
    /// Starting a session clears all tables and fills in the root, in steps: the library trusts a guest not to
    /// do that twice at once, nor beside other requests.
    session: RwLock<()>,
    in_session: AtomicBool,
}

impl<F: FileSystem + Sync> Virtiofsd<F> {
    fn new(file_system: F, place: Arc<Place>) -> Self {
        Self {
            server: Arc::new(Server::new(Checked::new(file_system))),
            place,
            session: RwLock::new(()),
            in_session: AtomicBool::new(false),
        }
    }
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync + 'static> MessageServer
    for Virtiofsd<F>
{
    fn serve(
        &self,
        session: Session,
        message: Reader<'_>,
        answer: Writer<'_>,
    ) -> io::Result<usize> {
        let serve = || {
            self.server
                .handle_message(message, answer, None::<&mut ()>)
                .map_err(io::Error::other)
        };
        match session {
            Session::Within => {
                let _others_too = self.session.read().unwrap_or_else(PoisonError::into_inner);
                serve()
            }
            Session::Begins | Session::Ends => {
                let _alone = self.session.write().unwrap_or_else(PoisonError::into_inner);
                self.in_session
                    .store(session == Session::Begins, Ordering::Relaxed);
                serve()
            }
        }
    }

    fn reset(&self) {
        let _alone = self.session.write().unwrap_or_else(PoisonError::into_inner);
        self.server.destroy();
        self.in_session.store(false, Ordering::Relaxed);
    }

    fn is_in_session(&self) -> bool {
        self.in_session.load(Ordering::Relaxed)
    }

    fn put_down(&self) -> io::Result<Vec<u8>> {
        let _alone = self.session.write().unwrap_or_else(PoisonError::into_inner);
        aside::put_down(Arc::clone(&self.server), &self.place)
    }

    fn take_up(&self, known: &[u8]) -> io::Result<()> {
        let _alone = self.session.write().unwrap_or_else(PoisonError::into_inner);
        aside::take_up(Arc::clone(&self.server), &self.place, known)?;
        self.in_session.store(true, Ordering::Relaxed);
        Ok(())
    }
}
