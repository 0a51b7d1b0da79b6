//! A network namespace, and work in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use rtnetlink::packet_route::link::LinkFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::netlink::Netlink;
use super::{Doing, Result, WiringError};

/// The calling thread's own.
const OWN: &str = "/proc/thread-self/ns/net";
/// The process's, whatever namespace a thread is in.
const HOST: &str = "/proc/self/ns/net";

/// A network namespace, held by a descriptor: it lives at least as long as this.
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// Makes a new one, with loopback up and nothing else in it. It has no name, and is gone with
    /// the last descriptor and process in it.
    ///
    /// # Errors
    /// [`WiringError::Namespace`], without the privilege above all.
    pub fn create() -> Result<Self> {
        on_own_thread(|| {
            // SAFETY: no descriptor table is unshared, on which safety could depend.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.doing("making it")?;
            let fd = File::open(OWN).doing("opening it")?.into();
            let mut netlink = Netlink::open().doing("opening netlink")?;
            let loopback = netlink.links().doing("listing interfaces")?;
            for link in loopback {
                if link.header.flags.contains(LinkFlags::Loopback) {
                    netlink
                        .set_up(link.header.index, true)
                        .doing_to("lo", "bringing it up")?;
                }
            }
            Ok(Self { fd })
        })
    }

    /// Opens an existing one, as CNI and `ip netns` pin them.
    ///
    /// # Errors
    /// [`WiringError::BadNamespace`] if it is something else, or the namespace that this process
    /// is in: the host's interfaces are not a pod's to take.
    pub fn open(path: &Path) -> Result<Self> {
        let step = || format!("opening {}", path.display());
        let bad = |reason| WiringError::BadNamespace {
            path: path.display().to_string(),
            reason,
        };
        // Not to wait for a pipe's other end, nor to wake a device.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).doing(step())?;
        let magic = rustix::fs::fstatfs(&fd).doing(step())?.f_type;
        if magic != libc::NSFS_MAGIC {
            return Err(bad("it is no namespace"));
        }
        if kind_of(fd.as_fd()).doing(step())? != libc::CLONE_NEWNET {
            return Err(bad("it is a namespace of another kind"));
        }
        let file = File::from(fd);
        let (there, host) = (
            file.metadata().doing(step())?,
            std::fs::metadata(HOST).doing(format!("looking at {HOST}"))?,
        );
        if (there.dev(), there.ino()) == (host.dev(), host.ino()) {
            return Err(bad("it is the host's own"));
        }
        Ok(Self { fd: file.into() })
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// When there are no more.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone().doing("opening it again")?;
        Ok(Self { fd })
    }

    /// Moves the calling thread into the namespace for good, and with it all that it starts from then on. Call it
    /// before any thread is started.
    ///
    /// # Errors
    /// [`WiringError::Namespace`] if it can't be entered.
    pub fn enter(&self) -> Result<()> {
        rustix::thread::move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
            .doing("entering it")
    }

    /// Does something in the namespace, on a thread made for it: none that goes on with other work
    /// is ever in the wrong one. Blocks until it is done.
    ///
    /// # Errors
    /// [`WiringError::Namespace`] if it can't be entered, and what `work` returns.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(self.fd.as_fd(), work)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// [`Namespace::run`] for one that somebody else holds.
pub(super) fn within<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    on_own_thread(|| {
        rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
            .doing("entering it")?;
        work()
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("network".into())
            .spawn_scoped(scope, work)
            .doing("starting a thread")?
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// The CLONE_NEW flag that makes a namespace of its kind.
fn kind_of(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the descriptor is open, and this ioctl has no argument.
    match unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_NSTYPE) } {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(kind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(namespace: &Namespace) -> u64 {
        rustix::fs::fstat(namespace).unwrap().st_ino
    }

    #[test]
    fn a_new_one_is_entered_by_the_work_alone() {
        let namespace = Namespace::create().unwrap();

        let within = namespace
            .run(|| std::fs::metadata(OWN).doing("looking"))
            .unwrap();

        let outside = std::fs::metadata(OWN).unwrap();
        assert_eq!(within.ino(), inode(&namespace));
        assert_ne!(outside.ino(), inode(&namespace));
    }

    #[test]
    fn loopback_works_in_a_new_one() {
        let namespace = Namespace::create().unwrap();

        let connected = namespace.run(|| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").doing("binding")?;
            let address = listener.local_addr().doing("asking")?;
            std::net::TcpStream::connect(address).doing("connecting")
        });

        connected.unwrap();
    }

    #[test]
    fn an_existing_one_is_opened_by_its_path() {
        let namespace = Namespace::create().unwrap();
        let fd = namespace.fd.as_raw_fd();

        let opened = Namespace::open(Path::new(&format!("/proc/self/fd/{fd}"))).unwrap();

        assert_eq!(inode(&opened), inode(&namespace));
    }

    #[test]
    fn only_network_namespaces_other_than_the_hosts_are_opened() {
        for (path, reason) in [
            (HOST, "the host's own"),
            ("/proc/self/ns/uts", "of another kind"),
            ("/proc/self/status", "no namespace"),
            ("/dev/null", "no namespace"),
        ] {
            let refused = Namespace::open(Path::new(path)).unwrap_err().to_string();
            assert!(refused.contains(reason), "{path}: {refused}");
        }
        let missing = Namespace::open(Path::new("/proc/self/ns/none")).unwrap_err();
        assert!(
            missing.to_string().contains("/proc/self/ns/none"),
            "{missing}"
        );
    }
}
