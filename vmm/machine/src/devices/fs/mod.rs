//! virtio-fs (Virtio 1.2, section 5.11): a directory tree of the host, served from this process.
//!
//! ```text
//! requests.rs    one queue: takes messages out, bounded, and gives answers back, from any thread
//! pool.rs        the threads that serve queues
//! message.rs     one FUSE message: checked, answered whatever comes
//! server.rs      what answers messages: a trait, and the file server behind it
//! checked.rs     refuses bad names and offsets before the file server sees them
//! known.rs       what a guest knows by number, in a snapshot: checked, too
//! aside.rs       puts that down, and takes it up in a clone
//! mapping.rs     guest memory as the file server wants it typed
//! ```
//!
//! The guest is hostile: a guest kernel is its tenant's. What holds whatever it sends:
//!
//! - **Names.** Every name in every operation is one component: `/`, `.`, `..`, nothing, or more than
//!   255 bytes is refused here, not left to the path walk of the host ([`checked`]).
//! - **Special files.** Only regular files and directories are ever opened; device nodes, fifos and sockets
//!   are names to the guest, which has drivers of its own for them. Device nodes are not created
//!   (the kernel would refuse it in a user namespace, too), but for the 0:0 of an overlay's whiteout.
//! - **Read-only shares** answer every change with `EROFS`, whatever the guest's mount flags say.
//! - **Descriptors.** What a guest may hold (inodes that it remembers, and open files) is bounded; past it
//!   it gets `ENFILE`, and the server's own work goes on.
//! - **Requests under way** are bounded by the size of the queue.
//!
//! Locks (`fcntl`, `flock`) are the guest kernel's own: the server doesn't offer remote locks, so they hold
//! between all containers of the pod (which see one inode for one file), never against a process of the host,
//! and no request waits for a lock. Data written is on the host when the write returns (no writeback cache),
//! so host and pod see the same file. A change on the host is seen after the time of the [`CachePolicy`].
//!
//! What differs from a local file system: a write by root of the guest takes set-id bits away, as a write by
//! others does, because the host's kernel heeds `CAP_FSETID` only in its first user namespace; `trusted` extended
//! attributes are refused for the same reason; and `O_TMPFILE` is not offered.
//!
//! # What a `FileSystem` thread needs
//! System calls, besides those of every Rust thread (memory, futex, signals, exit, `write` to stderr):
//! `epoll_wait`, `epoll_pwait`, `read`, `write` (eventfd), `unshare` (`CLONE_FS`, once, at its start), `umask`,
//! `openat`, `openat2`, `close`, `dup`, `fcntl`, `statx`, `fstat`, `newfstatat`, `fstatfs`, `getdents64`, `lseek`,
//! `preadv2`, `pwritev2`, `fallocate`, `ftruncate`, `fsync`, `fdatasync`, `syncfs`, `copy_file_range`, `fchdir`,
//! `fchmod`, `fchmodat`, `fchownat`, `utimensat`, `linkat`, `symlinkat`, `readlinkat`, `mkdirat`, `mknodat`,
//! `unlinkat`, `renameat2`, `fgetxattr`, `fsetxattr`, `flistxattr`, `fremovexattr`, `getxattr`, `setxattr`, `listxattr`,
//! `removexattr`, `pipe2`, `name_to_handle_at` (both for a snapshot), `geteuid`, `getegid`, `setresuid`, `setresgid`, `setgroups`, `capget`, `capset`, `prctl` (libcap-ng:
//! `PR_CAPBSET_READ`, `PR_CAP_AMBIENT`, `PR_GET_NO_NEW_PRIVS`), `gettid`, `getpid`.
//! Capabilities in its user namespace: `CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `SETUID`, `SETGID`, `MKNOD`,
//! `SETFCAP`; `setgroups` must not be denied there.

mod aside;
mod checked;
mod known;
mod mapping;
mod message;
mod pool;
mod requests;
mod server;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::QueueT;

use self::mapping::FileServerMemory;
use self::pool::{Pool, Threads};
use self::requests::RequestQueue;
use self::server::MessageServer;
use crate::config::CachePolicy;
use crate::virtio::device::{Activation, Suspended, VirtioDevice};

/// Virtio device id.
const DEVICE_TYPE: u32 = 26;
/// Bytes of the tag in the configuration (section 5.11.4).
const TAG_SIZE: usize = 36;
/// Size of the configuration: tag and number of request queues.
const CONFIG_SIZE: usize = TAG_SIZE + 4;
/// Queue 0 carries requests that must not wait behind others: forgetting, interrupting (section 5.11.2).
const PRIORITY_QUEUE: u16 = 0;
/// Entries of the priority queue.
const PRIORITY_QUEUE_SIZE: u16 = 128;
/// Entries of a request queue: a request of 1 MiB, the largest, is 256 pages and three headers.
const REQUEST_QUEUE_SIZE: u16 = 1024;
/// Most request queues that a device can have.
pub const MAX_REQUEST_QUEUES: u16 = 64;
/// Threads that serve the request queues: so many requests may wait for the host's disks before others wait for them.
const WORKERS: Threads = Threads { first: 2, most: 8 };
/// What it carries waits for nothing.
const PRIORITY_WORKERS: Threads = Threads { first: 1, most: 1 };

/// A share, as the process that serves it sees it.
#[derive(Debug)]
pub struct FsConfig {
    /// The mount tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory, by an absolute path in the root of this process.
    pub root: PathBuf,
    /// `/proc/self/fd` of this process, an `O_PATH` descriptor: how a file known by an `O_PATH` descriptor is opened.
    pub proc_self_fd: OwnedFd,
    /// Refuse every change.
    pub read_only: bool,
    pub cache: CachePolicy,
    /// Request queues, 1 to 64; one for each processor is best.
    pub request_queues: u16,
    /// How many descriptors the guest may hold: files open, and inodes that its kernel remembers. Leave a
    /// hundred of the process's limit for the process itself.
    pub guest_descriptors: u64,
}

/// Why a share could not be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("a share's tag has 1 to {TAG_SIZE} bytes, {0:?} has not")]
    Tag(String),
    #[error(
        "share {tag:?} asks for {queues} request queues, 1 to {MAX_REQUEST_QUEUES} are possible"
    )]
    Queues { tag: String, queues: u16 },
    #[error("the root of share {tag:?}, {root:?}, is not an absolute path in UTF-8")]
    Root { tag: String, root: PathBuf },
    #[error("share {tag:?} can't be served from {root:?}")]
    Open {
        tag: String,
        root: PathBuf,
        source: io::Error,
    },
}

/// The virtio-fs device of one share.
pub struct FileSystem {
    config_space: [u8; CONFIG_SIZE],
    queue_sizes: Vec<u16>,
    server: Arc<dyn MessageServer>,
    running: Vec<Pool>,
}

impl FileSystem {
    /// Makes the device. Call it inside the jail, where `config.root` leads to the share and nowhere else.
    ///
    /// Sets the process's umask to 0: modes are the guest's to choose.
    ///
    /// # Errors
    /// When the configuration is out of bounds, or the root can't be opened.
    pub fn new(config: FsConfig) -> Result<Self, FsError> {
        if config.tag.is_empty() || config.tag.len() > TAG_SIZE {
            return Err(FsError::Tag(config.tag));
        }
        if !(1..=MAX_REQUEST_QUEUES).contains(&config.request_queues) {
            return Err(FsError::Queues {
                tag: config.tag,
                queues: config.request_queues,
            });
        }
        let mut config_space = [0; CONFIG_SIZE];
        config_space[..config.tag.len()].copy_from_slice(config.tag.as_bytes());
        config_space[TAG_SIZE..].copy_from_slice(&u32::from(config.request_queues).to_le_bytes());
        let mut queue_sizes = vec![REQUEST_QUEUE_SIZE; usize::from(config.request_queues) + 1];
        queue_sizes[usize::from(PRIORITY_QUEUE)] = PRIORITY_QUEUE_SIZE;
        Ok(Self {
            config_space,
            queue_sizes,
            server: server::open(config)?,
            running: Vec::new(),
        })
    }
}

impl FileSystem {
    /// Has the guest go on with this share as if it were the one that it knows.
    fn go_on(&self, state: &[u8]) -> io::Result<()> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidData, why));
        let Some((config_space, known)) = state.split_first_chunk() else {
            return refused("no state");
        };
        if *config_space != self.config_space {
            return refused("its tag or the number of its queues is another");
        }
        // In the machine itself the server has not forgotten anything.
        if self.server.is_in_session() || known.is_empty() {
            return Ok(());
        }
        self.server.take_up(known)
    }
}

impl VirtioDevice for FileSystem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let tail = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.config_space.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(tail) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if let Some(state) = &activation.resumed {
            self.go_on(state)?;
        }
        let memory = Arc::new(FileServerMemory::new(&activation.memory)?);
        let event_idx = activation.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let (mut priority, mut requests) = (Vec::new(), Vec::new());
        for mut active in activation.queues {
            active.queue.set_event_idx(event_idx);
            let queues = if active.index == PRIORITY_QUEUE {
                &mut priority
            } else {
                &mut requests
            };
            queues.push(RequestQueue::new(
                active,
                activation.memory.clone(),
                Arc::clone(&memory),
            ));
        }
        for (name, queues, threads) in [
            ("fs-priority", priority, PRIORITY_WORKERS),
            ("fs-request", requests, WORKERS),
        ] {
            if !queues.is_empty() {
                self.running.push(Pool::start(
                    name,
                    queues,
                    threads,
                    Arc::clone(&self.server),
                )?);
            }
        }
        Ok(())
    }

    fn suspend(&mut self) -> io::Result<Suspended> {
        let positions = self.running.drain(..).flat_map(Pool::suspend).collect();
        let mut state = self.config_space.to_vec();
        let mut only_here = None;
        if self.server.is_in_session() {
            match self.server.put_down() {
                Ok(known) => state.extend(known),
                Err(error) => only_here = Some(error.to_string()),
            }
        }
        Ok(Suspended {
            positions,
            state,
            only_here,
        })
    }

    fn reset(&mut self) {
        // Dropping a pool ends its threads.
        self.running.clear();
        self.server.reset();
    }
}

impl fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSystem")
            .field("queue_sizes", &self.queue_sizes)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
