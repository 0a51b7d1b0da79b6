//! What a guest may send, and what must come of it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{CWD, FileType};
use vm_memory::GuestAddress;

use super::*;

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
fn cve_2016_5403_requests_under_way_are_never_more_than_the_queue_has_entries() {
    let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
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
    let memory = crate::memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
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
