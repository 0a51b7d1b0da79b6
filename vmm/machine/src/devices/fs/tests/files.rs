//! Files as a guest has them, and the device as the transport has it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

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

/// Else a program that runs could be truncated: see `message::withhold_atomic_truncation`.
#[test]
fn truncation_is_not_left_to_open() {
    let share = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(share.path(), false);

    let flags = guest.mount();

    assert_eq!(flags & ATOMIC_O_TRUNC, 0, "{flags:#x}");
    assert_ne!(flags & POSIX_ACL, 0, "{flags:#x}");
}

#[test]
fn only_a_file_that_can_be_written_is_flushed_at_its_close() {
    let tree = tree();
    let mut guest = Guest::new(&tree.path().join("share"), false);
    let file = guest.lookup(ROOT, "file").unwrap();

    // FOPEN_NOFLUSH (linux/fuse.h).
    let mut unflushed = |flags: i32| {
        let body = numbers(&[flags.cast_unsigned(), 0]);
        let answer = guest.call(OPEN, file, &body).unwrap();
        u32_at(&answer, 8) & 1 << 5 != 0
    };

    assert!(unflushed(libc::O_RDONLY) && unflushed(libc::O_RDONLY | libc::O_NONBLOCK));
    assert!(!unflushed(libc::O_WRONLY) && !unflushed(libc::O_RDWR));
}
