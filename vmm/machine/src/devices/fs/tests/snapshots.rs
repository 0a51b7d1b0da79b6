//! A guest that goes on with another server, as in a clone.

use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

/// A share as [`tree`] has it, elsewhere.
fn another() -> (TempDir, std::path::PathBuf) {
    let tree = tree();
    let share = tree.path().join("share");
    (tree, share)
}

#[test]
fn files_that_are_known_and_open_stay_so_in_a_clone() {
    let (_tree, share) = another();
    let (_other, clone) = another();
    fs::write(clone.join("file"), "the clone's").unwrap();
    let mut guest = Guest::new(&share, false);
    let file = guest.lookup(ROOT, "file").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let deep = guest.lookup(dir, "b").unwrap();
    let (reads, writes) = (
        guest.open(file, libc::O_RDONLY).unwrap(),
        guest.open(deep, libc::O_RDWR).unwrap(),
    );
    let listed = guest.call(OPENDIR, dir, &numbers(&[0, 0])).unwrap();
    let listed = u64_at(&listed, 0);

    let state = guest.suspend().state;
    guest.go_on(&clone, state).unwrap();

    assert_eq!(guest.read(file, reads, 0, 100).unwrap(), b"the clone's");
    assert_eq!(guest.write(deep, writes, 0, b"DEEP!"), Ok(5));
    assert_eq!(fs::read(clone.join("dir/b")).unwrap(), b"DEEP!");
    assert_eq!(fs::read(share.join("dir/b")).unwrap(), b"deep");
    assert!(
        guest
            .call(READDIRPLUS, dir, &transfer(listed, 0, 4096, &[]))
            .is_ok()
    );
    // A file has one number, also when it is looked up anew; others get others.
    assert_eq!(guest.lookup(dir, "b"), Ok(deep));
    let (node, handle) = guest.create(ROOT, "new", 0o644).unwrap();
    assert!(![ROOT, file, dir, deep].contains(&node));
    assert!(![reads, writes, listed].contains(&handle));
    for (node, handle) in [(file, reads), (deep, writes)] {
        let mut body = longs(&[handle]);
        body.extend([0; 16]);
        guest.call(RELEASE, node, &body).unwrap();
        assert!(guest.read(node, handle, 0, 1).is_err());
    }
}

#[test]
fn a_clone_can_be_put_aside_again() {
    let (_tree, share) = another();
    let mut guest = Guest::new(&share, false);
    let (node, handle) = guest.create(ROOT, "new", 0o644).unwrap();
    for _ in 0..2 {
        let state = guest.suspend().state;
        guest.go_on(&share, state).unwrap();
    }

    assert_eq!(guest.write(node, handle, 0, b"x"), Ok(1));
}

#[test]
fn a_file_without_a_name_stays_here_while_it_is_open() {
    let (_tree, share) = another();
    let mut guest = Guest::new(&share, false);
    let (node, handle) = guest.create(ROOT, "temporary", 0o644).unwrap();
    guest.call(UNLINK, ROOT, &names(&[b"temporary"])).unwrap();

    let suspended = guest.suspend();
    let why = suspended.only_here.unwrap();
    assert!(why.contains("\"temporary\""), "{why}");

    // The device goes on, and is put aside when the file is closed.
    guest.activate(Some(suspended.state)).unwrap();
    assert_eq!(guest.write(node, handle, 0, b"x"), Ok(1));
    let mut body = longs(&[handle]);
    body.extend([0; 16]);
    guest.call(RELEASE, node, &body).unwrap();
    let suspended = guest.suspend();
    assert_eq!(suspended.only_here, None);
    guest.go_on(&share, suspended.state).unwrap();
    assert!(guest.works());
}

#[test]
fn a_clone_without_a_file_that_is_open_is_refused() {
    let (_tree, share) = another();
    let mut guest = Guest::new(&share, false);
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let deep = guest.lookup(dir, "b").unwrap();
    let handle = guest.open(deep, libc::O_RDONLY).unwrap();
    let (_other, clone) = another();
    fs::remove_file(clone.join("dir/b")).unwrap();

    let state = guest.suspend().state;
    let refused = guest.go_on(&clone, state.clone()).unwrap_err().to_string();
    assert!(refused.contains("\"dir/b\""), "{refused}");

    // What is only known may be gone.
    fs::remove_file(clone.join("file")).unwrap();
    guest.go_on(&share, state).unwrap();
    let _ = guest.lookup(ROOT, "file").unwrap();
    let mut body = longs(&[handle]);
    body.extend([0; 16]);
    guest.call(RELEASE, deep, &body).unwrap();
    let state = guest.suspend().state;
    guest.go_on(&clone, state).unwrap();
    assert_eq!(guest.lookup(ROOT, "file"), Err(libc::ENOENT));
    assert_eq!(guest.lookup(dir, "b"), Err(libc::ENOENT));
}

#[test]
fn links_are_not_followed_out_of_the_share() {
    let (_tree, share) = another();
    let mut guest = Guest::new(&share, false);
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let deep = guest.lookup(dir, "b").unwrap();
    let _open = guest.open(deep, libc::O_RDONLY).unwrap();
    let (other, clone) = another();
    fs::write(other.path().join("outside/b"), "secret").unwrap();
    fs::remove_dir_all(clone.join("dir")).unwrap();
    symlink(other.path().join("outside"), clone.join("dir")).unwrap();

    let state = guest.suspend().state;

    assert!(guest.go_on(&clone, state).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_changed_state_is_refused_or_stays_in_the_share(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (tree, share) = another();
        let before = snapshot(&tree.path().join("outside"));
        let mut guest = Guest::new(&share, false);
        let file = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open(file, libc::O_RDWR).unwrap();
        let mut state = guest.suspend().state;
        for (place, value) in changes {
            let place = place.index(state.len() - CONFIG_SIZE) + CONFIG_SIZE;
            state[place] = value;
        }

        if guest.go_on(&share, state).is_ok() {
            let _ = guest.write(file, handle, 0, b"changed");
            prop_assert!(guest.call(STATFS, ROOT, &[]).is_ok());
        }
        prop_assert_eq!(snapshot(&tree.path().join("outside")), before);
    }
}
