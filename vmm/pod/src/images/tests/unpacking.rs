//! How layers are unpacked: what files keep, whiteouts, and hostile layers.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Lab, append, gzip, layer, link, oci};

#[test]
fn files_keep_what_they_are() {
    let lab = Lab::new();
    let root = lab
        .unpack(layer(|tar| {
            use tar::EntryType;
            append(tar, "dir/", EntryType::Directory, b"", |header| {
                header.set_mode(0o1777);
                header.set_uid(5);
            });
            append(tar, "dir/su", EntryType::Regular, b"x", |header| {
                header.set_mode(0o4755);
                header.set_uid(1000);
                header.set_gid(2000);
            });
            append(tar, "dir/same", EntryType::Link, b"", link("dir/su"));
            append(tar, "dir/sym", EntryType::Symlink, b"", link("/etc/passwd"));
            append(tar, "null", EntryType::Char, b"", |header| {
                header.set_mode(0o666);
                header.set_device_major(1).unwrap();
                header.set_device_minor(3).unwrap();
            });
            append(tar, "pipe", EntryType::Fifo, b"", |header| header.set_mode(0o600));
            tar.append_pax_extensions([
                ("SCHILY.xattr.user.note", b"kept".as_slice()),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/elsewhere"),
                ("SCHILY.xattr.security.capability", b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
            ])
            .unwrap();
            append(tar, "capable", EntryType::Regular, b"", |header| header.set_uid(7));
        }))
        .unwrap();
    let stat = |name: &str| std::fs::symlink_metadata(root.join(name)).unwrap();
    let su = stat("dir/su");
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid(), su.mtime()),
        (0o4755, 1000, 2000, 1_000_000_000)
    );
    assert_eq!(
        (
            stat("dir").mode() & 0o7777,
            stat("dir").uid(),
            stat("dir").mtime()
        ),
        (0o1777, 5, 1_000_000_000)
    );
    assert_eq!(stat("dir/same").ino(), su.ino());
    assert_eq!(
        std::fs::read_link(root.join("dir/sym")).unwrap(),
        Path::new("/etc/passwd")
    );
    assert!(stat("null").file_type().is_char_device());
    assert_eq!(
        (stat("null").rdev(), stat("null").mode() & 0o777),
        (rustix::fs::makedev(1, 3), 0o666)
    );
    assert!(stat("pipe").file_type().is_fifo());
    let mut value = [0; 64];
    let capable = root.join("capable");
    assert_eq!(
        rustix::fs::getxattr(&capable, "user.note", &mut value).unwrap(),
        4
    );
    assert_eq!(
        rustix::fs::getxattr(&capable, "security.capability", &mut value).unwrap(),
        20
    );
    assert!(rustix::fs::getxattr(&capable, "trusted.overlay.redirect", &mut value).is_err());
}

#[test]
fn whiteouts_take_the_form_of_overlayfs() {
    let lab = Lab::new();
    let root = lab
        .unpack(layer(|tar| {
            use tar::EntryType;
            append(tar, "etc/.wh.gone", EntryType::Regular, b"", |_| {});
            append(tar, "var/", EntryType::Directory, b"", |header| {
                header.set_mode(0o755)
            });
            append(tar, "var/.wh..wh..opq", EntryType::Regular, b"", |_| {});
            append(tar, ".wh..wh.plnk", EntryType::Regular, b"", |_| {});
            append(tar, "here", EntryType::Regular, b"x", |_| {});
            append(tar, ".wh.here", EntryType::Regular, b"", |_| {});
            append(tar, ".wh.again", EntryType::Regular, b"", |_| {});
            append(tar, "again/", EntryType::Directory, b"", |header| {
                header.set_mode(0o755)
            });
        }))
        .unwrap();
    let gone = std::fs::symlink_metadata(root.join("etc/gone")).unwrap();
    assert!(gone.file_type().is_char_device());
    assert_eq!(gone.rdev(), 0);
    let mut value = [0; 8];
    assert_eq!(
        rustix::fs::getxattr(root.join("var"), "trusted.overlay.opaque", &mut value).unwrap(),
        1
    );
    assert_eq!(
        rustix::fs::getxattr(root.join("again"), "trusted.overlay.opaque", &mut value).unwrap(),
        1
    );
    assert_eq!(std::fs::read(root.join("here")).unwrap(), b"x");
    let names = |dir: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&root), ["again", "etc", "here", "var"]);
    assert_eq!(names(&root.join("var")), Vec::<String>::new());
}

#[test]
fn the_last_entry_of_a_name_counts() {
    let lab = Lab::new();
    let root = lab
        .unpack(layer(|tar| {
            use tar::EntryType;
            append(tar, "a/b/c", EntryType::Regular, b"1", |_| {});
            append(tar, "a", EntryType::Regular, b"2", |_| {});
            append(tar, "s", EntryType::Symlink, b"", link("/etc"));
            append(tar, "s/", EntryType::Directory, b"", |header| {
                header.set_mode(0o755)
            });
            append(tar, "s/x", EntryType::Regular, b"3", |_| {});
        }))
        .unwrap();
    assert_eq!(std::fs::read(root.join("a")).unwrap(), b"2");
    assert!(std::fs::symlink_metadata(root.join("s")).unwrap().is_dir());
    assert_eq!(std::fs::read(root.join("s/x")).unwrap(), b"3");
}

#[test]
fn a_hostile_layer_stays_in_its_directory() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    std::fs::write(&victim, "whole").unwrap();
    let up = format!("../../../../../../../../../..{}", victim.display());
    let outside_path = outside.path().to_str().unwrap();

    let refused: [Vec<u8>; 3] = [
        layer(|tar| append(tar, &up, tar::EntryType::Regular, b"evil", |_| {})),
        layer(|tar| append(tar, "x", tar::EntryType::Link, b"", link(&up))),
        layer(|tar| append(tar, "a/.wh...", tar::EntryType::Regular, b"", |_| {})),
    ];
    for hostile in refused {
        let lab = Lab::new();
        let error = lab.unpack(hostile).unwrap_err().to_string();
        assert!(
            error.contains("leads out of the layer") || error.contains("a whiteout of nothing"),
            "{error}"
        );
        assert_eq!((lab.layers().len(), lab.scratch()), (0, 0));
    }

    // Links in the layer lead to the layer's own files only.
    let lab = Lab::new();
    let root = lab
        .unpack(layer(|tar| {
            use tar::EntryType;
            append(tar, "out", EntryType::Symlink, b"", link(outside_path));
            append(
                tar,
                &outside_path[1..],
                EntryType::Directory,
                b"",
                |header| header.set_mode(0o755),
            );
            append(tar, "out/victim", EntryType::Regular, b"evil", |_| {});
            append(
                tar,
                &format!("{outside_path}/abs"),
                EntryType::Regular,
                b"evil",
                |_| {},
            );
            append(
                tar,
                "up",
                EntryType::Symlink,
                b"",
                link("../../../../../.."),
            );
            append(tar, "up/.wh.tmp", EntryType::Regular, b"", |_| {});
            append(tar, "up/inside", EntryType::Regular, b"x", |_| {});
        }))
        .unwrap();
    assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    assert!(root.join("inside").exists());
    assert!(root.join(&outside_path[1..]).join("victim").exists());

    // A link through a directory of the layer that is a symbolic link.
    let lab = Lab::new();
    let error = lab
        .unpack(layer(|tar| {
            append(tar, "out", tar::EntryType::Symlink, b"", link(outside_path));
            append(tar, "copy", tar::EntryType::Link, b"", link("out/victim"));
        }))
        .unwrap_err()
        .to_string();
    assert!(error.contains("No such file"), "{error}");
}

#[test]
fn a_description_without_end_is_refused() {
    // A long name of 64 MiB, small when compressed.
    let bomb = layer(|tar| {
        append(
            tar,
            "././@LongLink",
            tar::EntryType::GNULongName,
            &vec![b'a'; 64 << 20],
            |_| {},
        )
    });
    let lab = Lab::new();
    let error = lab
        .load(&oci("a:1", &[bomb], gzip))
        .unwrap_err()
        .to_string();
    assert!(error.contains("names or attributes too long"), "{error}");
}
