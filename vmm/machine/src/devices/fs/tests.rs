//! The device under a guest that sends what it likes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::devices::driver_queue::{DriverQueue, Interrupts};

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

/// Where requests and answers lie in the guest's memory.
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x30_0000;
const ANSWER_SIZE: u32 = 0x10_1000;

/// A guest that speaks FUSE by hand.
struct Guest {
    memory: GuestMemoryMmap,
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
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x50_0000)]).unwrap();
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

    /// Activates the device and mounts.
    fn boot(&mut self) {
        self.requests = DriverQueue::new(&self.memory, 0x1_0000, 64);
        self.memory
            .write_slice(&[0; 0x4000], GuestAddress(0x1_0000))
            .unwrap();
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.device.features(),
            queues: vec![self._priority.activate(0), self.requests.activate(1)],
            config_interrupt: Interrupts::new(),
        };
        self.device.activate(activation).unwrap();
        // Major 7, minor 38; ACLs and what belongs to them, submounts, kill-priv v2, xattr flags, extended init.
        let flags: u32 = 1 << 6 | 1 << 13 | 1 << 20 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30;
        let mut body = numbers(&[7, 38, 0x2_0000, flags, 0]);
        body.extend([0; 44]);
        self.call(INIT, 0, &body).unwrap();
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

#[test]
fn cve_2026_47243_names_that_are_paths_are_refused_in_every_operation() {
    let tree = tree();
    let before = snapshot(tree.path());
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let planted = tree.path().join("outside/planted");
    let absolute = planted.to_str().unwrap().as_bytes();
    let bad: [&[u8]; 14] = [
        b"",
        b"/",
        b".",
        b"..",
        b"a/b",
        b"dir/b",
        b"dir/..",
        b"../outside/secret",
        b"/etc/passwd",
        b"dir/",
        absolute,
        b"../outside/planted",
        &[b'x'; 256],
        &[b'x'; 4097],
    ];

    let allowed: Vec<_> = bad
        .iter()
        .flat_map(|name| operations_with(name, file))
        .flat_map(|(opcode, body)| [(ROOT, opcode, body.clone()), (dir, opcode, body)])
        .filter(|(node, opcode, body)| guest.call(*opcode, *node, body).is_ok())
        .collect();

    assert_eq!(allowed, []);
    assert_eq!(snapshot(tree.path()), before);
    assert!(guest.works());
}

#[test]
fn bad_names_get_the_errno_that_a_path_walk_would_give() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);

    assert_eq!(guest.lookup(ROOT, ""), Err(libc::ENOENT));
    assert_eq!(guest.lookup(ROOT, ".."), Err(libc::EINVAL));
    assert_eq!(guest.lookup(ROOT, "dir/b"), Err(libc::EINVAL));
    assert_eq!(
        guest.lookup(ROOT, &"x".repeat(256)),
        Err(libc::ENAMETOOLONG)
    );
    assert_eq!(guest.lookup(ROOT, &"x".repeat(255)), Err(libc::ENOENT));
}

#[test]
fn cve_2020_28914_and_cve_2026_46695_a_read_only_share_refuses_every_change() {
    let tree = tree();
    let before = snapshot(tree.path());
    let mut guest = Guest::new(&tree.path().join("share"), true);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    let xattr = [numbers(&[1, 0, 0, 0]), names(&[b"user.x"]), b"v".to_vec()].concat();
    let allocate = [longs(&[handle, 0, 100]), numbers(&[0, 0])].concat();
    let copy = longs(&[handle, 0, file, handle, 0, 7, 0]);
    let changes: Vec<(u64, u32, Vec<u8>)> = operations_with(b"new", file)
        .into_iter()
        .filter(|(opcode, _)| *opcode != LOOKUP)
        .map(|(opcode, body)| (ROOT, opcode, body))
        .chain([
            (ROOT, UNLINK, names(&[b"file"])),
            (ROOT, RMDIR, names(&[b"dir"])),
            (file, SETATTR, setattr(1)),
            (file, SETATTR, setattr(1 << 1 | 1 << 2)),
            (file, SETATTR, setattr(1 << 3)),
            (file, SETATTR, setattr(1 << 4 | 1 << 5)),
            (file, SETXATTR, xattr),
            (file, REMOVEXATTR, names(&[b"user.x"])),
            (file, WRITE, transfer(handle, 0, 1, b"x")),
            (file, FALLOCATE, allocate),
            (file, COPY_FILE_RANGE, copy),
            (file, OPEN, numbers(&[libc::O_WRONLY.cast_unsigned(), 0])),
            (file, OPEN, numbers(&[libc::O_RDWR.cast_unsigned(), 0])),
        ])
        .collect();

    let answers: Vec<_> = changes
        .iter()
        .map(|(node, opcode, body)| (*opcode, guest.call(*opcode, *node, body).err()))
        .filter(|(_, errno)| *errno != Some(libc::EROFS))
        .collect();
    let truncating = guest.open(file, libc::O_RDONLY | libc::O_TRUNC);

    assert_eq!(answers, []);
    assert!(truncating.is_err());
    assert_eq!(guest.read(file, handle, 0, 100).unwrap(), b"content");
    assert_eq!(snapshot(tree.path()), before);
}

#[test]
fn cve_2020_35517_special_files_are_never_opened() {
    let tree = tree();
    let share = tree.path().join("share");
    rustix::fs::mknodat(CWD, share.join("fifo"), FileType::Fifo, 0o666.into(), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(share.join("socket")).unwrap();
    let flags = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_TRUNC,
    ];
    let mut guest = Guest::new(&share, false);
    let mut devices = Guest::new(Path::new("/dev"), true);

    let nodes = ["fifo", "socket"].map(|name| guest.lookup(ROOT, name).unwrap());
    let opened: Vec<_> = nodes
        .iter()
        .flat_map(|node| flags.map(|flags| (*node, flags)))
        .filter(|(node, flags)| guest.open(*node, *flags).is_ok())
        .collect();
    let resized: Vec<_> = nodes
        .iter()
        .filter(|node| guest.call(SETATTR, **node, &setattr(1 << 3)).is_ok())
        .collect();
    let null = devices.lookup(ROOT, "null").unwrap();

    assert_eq!(opened, []);
    assert_eq!(resized, Vec::<&u64>::new());
    assert_eq!(devices.open(null, libc::O_RDONLY), Err(libc::EBADF));
    assert!(guest.works());
}

#[test]
fn creating_over_a_fifo_does_not_open_it() {
    let tree = tree();
    let share = tree.path().join("share");
    rustix::fs::mknodat(CWD, share.join("fifo"), FileType::Fifo, 0o666.into(), 0).unwrap();
    let mut guest = Guest::new(&share, false);

    assert!(guest.create(ROOT, "fifo", 0o644).is_err());
    assert!(
        share
            .join("fifo")
            .symlink_metadata()
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn device_nodes_are_not_made_but_for_whiteouts() {
    let tree = tree();
    let share = tree.path().join("share");
    let mut guest = Guest::new(&share, false);
    let mut mknod = |kind, device, name| {
        let body = with_name(&numbers(&[kind | 0o600, device, 0, 0]), name);
        guest.call(MKNOD, ROOT, &body).err()
    };

    assert_eq!(mknod(libc::S_IFBLK, 0x800, "disk"), Some(libc::EPERM));
    assert_eq!(mknod(libc::S_IFCHR, 0x103, "null"), Some(libc::EPERM));
    assert_eq!(mknod(libc::S_IFCHR, 0, "whiteout"), None);
    assert_eq!(mknod(libc::S_IFIFO, 0, "fifo"), None);
    assert!(!share.join("disk").exists() && !share.join("null").exists());
}

#[test]
fn cve_2020_10717_a_flood_of_descriptors_ends_in_enfile_and_the_rest_goes_on() {
    let tree = tree();
    let share = tree.path().join("share");
    for number in 0..40 {
        fs::write(share.join(format!("f{number}")), "").unwrap();
    }
    let mut guest = Guest::with(FsConfig {
        guest_descriptors: 20,
        ..config(&share, false)
    });
    let file = guest.lookup(ROOT, "file").unwrap();

    let found: Vec<_> = (0..40)
        .map(|number| guest.lookup(ROOT, &format!("f{number}")))
        .collect();
    let handle = guest.open(file, libc::O_RDONLY);

    // The root and the first file are held already.
    assert!(found[..18].iter().all(Result::is_ok));
    assert!(found[18..].iter().all(|found| *found == Err(libc::ENFILE)));
    assert_eq!(handle, Err(libc::ENFILE));
    assert!(guest.call(STATFS, ROOT, &[]).is_ok());
    assert!(guest.call(GETATTR, file, &[0; 16]).is_ok());
    assert_eq!(guest.lookup(ROOT, "file"), Ok(file));
    let forgotten = guest.message(FORGET, found[0].unwrap(), &1_u64.to_le_bytes());
    assert_eq!(guest.send(&forgotten, 0), 0);
    assert!(guest.open(file, libc::O_RDONLY).is_ok());
}

#[test]
fn files_are_written_read_and_seen_on_the_host() {
    let tree = tree();
    let share = tree.path().join("share");
    let mut guest = Guest::new(&share, false);
    let data: Vec<u8> = (0..1 << 20)
        .map(|number: u32| number.to_le_bytes()[1])
        .collect();

    let (node, handle) = guest.create(ROOT, "new", 0o640).unwrap();
    let written = guest.write(node, handle, 3, &data);
    let read = guest.read(node, handle, 3, 1 << 20).unwrap();
    let tail = guest.read(node, handle, 3 + (1 << 20) - 5, 100).unwrap();

    assert_eq!(written, Ok(1 << 20));
    assert!(read == data, "read is not what was written");
    assert_eq!(tail, data[data.len() - 5..]);
    assert!(
        fs::read(share.join("new")).unwrap()[3..] == data,
        "the host sees other data"
    );
    assert_eq!(
        fs::metadata(share.join("new"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o640
    );
}

#[test]
fn holes_links_xattrs_and_renames_are_those_of_the_host() {
    let tree = tree();
    let share = tree.path().join("share");
    let mut guest = Guest::new(&share, false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let (sparse, handle) = guest.create(ROOT, "sparse", 0o644).unwrap();

    let allocate = [longs(&[handle, 0, 1 << 20]), numbers(&[0, 0])].concat();
    guest.call(FALLOCATE, sparse, &allocate).unwrap();
    let punch = [longs(&[handle, 0, 1 << 20]), numbers(&[1 | 2, 0])].concat();
    guest.call(FALLOCATE, sparse, &punch).unwrap();
    guest.write(sparse, handle, 1 << 19, b"x").unwrap();
    let seek = [longs(&[handle, 0]), numbers(&[3, 0])].concat();
    let next_data = u64_at(&guest.call(LSEEK, sparse, &seek).unwrap(), 0);
    guest
        .call(LINK, dir, &with_name(&longs(&[file]), "hard"))
        .unwrap();
    guest
        .call(SYMLINK, dir, &names(&[b"soft", b"/absolute/../target"]))
        .unwrap();
    let soft = guest.lookup(dir, "soft").unwrap();
    let xattr = [
        numbers(&[5, 0, 0, 0]),
        names(&[b"user.key"]),
        b"value".to_vec(),
    ]
    .concat();
    guest.call(SETXATTR, file, &xattr).unwrap();
    let value = guest.call(GETXATTR, file, &with_name(&numbers(&[100, 0]), "user.key"));
    let no_replace = [
        longs(&[ROOT]),
        numbers(&[1, 0]),
        names(&[b"sparse", b"file"]),
    ]
    .concat();
    let exists = guest.call(RENAME2, ROOT, &no_replace);
    let exchange = [
        longs(&[ROOT]),
        numbers(&[2, 0]),
        names(&[b"sparse", b"file"]),
    ]
    .concat();
    guest.call(RENAME2, ROOT, &exchange).unwrap();

    assert_eq!(next_data, 1 << 19);
    assert_eq!(fs::metadata(share.join("dir/hard")).unwrap().nlink(), 2);
    assert_eq!(
        guest.call(READLINK, soft, &[]).unwrap(),
        b"/absolute/../target"
    );
    assert_eq!(value.unwrap(), b"value");
    assert_eq!(exists, Err(libc::EEXIST));
    assert_eq!(fs::read(share.join("sparse")).unwrap(), b"content");
    assert_eq!(guest.lookup(ROOT, "sparse"), Ok(file));
}

#[test]
fn a_directory_is_read_with_the_attributes_of_its_entries() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);

    let handle = u64_at(&guest.call(OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
    let listing = guest
        .call(READDIRPLUS, ROOT, &transfer(handle, 0, 4096, &[]))
        .unwrap();

    let text = String::from_utf8_lossy(&listing);
    assert!(text.contains("file") && text.contains("dir") && text.contains(".."));
    assert!(guest.works());
}

#[test]
fn locks_are_left_to_the_guest() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    let lock = longs(&[handle, 1, 0, u64::MAX >> 1, 1, 0]);

    assert_eq!(guest.call(SETLKW, file, &lock), Err(libc::ENOSYS));
}

#[test]
fn cve_2022_0358_a_file_in_a_setgid_directory_is_as_on_a_local_file_system() {
    let tree = tree();
    let shared = tree.path().join("share/dir");
    std::os::unix::fs::chown(&shared, Some(0), Some(4321)).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o2777)).unwrap();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let dir = guest.lookup(ROOT, "dir").unwrap();
    (guest.uid, guest.gid) = (1234, 1234);

    guest.create(dir, "new", 0o2755).unwrap();

    let metadata = fs::metadata(shared.join("new")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
    assert_eq!(
        metadata.mode() & 0o7777,
        0o755,
        "the set-group-id bit of a group that the maker is not in"
    );
}

#[test]
fn cve_2021_20263_a_write_takes_a_files_capabilities_away() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    // cap_net_raw, permitted and effective; revision 2.
    let capability = numbers(&[0x0200_0001, 1 << 13, 0, 0, 0]);
    let name = names(&[b"security.capability"]);
    guest
        .call(
            SETXATTR,
            file,
            &[numbers(&[20, 0, 0, 0]), name, capability].concat(),
        )
        .unwrap();
    let ask = with_name(&numbers(&[100, 0]), "security.capability");
    let before = guest.call(GETXATTR, file, &ask).map(|value| value.len());

    guest.write(file, handle, 0, b"other").unwrap();

    assert_eq!(before, Ok(20));
    assert_eq!(guest.call(GETXATTR, file, &ask), Err(libc::ENODATA));
}

#[test]
fn a_write_with_kill_priv_takes_set_id_bits_away() {
    let tree = tree();
    let path = tree.path().join("share/file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    let mut body = longs(&[handle, 0]);
    body.extend(numbers(&[1, 1 << 2, 0, 0, 0, 0]));
    body.push(b'x');

    guest.call(WRITE, file, &body).unwrap();

    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
}

#[test]
fn malformed_messages_are_answered_and_harm_nothing() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap();

    // No header; no room for an answer, or none for the header of one.
    assert_eq!(guest.send(&[0; 10], ANSWER_SIZE), 0);
    let statfs = guest.message(STATFS, ROOT, &[]);
    assert_eq!(guest.send(&statfs, 1), 0);
    let read = guest.message(READ, file, &transfer(handle, 0, 10, &[]));
    assert_eq!(guest.send(&read, 15), 0);
    // A name that doesn't end, one with something in it that ends it, a length that is not there, and one that
    // is too small.
    assert_eq!(guest.call(LOOKUP, ROOT, b"file"), Err(libc::EINVAL));
    assert_eq!(guest.call(LOOKUP, ROOT, b"fi\0le\0"), Err(libc::EINVAL));
    let mut long = guest.message(LOOKUP, ROOT, b"file\0");
    long[..4].copy_from_slice(&5000_u32.to_le_bytes());
    assert_eq!(guest.send(&long, ANSWER_SIZE), 16);
    let mut short = guest.message(LOOKUP, ROOT, b"file\0");
    short[..4].copy_from_slice(&39_u32.to_le_bytes());
    assert_eq!(guest.send(&short, ANSWER_SIZE), 16);
    // Offsets past what a file can have, where the file server would panic.
    assert_eq!(guest.read(file, handle, u64::MAX, 1), Err(libc::EINVAL));
    assert_eq!(
        guest.read(file, handle, i64::MAX.cast_unsigned(), 1),
        Err(libc::EINVAL)
    );
    assert_eq!(guest.write(file, handle, 1 << 63, b"x"), Err(libc::EINVAL));
    // Unknown operations, nodes and handles.
    assert_eq!(guest.call(9999, ROOT, &[]), Err(libc::ENOSYS));
    assert_eq!(guest.call(GETATTR, 1 << 40, &[0; 16]), Err(libc::EBADF));
    assert_eq!(guest.read(file, handle + 1, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(ROOT, handle, 0, 1), Err(libc::EBADF));

    assert!(guest.works());
}

#[test]
fn a_driver_that_comes_again_finds_nothing_of_the_one_before() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(file, libc::O_RDONLY).unwrap();

    guest.device.reset();
    guest.boot();

    assert_eq!(guest.read(file, handle, 0, 10), Err(libc::EBADF));
    assert_eq!(guest.call(RELEASE, file, &[0; 24]), Err(libc::EBADF));
    assert!(guest.works());
}

#[test]
fn cve_2016_5403_requests_under_way_are_never_more_than_the_queue_has_entries() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let mut driver = DriverQueue::new(&memory, 0, 4);
    let head = driver.offer(&[(0x1000, 40)], &[(0x2000, 100)]);
    let queue = RequestQueue::new(
        driver.activate(1),
        memory.clone(),
        Arc::new(FileServerMemory::new(&memory).unwrap()),
    );

    // The same request, over and over, never waiting for its answer.
    let taken: Vec<_> = (0..10)
        .map_while(|_| {
            let taken = queue.take();
            driver.make_available(head);
            taken
        })
        .collect();

    assert_eq!(taken.len(), 4);
}

#[test]
fn a_ring_that_lies_stops_its_queue_only_once() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let mut driver = DriverQueue::new(&memory, 0, 4);
    (0..100).for_each(|_| driver.make_available(0));
    let queue = RequestQueue::new(
        driver.activate(1),
        memory.clone(),
        Arc::new(FileServerMemory::new(&memory).unwrap()),
    );

    assert!(queue.take().is_none());
    assert!(queue.take().is_none());
}

#[test]
fn the_configuration_has_the_tag_and_the_number_of_queues() {
    let tree = tree();
    let device = FileSystem::new(FsConfig {
        request_queues: 3,
        ..config(tree.path(), false)
    })
    .unwrap();
    let mut space = [0xff; 44];

    device.read_config(0, &mut space);

    assert_eq!(&space[..5], b"hull\0");
    assert_eq!(space[36..40], [3, 0, 0, 0]);
    assert_eq!(space[40..], [0xff; 4]);
    assert_eq!(device.queue_max_sizes(), [128, 1024, 1024, 1024]);
}

#[test]
fn a_share_that_can_not_be_is_refused() {
    let tree = tree();
    let refused = |change: fn(&mut FsConfig)| {
        let mut config = config(tree.path(), false);
        change(&mut config);
        FileSystem::new(config).unwrap_err()
    };

    assert!(matches!(
        refused(|config| config.tag = String::new()),
        FsError::Tag(_)
    ));
    assert!(matches!(
        refused(|config| config.tag = "x".repeat(37)),
        FsError::Tag(_)
    ));
    assert!(matches!(
        refused(|config| config.request_queues = 0),
        FsError::Queues { .. }
    ));
    assert!(matches!(
        refused(|config| config.root = "relative".into()),
        FsError::Root { .. }
    ));
    assert!(matches!(
        refused(|config| config.root = "/no/such".into()),
        FsError::Open { .. }
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, ..ProptestConfig::default() })]

    /// Any messages at all leave the device at work, and what is outside of the share alone.
    #[test]
    fn any_messages_leave_the_device_at_work(
        messages in prop::collection::vec(
            (0_u32..55, 0_u64..6, prop::collection::vec(prop_oneof![Just(0), Just(b'/'), Just(b'.'), any::<u8>()], 0..120)),
            1..100,
        )
    ) {
        let tree = tree();
        let before = snapshot(&tree.path().join("outside"));
        let mut guest = Guest::new(&tree.path().join("share"), false);
        for (opcode, node, body) in messages {
            let message = guest.message(opcode, node, &body);
            guest.send(&message, 4096);
        }

        guest.device.reset();
        guest.boot();

        prop_assert!(guest.call(STATFS, ROOT, &[]).is_ok());
        prop_assert_eq!(snapshot(&tree.path().join("outside")), before);
    }
}
