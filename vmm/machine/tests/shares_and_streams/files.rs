//! What a guest does with files. Every check has the directory to itself that it is given.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink,
};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, RenameFlags, SeekFrom as Seeking,
    XattrFlags,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

type Check = (&'static str, fn(&Path));

const CHECKS: &[Check] = &[
    ("reads_what_it_wrote", reads_what_it_wrote),
    ("makes_many_files", makes_many_files),
    ("maps_files", maps_files),
    (
        "reads_and_writes_around_its_cache",
        reads_and_writes_around_its_cache,
    ),
    ("appends", appends),
    ("has_links", has_links),
    ("renames", renames),
    ("has_holes", has_holes),
    ("copies_ranges", copies_ranges),
    ("has_xattrs", has_xattrs),
    ("has_acls", has_acls),
    ("has_locks", has_locks),
    ("has_special_files", has_special_files),
    ("has_owners_and_modes", has_owners_and_modes),
    ("checks_permissions", checks_permissions),
    (
        "keeps_open_files_that_are_unlinked",
        keeps_open_files_that_are_unlinked,
    ),
    ("has_temporary_files", has_temporary_files),
    ("has_file_system_sizes", has_file_system_sizes),
    ("sets_times", sets_times),
    ("makes_no_devices", makes_no_devices),
];

/// Runs those whose name has `filter` in it, says which fail, and returns how many.
pub fn check(filter: &str) -> usize {
    let mut failures = 0;
    let read_only: Check = ("refuses_changes_of_what_is_read_only", refuses_changes);
    let checks = CHECKS.iter().chain([&read_only]);
    for (name, check) in checks.filter(|(name, _)| name.contains(filter)) {
        let dir = Path::new("/rw").join(name);
        fs::create_dir(&dir).unwrap();
        let began = Instant::now();
        if std::panic::catch_unwind(|| check(&dir)).is_err() {
            failures += 1;
            println!("guest: {name}: FAILED");
        }
        println!("guest: {name}: {} ms", began.elapsed().as_millis());
    }
    failures
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect()
}

fn reads_what_it_wrote(dir: &Path) {
    let data = pattern(4 << 20);
    let mut file = File::create_new(dir.join("file")).unwrap();
    file.write_all(&data).unwrap();
    file.sync_all().unwrap();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert!(fs::read(dir.join("file")).unwrap() == data);
}

fn makes_many_files(dir: &Path) {
    for number in 0..100 {
        fs::write(dir.join(format!("file{number}")), number.to_string()).unwrap();
    }
    let mut found: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort_unstable();
    found.dedup();
    assert_eq!(found.len(), 100);
    assert_eq!(fs::read_to_string(dir.join("file71")).unwrap(), "71");
    for name in found {
        fs::remove_file(dir.join(name)).unwrap();
    }
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
}

fn maps_files(dir: &Path) {
    let path = dir.join("file");
    let file = open(&path);
    file.set_len(8192).unwrap();
    // SAFETY: a new mapping, used below only while it exists, and only through volatile accesses.
    let mapping = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            8192,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &file,
            0,
        )
    }
    .unwrap()
    .cast::<u8>();
    // SAFETY: inside of the mapping.
    unsafe { mapping.add(5000).write_volatile(7) };
    file.write_all_at(&[9], 5001).unwrap();
    // SAFETY: inside of the mapping.
    assert_eq!(unsafe { mapping.add(5001).read_volatile() }, 9);
    // SAFETY: all of the mapping, which is used no more.
    unsafe { rustix::mm::munmap(mapping.cast(), 8192) }.unwrap();
    file.sync_all().unwrap();
    assert_eq!(fs::read(path).unwrap()[5000..5002], [7, 9]);
}

fn reads_and_writes_around_its_cache(dir: &Path) {
    let path = dir.join("file");
    let mut direct = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let mut room = vec![0; 4096 * 3];
    let offset = room.as_ptr().align_offset(4096);
    let aligned = &mut room[offset..offset + 8192];
    aligned.copy_from_slice(&pattern(8192));
    direct.write_all(aligned).unwrap();
    aligned.fill(0);
    direct.seek(SeekFrom::Start(0)).unwrap();
    direct.read_exact(aligned).unwrap();
    assert!(aligned == pattern(8192));
    assert!(fs::read(path).unwrap() == pattern(8192));
}

fn appends(dir: &Path) {
    let path = dir.join("file");
    let mut writers: Vec<_> = (0..2)
        .map(|_| {
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(&path)
                .unwrap()
        })
        .collect();
    for _ in 0..10 {
        for writer in &mut writers {
            writer.write_all(b"line\n").unwrap();
        }
    }
    assert_eq!(fs::read_to_string(path).unwrap(), "line\n".repeat(20));
}

fn has_links(dir: &Path) {
    fs::write(dir.join("file"), "x").unwrap();
    fs::hard_link(dir.join("file"), dir.join("hard")).unwrap();
    symlink("../elsewhere/../file", dir.join("soft")).unwrap();
    symlink("file", dir.join("right")).unwrap();
    let (file, hard) = (stat(&dir.join("file")), stat(&dir.join("hard")));
    assert_eq!((file.ino(), file.nlink()), (hard.ino(), 2));
    assert_eq!(
        fs::read_link(dir.join("soft")).unwrap(),
        Path::new("../elsewhere/../file")
    );
    assert_eq!(fs::read_to_string(dir.join("right")).unwrap(), "x");
}

fn renames(dir: &Path) {
    let rename = |old: &str, new: &str, flags| {
        rustix::fs::renameat_with(CWD, dir.join(old), CWD, dir.join(new), flags)
    };
    fs::write(dir.join("a"), "a").unwrap();
    fs::write(dir.join("b"), "b").unwrap();
    assert_eq!(rename("a", "b", RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename("a", "b", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "b");
    fs::rename(dir.join("a"), dir.join("b")).unwrap();
    assert_eq!(fs::read_to_string(dir.join("b")).unwrap(), "b");
    fs::create_dir_all(dir.join("d/e")).unwrap();
    assert_eq!(
        rename("d", "d/e/f", RenameFlags::empty()),
        Err(Errno::INVAL)
    );
    rename("b", "c", RenameFlags::WHITEOUT).unwrap();
    assert!(stat(&dir.join("b")).file_type().is_char_device());
}

fn has_holes(dir: &Path) {
    let path = dir.join("file");
    let file = open(&path);
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!(stat(&path).len(), 1 << 20);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, 1 << 20).unwrap();
    file.write_all_at(b"x", 1 << 19).unwrap();
    file.sync_all().unwrap();
    assert_eq!(rustix::fs::seek(&file, Seeking::Data(0)).unwrap(), 1 << 19);
    assert_eq!(rustix::fs::seek(&file, Seeking::Hole(0)).unwrap(), 0);
    assert!(stat(&path).blocks() < 100);
}

fn copies_ranges(dir: &Path) {
    fs::write(dir.join("from"), pattern(100_000)).unwrap();
    let (from, to) = (open(&dir.join("from")), open(&dir.join("to")));
    let copied = rustix::fs::copy_file_range(&from, Some(&mut 10), &to, None, 50_000).unwrap();
    assert!(fs::read(dir.join("to")).unwrap() == pattern(100_000)[10..10 + copied]);
}

fn has_xattrs(dir: &Path) {
    let path = dir.join("file");
    fs::write(&path, "x").unwrap();
    for name in ["user.key", "trusted.overlay.opaque", "security.capability"] {
        let value: &[u8] = match name {
            // cap_net_raw, permitted and effective; revision 2.
            "security.capability" => &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            _ => b"y",
        };
        let set = rustix::fs::setxattr(&path, name, value, XattrFlags::CREATE);
        // The host's kernel keeps `trusted` to processes with authority over the host.
        let expected = match name {
            "trusted.overlay.opaque" => Err(Errno::PERM),
            _ => Ok(()),
        };
        assert_eq!(set, expected, "{name}");
    }
    let mut list = [0; 200];
    let length = rustix::fs::listxattr(&path, &mut list).unwrap();
    assert!(String::from_utf8_lossy(&list[..length]).contains("user.key"));
    fs::write(&path, "other").unwrap();
    let mut value = [0; 100];
    let gone = rustix::fs::getxattr(&path, "security.capability", &mut value);
    assert_eq!(
        gone,
        Err(Errno::NODATA),
        "capabilities stay when a file is written"
    );
    rustix::fs::removexattr(&path, "user.key").unwrap();
}

fn has_acls(dir: &Path) {
    let path = dir.join("file");
    fs::write(&path, "x").unwrap();
    // user::rw-, user:1000:rw-, group::r--, mask::rw-, other::---
    let acl = [
        (1_u16, 6_u16, u32::MAX),
        (2, 6, 1000),
        (4, 4, u32::MAX),
        (16, 6, u32::MAX),
        (32, 0, u32::MAX),
    ];
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in acl {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    rustix::fs::setxattr(
        &path,
        "system.posix_acl_access",
        &value,
        XattrFlags::empty(),
    )
    .unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(stat(&path).mode() & 0o777, 0o660);
    assert_eq!(
        as_user(1000, || fs::read_to_string(&path).is_ok()),
        Some(true)
    );
    assert_eq!(
        as_user(1001, || fs::read_to_string(&path).is_ok()),
        Some(false)
    );
}

fn has_locks(dir: &Path) {
    let path = dir.join("file");
    let (first, second) = (open(&path), open(&path));
    rustix::fs::flock(&first, FlockOperation::LockExclusive).unwrap();
    let busy = rustix::fs::flock(&second, FlockOperation::NonBlockingLockExclusive);
    assert_eq!(busy, Err(Errno::WOULDBLOCK));
    rustix::fs::flock(&first, FlockOperation::Unlock).unwrap();
    rustix::fs::fcntl_lock(&first, FlockOperation::LockExclusive).unwrap();
    let free = as_user(0, || {
        let own = open(&path);
        rustix::fs::fcntl_lock(&own, FlockOperation::NonBlockingLockExclusive).is_ok()
    });
    assert_eq!(free, Some(false), "a lock of another process is not seen");
}

fn has_special_files(dir: &Path) {
    rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, 0o600.into(), 0).unwrap();
    let path = dir.join("fifo");
    let writer = std::thread::spawn(move || fs::write(path, "through").unwrap());
    assert_eq!(fs::read_to_string(dir.join("fifo")).unwrap(), "through");
    writer.join().unwrap();
    let listener = UnixListener::bind(dir.join("socket")).unwrap();
    let mut client = UnixStream::connect(dir.join("socket")).unwrap();
    client.write_all(b"x").unwrap();
    listener
        .accept()
        .unwrap()
        .0
        .read_exact(&mut [0; 1])
        .unwrap();
}

fn has_owners_and_modes(dir: &Path) {
    let path = dir.join("file");
    fs::write(&path, "x").unwrap();
    std::os::unix::fs::chown(&path, Some(1000), Some(2000)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    let metadata = stat(&path);
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777),
        (1000, 2000, 0o6755)
    );
    // On a local file system root's write would keep them; but root of a user namespace serves this one.
    fs::write(&path, "y").unwrap();
    assert_eq!(stat(&path).mode() & 0o7777, 0o755);
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    let made = as_user(1234, || {
        fs::write(dir.join("own"), "z").unwrap();
        let metadata = stat(&dir.join("own"));
        (metadata.uid(), metadata.gid()) == (1234, 1234)
    });
    assert_eq!(made, Some(true));
}

fn checks_permissions(dir: &Path) {
    let path = dir.join("secret");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let denied = as_user(1000, || {
        File::open(&path).is_err()
            && fs::write(dir.join("new"), "").is_err()
            && fs::remove_file(&path).is_err()
    });
    assert_eq!(denied, Some(true));
}

fn keeps_open_files_that_are_unlinked(dir: &Path) {
    let path = dir.join("file");
    let mut file = open(&path);
    file.write_all(b"still there").unwrap();
    fs::remove_file(&path).unwrap();
    let mut content = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "still there");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_len(3).unwrap();
}

fn has_temporary_files(dir: &Path) {
    // FUSE_TMPFILE is not offered; programs fall back to a name.
    let made = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(dir);
    assert_eq!(made.unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
}

fn has_file_system_sizes(dir: &Path) {
    let sizes = rustix::fs::statvfs(dir).unwrap();
    assert!(sizes.f_blocks > 0 && sizes.f_bsize > 0 && sizes.f_namemax >= 255);
}

fn sets_times(dir: &Path) {
    let path = dir.join("file");
    let file = open(&path);
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(time).unwrap();
    assert_eq!(stat(&path).modified().unwrap(), time);
}

fn makes_no_devices(dir: &Path) {
    let device = rustix::fs::makedev(1, 3);
    let made = rustix::fs::mknodat(
        CWD,
        dir.join("null"),
        FileType::CharacterDevice,
        0o666.into(),
        device,
    );
    assert_eq!(made, Err(Errno::PERM));
    assert!(stat_at(&dir.join("null")).is_err());
}

/// The share `ro`, after every trick that guest root has with mount flags.
fn refuses_changes(_: &Path) {
    let share = Path::new("/ro");
    let _ = rustix::mount::mount_remount(share, rustix::mount::MountFlags::empty(), "");
    assert_eq!(
        fs::read_to_string(share.join("file")).unwrap(),
        "from the host"
    );
    let refused = [
        fs::write(share.join("file"), "x").err(),
        fs::write(share.join("new"), "x").err(),
        fs::remove_file(share.join("file")).err(),
        fs::create_dir(share.join("dir")).err(),
        fs::rename(share.join("file"), share.join("other")).err(),
        fs::set_permissions(share.join("file"), fs::Permissions::from_mode(0o777)).err(),
        symlink("a", share.join("b")).err(),
    ];
    for error in refused {
        assert_eq!(
            error.and_then(|error| error.raw_os_error()),
            Some(libc::EROFS)
        );
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn stat(path: &Path) -> fs::Metadata {
    path.symlink_metadata().unwrap()
}

fn stat_at(path: &Path) -> rustix::io::Result<rustix::fs::Stat> {
    rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
}

/// Runs something as a user and group, in a process of its own. `None` when that panicked.
fn as_user(id: u32, body: impl FnOnce() -> bool) -> Option<bool> {
    // SAFETY: the guest's process has no other thread at this time, so the child has whatever it needs.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: no memory is involved.
            unsafe {
                libc::setgroups(0, std::ptr::null());
                libc::setresgid(id, id, id);
                libc::setresuid(id, id, id);
            }
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            let code = result.map_or(2, i32::from);
            // SAFETY: ends the child without what its parent wants done at its end.
            unsafe { libc::_exit(code) }
        }
        child => {
            let mut status = 0;
            // SAFETY: the status is written to.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            match libc::WEXITSTATUS(status) {
                0 => Some(false),
                1 => Some(true),
                _ => None,
            }
        }
    }
}
