//! A network namespace, held by a descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::Builder;

use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::netlink::Netlink;
use super::{Doing, NetworkError};

const NSFS_MAGIC: u64 = 0x6e73_6673;
/// `_IO(0xb7, 3)`, ioctl_ns(2).
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
/// The loopback interface is the first of every namespace.
const LOOPBACK: u32 = 1;

/// A network namespace. It lives at least as long as this does.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// The namespace at a path such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When there is none, or when it is the host's.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let file = File::options()
            .read(true)
            // A FIFO would be waited for.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .doing(|| format!("opening the network namespace {}", path.display()))?;
        if !is_network_namespace(&file) {
            return Err(NetworkError::NotANamespace(path.into()));
        }
        if is_hosts(&file).doing(|| "looking at the host's network namespace".to_owned())? {
            return Err(NetworkError::HostNamespace(path.into()));
        }
        Ok(Self { file })
    }

    /// A new one, in which only the loopback interface is, and up. Nothing but descriptors keeps it,
    /// so that it is gone when its processes are.
    ///
    /// # Errors
    /// When the caller may not.
    pub async fn create() -> Result<Self, NetworkError> {
        let doing = || "making a network namespace (needs root)".to_owned();
        let file = on_a_thread(|| {
            // SAFETY: only the thread's network namespace is unshared, no descriptor table on which
            // safety could depend.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        })
        .doing(doing)?;
        let namespace = Self { file };
        let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
        namespace
            .netlink()?
            .change(RouteNetlinkMessage::SetLink(up), 0)
            .await
            .doing(|| "bringing the loopback interface up".to_owned())?;
        Ok(namespace)
    }

    /// A path at which other processes of the host find the namespace while this lives. It is no mount,
    /// since those of a supervisor are seen by nobody else, and leaves nothing behind.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let process = std::process::id();
        format!("/proc/{process}/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Runs something short in the namespace, on a thread of its own: what a thread starts or opens
    /// afterwards must not depend on where it has been.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        on_a_thread(|| {
            rustix::thread::move_into_link_name_space(
                self.file.as_fd(),
                Some(LinkNameSpaceType::Network),
            )?;
            work()
        })
    }

    /// A netlink socket of the namespace. Needs a tokio runtime.
    pub(super) fn netlink(&self) -> Result<Netlink, NetworkError> {
        let runtime = tokio::runtime::Handle::current();
        self.run(|| {
            let _entered = runtime.enter();
            Netlink::open()
        })
        .doing(|| "opening a netlink socket in the pod's network namespace".to_owned())
    }
}

/// A thread that can't be started, or panics, is an error like any other.
fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn is_network_namespace(file: &File) -> bool {
    let is_namespace =
        rustix::fs::fstatfs(file).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(NSFS_MAGIC));
    // SAFETY: the request takes no argument, and has no effect on any kind of file that is a namespace.
    is_namespace && unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) } == libc::CLONE_NEWNET
}

/// Whether it is that of this process, or of the host's process 1.
fn is_hosts(file: &File) -> io::Result<bool> {
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let asked = identity(file.metadata()?);
    let own = identity(std::fs::metadata("/proc/self/ns/net")?);
    let first = std::fs::metadata("/proc/1/ns/net").map(identity);
    Ok(asked == own || first.is_ok_and(|first| first == asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_is_refused() {
        for path in ["/proc/self/ns/net", "/proc/thread-self/ns/net"] {
            let refused = Namespace::open(Path::new(path)).unwrap_err();

            assert!(matches!(refused, NetworkError::HostNamespace(_)), "{path}");
        }
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        for path in ["/proc/self/ns/mnt", "/dev/null", "/proc/self/status", "/"] {
            let refused = Namespace::open(Path::new(path)).unwrap_err();

            assert!(matches!(refused, NetworkError::NotANamespace(_)), "{path}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let refused = Namespace::open(Path::new("/run/netns/no-such-pod")).unwrap_err();

        assert!(refused.to_string().contains("/run/netns/no-such-pod"));
    }
}
