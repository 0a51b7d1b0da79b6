//! A guest that speaks FUSE by hand, and what it finds.

mod files;
mod hostile;
mod snapshots;
mod threads;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::driver_queue::{DriverQueue, Interrupts};
use crate::memory::GuestRam;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const REMOVEXATTR: u32 = 24;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const SETLKW: u32 = 33;
const CREATE: u32 = 35;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;
const ROOT: u64 = 1;
const ATOMIC_O_TRUNC: u32 = 1 << 3;
const POSIX_ACL: u32 = 1 << 20;

/// Where requests and answers lie in the guest's memory.
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x30_0000;
const ANSWER_SIZE: u32 = 0x10_1000;

/// A guest that speaks FUSE by hand.
struct Guest {
    memory: GuestRam,
    requests: DriverQueue,
    _priority: DriverQueue,
    unique: u64,
    uid: u32,
    gid: u32,
    device: FileSystem,
}

impl Guest {
    fn new(share: &Path, read_only: bool) -> Self {
        Self::with(config(share, read_only))
    }

    fn with(config: FsConfig) -> Self {
        let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x50_0000)]).unwrap();
        let mut guest = Self {
            requests: DriverQueue::new(&memory, 0x1_0000, 64),
            _priority: DriverQueue::new(&memory, 0, 16),
            memory,
            unique: 1,
            uid: 0,
            gid: 0,
            device: FileSystem::new(config).unwrap(),
        };
        guest.boot();
        guest
    }

    /// Has the device stand still, and gives what there is to go on with.
    fn suspend(&mut self) -> Suspended {
        self.device.suspend().unwrap()
    }

    /// Goes on with another device, of this share.
    fn go_on(&mut self, share: &Path, state: Vec<u8>) -> io::Result<()> {
        self.device = FileSystem::new(config(share, false)).unwrap();
        self.activate(Some(state))
    }

    /// Activates the device and mounts.
    fn boot(&mut self) {
        self.activate(None).unwrap();
        self.mount();
    }

    /// Activates the device, on empty queues.
    fn activate(&mut self, resumed: Option<Vec<u8>>) -> io::Result<()> {
        self.requests = DriverQueue::new(&self.memory, 0x1_0000, 64);
        self.memory
            .write_slice(&[0; 0x4000], GuestAddress(0x1_0000))
            .unwrap();
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.device.features(),
            queues: vec![self._priority.activate(0), self.requests.activate(1)],
            config_interrupt: Interrupts::new(),
            resumed,
        };
        self.device.activate(activation)
    }

    /// Starts a session; returns the flags that both know.
    fn mount(&mut self) -> u32 {
        // Major 7, minor 38; ACLs and what belongs to them, submounts, kill-priv v2, xattr flags, extended init.
        let flags: u32 = 1 << 6 | 1 << 13 | 1 << 20 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30;
        let mut body = numbers(&[7, 38, 0x2_0000, flags | ATOMIC_O_TRUNC, 0]);
        body.extend([0; 44]);
        u32_at(&self.call(INIT, 0, &body).unwrap(), 12)
    }

    /// Sends a message, and takes the answer or the errno.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let message = self.message(opcode, node, body);
        let length = self.send(&message, ANSWER_SIZE);
        let mut answer = vec![0; usize::try_from(length).unwrap()];
        self.memory
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .unwrap();
        assert!(answer.len() >= 16, "no answer to operation {opcode}");
        assert_eq!(
            u64_at(&answer, 8),
            self.unique,
            "an answer to something else"
        );
        match u32_at(&answer, 4).cast_signed() {
            0 => Ok(answer.split_off(16)),
            errno => Err(-errno),
        }
    }

    fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let length = u32::try_from(40 + body.len()).unwrap();
        let mut message = numbers(&[length, opcode]);
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend(numbers(&[self.uid, self.gid, 1, 0]));
        message.extend(body);
        message
    }

    /// Sends bytes; returns how many came back.
    fn send(&mut self, message: &[u8], answer_size: u32) -> u32 {
        self.memory
            .write_slice(message, GuestAddress(REQUEST))
            .unwrap();
        let length = u32::try_from(message.len()).unwrap();
        self.requests
            .offer(&[(REQUEST, length)], &[(ANSWER, answer_size)]);
        self.requests.kick();
        self.requests.wait_used().1
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(LOOKUP, parent, &names(&[name.as_bytes()]))
            .map(|entry| u64_at(&entry, 0))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(OPEN, node, &numbers(&[flags.cast_unsigned(), 0]))
            .map(|answer| u64_at(&answer, 0))
    }

    /// Makes a file; returns its node and an open handle.
    fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = libc::O_RDWR.cast_unsigned();
        self.call(
            CREATE,
            parent,
            &with_name(&numbers(&[flags, mode, 0, 0]), name),
        )
        .map(|answer| (u64_at(&answer, 0), u64_at(&answer, 128)))
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let body = transfer(handle, offset, u32::try_from(data.len()).unwrap(), data);
        self.call(WRITE, node, &body)
            .map(|answer| u32_at(&answer, 0))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.call(READ, node, &transfer(handle, offset, size, &[]))
    }

    fn works(&mut self) -> bool {
        self.call(STATFS, ROOT, &[]).is_ok() && self.lookup(ROOT, "file").is_ok()
    }
}

/// A share with a file and a directory, beside something that is not shared.
fn tree() -> TempDir {
    let tree = TempDir::new().unwrap();
    fs::create_dir_all(tree.path().join("share/dir")).unwrap();
    fs::write(tree.path().join("share/file"), "content").unwrap();
    fs::write(tree.path().join("share/dir/b"), "deep").unwrap();
    fs::create_dir(tree.path().join("outside")).unwrap();
    fs::write(tree.path().join("outside/secret"), "secret").unwrap();
    tree
}

fn config(share: &Path, read_only: bool) -> FsConfig {
    FsConfig {
        tag: "hull".into(),
        root: share.into(),
        proc_self_fd: rustix::fs::openat(
            CWD,
            "/proc/self/fd",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap(),
        read_only,
        cache: CachePolicy::Auto,
        request_queues: 1,
        guest_descriptors: 1000,
    }
}

/// All that is in a tree, with types, modes and contents.
fn snapshot(root: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        let content = match metadata.file_type() {
            kind if kind.is_file() => fs::read(&path).unwrap(),
            kind if kind.is_dir() => {
                found.extend(snapshot(&path));
                Vec::new()
            }
            _ => Vec::new(),
        };
        found.insert(path.display().to_string(), (metadata.mode(), content));
    }
    found
}

fn numbers(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn names(values: &[&[u8]]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|name| [name, b"\0".as_slice()].concat())
        .collect()
}

fn with_name(body: &[u8], name: &str) -> Vec<u8> {
    [body, &names(&[name.as_bytes()])].concat()
}

fn transfer(handle: u64, offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
    let mut body = longs(&[handle, offset]);
    body.extend(numbers(&[size, 0, 0, 0, 0, 0]));
    body.extend(data);
    body
}

/// `struct fuse_setattr_in`: size 0 and mode 0, as far as `valid` says.
fn setattr(valid: u32) -> Vec<u8> {
    let mut body = numbers(&[valid, 0]);
    body.extend([0; 80]);
    body
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Every operation that has a name, with this one in it.
fn operations_with(name: &[u8], node: u64) -> Vec<(u32, Vec<u8>)> {
    let one = names(&[name]);
    let after = |body: &[u8]| [body, &one].concat();
    let first = names(&[name, b"new"]);
    let second = names(&[b"file", name]);
    let new_parent = longs(&[ROOT]);
    let exchange = [longs(&[ROOT]), numbers(&[2, 0])].concat();
    let whiteout = [longs(&[ROOT]), numbers(&[4, 0])].concat();
    let create = numbers(&[libc::O_RDWR.cast_unsigned(), 0o644, 0, 0]);
    vec![
        (LOOKUP, one.clone()),
        (SYMLINK, names(&[name, b"target"])),
        (MKNOD, after(&numbers(&[libc::S_IFREG | 0o644, 0, 0, 0]))),
        (MKDIR, after(&numbers(&[0o755, 0]))),
        (UNLINK, one.clone()),
        (RMDIR, one.clone()),
        (RENAME, [new_parent.clone(), first.clone()].concat()),
        (RENAME, [new_parent, second.clone()].concat()),
        (RENAME2, [exchange.clone(), first.clone()].concat()),
        (RENAME2, [exchange, second.clone()].concat()),
        (RENAME2, [whiteout.clone(), first].concat()),
        (RENAME2, [whiteout, second].concat()),
        (LINK, after(&longs(&[node]))),
        (CREATE, after(&create)),
    ]
}
