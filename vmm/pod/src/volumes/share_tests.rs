use std::os::unix::fs::MetadataExt;

use super::*;
use crate::images::{Store, test_image};
use crate::manifest;

/// Runs a test in a thread with mounts of its own, which are gone after it.
pub fn in_private_namespace(test: impl FnOnce(&Path) + Send + 'static) {
    std::thread::spawn(move || {
        super::super::enter_private_namespace().unwrap();
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
    })
    .join()
    .unwrap();
}

struct Lab {
    share: Share,
    path: PathBuf,
    data: PathBuf,
}

impl Lab {
    fn new(dir: &Path) -> Self {
        let (path, data) = (dir.join("share"), dir.join("data"));
        std::fs::create_dir(&path).unwrap();
        std::fs::create_dir(&data).unwrap();
        Self {
            share: Share::create(&path, &data).unwrap(),
            path,
            data,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

/// A pod with these volumes, and two containers with these mounts.
fn pod(volumes: &str, first: &str, second: &str) -> PodManifest {
    let text = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {{volumes: [{volumes}], \
         securityContext: {{fsGroup: 1234}}, containers: [{{name: a, image: x, volumeMounts: [{first}]}}, \
         {{name: b, image: x, volumeMounts: [{second}]}}]}}}}"
    );
    manifest::parse("p.yaml", &text).unwrap().remove(0)
}

fn image(dir: &Path) -> Image {
    let store = Store::open(&dir.join("store")).unwrap();
    test_image(&store, dir)
}

/// Mount options of the topmost mount at a path.
fn options(path: &Path) -> String {
    let info = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let path = path.to_str().unwrap();
    info.lines()
        .rev()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields[4] == path)
        .map(|fields| fields[5..].join(" "))
        .unwrap_or_default()
}

fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn nobody_can_change_the_tree_itself() {
    in_private_namespace(|dir| {
        let lab = Lab::new(dir);
        assert_eq!(errno(std::fs::write(lab.at("x"), "")), Some(libc::EROFS));
        assert_eq!(
            errno(std::fs::create_dir(lab.at("volumes/x"))),
            Some(libc::EROFS)
        );
        assert_eq!(
            errno(std::fs::remove_dir(lab.at("rootfs"))),
            Some(libc::EROFS)
        );
        assert_eq!(
            errno(std::os::unix::fs::symlink("/etc", lab.at("rootfs/x"))),
            Some(libc::EROFS)
        );
    });
}

#[test]
fn a_volume_that_no_container_writes_is_read_only() {
    in_private_namespace(|dir| {
        for name in ["ro", "mixed", "unused"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        // A mount beneath it is read-only, too.
        std::fs::create_dir(dir.join("ro/below")).unwrap();
        let below = mounts::tmpfs("1m", "16").unwrap();
        mounts::attach(&below, CWD, dir.join("ro/below").to_str().unwrap()).unwrap();
        let volume = |name: &str| {
            format!(
                "{{name: {name}, hostPath: {{path: {}, type: Directory}}}}",
                dir.join(name).display()
            )
        };
        let volumes = format!(
            "{}, {}, {}",
            volume("ro"),
            volume("mixed"),
            volume("unused")
        );
        let manifest = pod(
            &volumes,
            "{name: ro, mountPath: /r, readOnly: true}, {name: mixed, mountPath: /m}",
            "{name: mixed, mountPath: /m, readOnly: true}",
        );
        let lab = Lab::new(dir);
        assert_eq!(lab.share.bind_volumes(&manifest).unwrap(), Vec::new());
        assert_eq!(
            errno(std::fs::write(lab.at("volumes/ro/x"), "")),
            Some(libc::EROFS)
        );
        assert_eq!(
            errno(std::fs::write(lab.at("volumes/ro/below/x"), "")),
            Some(libc::EROFS)
        );
        std::fs::write(lab.at("volumes/mixed/x"), "y").unwrap();
        assert_eq!(std::fs::read(dir.join("mixed/x")).unwrap(), b"y");
        assert!(!lab.at("volumes/unused").exists());
        let flags = options(&lab.at("volumes/mixed"));
        assert!(
            flags.contains("nosuid") && flags.contains("nodev"),
            "{flags}"
        );
    });
}

#[test]
fn later_mounts_of_the_host_do_not_come_into_a_volume() {
    in_private_namespace(|dir| {
        // The volume's file system is shared, as on hosts with systemd.
        let host = mounts::tmpfs("1m", "64").unwrap();
        std::fs::create_dir(dir.join("host")).unwrap();
        mounts::attach(&host, CWD, dir.join("host").to_str().unwrap()).unwrap();
        mounts::set_attributes(host.as_fd(), MountAttrFlags::empty(), Propagation::Shared).unwrap();
        std::fs::create_dir(dir.join("host/sub")).unwrap();
        let volume = format!(
            "{{name: v, hostPath: {{path: {}}}}}",
            dir.join("host").display()
        );
        let lab = Lab::new(dir);
        lab.share
            .bind_volumes(&pod(
                &volume,
                "{name: v, mountPath: /v, readOnly: true}",
                "",
            ))
            .unwrap();
        let later = mounts::tmpfs("1m", "64").unwrap();
        mounts::attach(&later, CWD, dir.join("host/sub").to_str().unwrap()).unwrap();
        std::fs::write(dir.join("host/sub/secret"), "").unwrap();
        assert!(!lab.at("volumes/v/sub/secret").exists());
    });
}

#[test]
fn files_are_bound_onto_files() {
    in_private_namespace(|dir| {
        let file = dir.join("config");
        std::fs::write(&file, "old").unwrap();
        let volume = format!(
            "{{name: f, hostPath: {{path: {}, type: File}}}}",
            file.display()
        );
        let lab = Lab::new(dir);
        lab.share
            .bind_volumes(&pod(&volume, "{name: f, mountPath: /f}", ""))
            .unwrap();
        std::fs::write(lab.at("volumes/f"), "new").unwrap();
        assert_eq!(std::fs::read(file).unwrap(), b"new");
    });
}

#[test]
fn a_missing_host_path_is_made_and_a_wrong_one_refused() {
    in_private_namespace(|dir| {
        let made = format!(
            "{{name: v, hostPath: {{path: {}}}}}",
            dir.join("a/b").display()
        );
        let lab = Lab::new(dir);
        lab.share
            .bind_volumes(&pod(&made, "{name: v, mountPath: /v}", ""))
            .unwrap();
        std::fs::write(lab.at("volumes/v/log"), "x").unwrap();
        assert!(dir.join("a/b/log").exists());
        let wrong = format!(
            "{{name: w, hostPath: {{path: {}, type: Directory}}}}",
            dir.join("a/b/log").display()
        );
        let error = lab
            .share
            .bind_volumes(&pod(&wrong, "{name: w, mountPath: /w}", ""))
            .unwrap_err();
        assert!(matches!(error, VolumeError::Refused(_)), "{error}");
    });
}

#[test]
fn empty_dirs_are_for_everybody_and_of_the_group() {
    in_private_namespace(|dir| {
        let volumes = "{name: e, emptyDir: {}}, {name: plain}, {name: m, emptyDir: {medium: Memory, sizeLimit: 1Mi}}";
        let mounts =
            "{name: e, mountPath: /e}, {name: plain, mountPath: /p}, {name: m, mountPath: /m}";
        let lab = Lab::new(dir);
        let memory = lab.share.bind_volumes(&pod(volumes, mounts, "")).unwrap();
        assert_eq!(
            memory,
            [MemoryVolume {
                name: "m".into(),
                size_bytes: 1 << 20
            }]
        );
        let stat = std::fs::metadata(lab.at("volumes/e")).unwrap();
        assert_eq!((stat.mode() & 0o7777, stat.gid()), (0o2777, 1234));
        assert!(lab.at("volumes/plain").is_dir());
        assert!(!lab.at("volumes/m").exists());
        assert_eq!(
            std::fs::metadata(lab.data.join("emptydir")).unwrap().mode() & 0o777,
            0o700
        );
    });
}

#[test]
fn files_of_etc_can_be_written_and_filled_without_harm() {
    in_private_namespace(|dir| {
        let lab = Lab::new(dir);
        let facts = NetworkFacts::default();
        lab.share.write_etc(&pod("", "", ""), &facts).unwrap();
        assert_eq!(
            std::fs::read_to_string(lab.at("etc/hostname")).unwrap(),
            "p\n"
        );
        assert!(
            std::fs::read_to_string(lab.at("etc/hosts"))
                .unwrap()
                .contains("localhost")
        );
        assert_eq!(
            std::fs::metadata(lab.at("etc/resolv.conf")).unwrap().mode() & 0o777,
            0o644
        );
        assert_eq!(
            errno(std::fs::write(lab.at("etc/hosts"), vec![0; 4 << 20])),
            Some(libc::ENOSPC)
        );
        lab.share.mount_root("later", &image(dir)).unwrap();
    });
}

#[test]
fn roots_are_separate_fresh_and_leave_the_image_alone() {
    in_private_namespace(|dir| {
        let lab = Lab::new(dir);
        let image = image(dir);
        lab.share.mount_root("a", &image).unwrap();
        lab.share.mount_root("b", &image).unwrap();
        std::fs::write(lab.at("rootfs/a/made"), "").unwrap();
        std::fs::remove_file(lab.at("rootfs/a/file")).unwrap();
        assert!(!lab.at("rootfs/b/made").exists());
        assert!(lab.at("rootfs/b/file").exists());
        assert!(image.layers[0].join("file").exists());
        let flags = options(&lab.at("rootfs/a"));
        assert!(
            flags.contains("nosuid") && flags.contains("nodev") && flags.contains("overlay"),
            "{flags}"
        );

        lab.share.unmount_root("a").unwrap();
        lab.share.unmount_root("a").unwrap();
        assert!(!lab.at("rootfs/a").exists());
        assert!(!lab.data.join("rootfs/a").exists());
        lab.share.mount_root("a", &image).unwrap();
        assert!(lab.at("rootfs/a/file").exists());
        assert!(!lab.at("rootfs/a/made").exists());
    });
}

#[test]
fn roots_that_the_guest_has_tampered_with_are_removed_without_harm() {
    // CVE-2020-2024: a name in a root that leads to the host must not be followed.
    in_private_namespace(|dir| {
        let lab = Lab::new(dir);
        std::fs::create_dir(dir.join("host")).unwrap();
        std::fs::write(dir.join("host/precious"), "").unwrap();
        lab.share.mount_root("a", &image(dir)).unwrap();
        std::os::unix::fs::symlink(dir.join("host"), lab.at("rootfs/a/link")).unwrap();
        std::os::unix::fs::symlink("/", lab.at("rootfs/a/slash")).unwrap();
        lab.share.unmount_root("a").unwrap();
        assert!(dir.join("host/precious").exists());
        assert!(lab.share.unmount_root("..").is_err());
        assert!(lab.share.unmount_root("a/../../x").is_err());
    });
}

#[test]
fn mounts_appear_in_a_copy_of_the_share_and_go_away_there() {
    // The jail of hull-vmm has such a copy, in a mount namespace of its own.
    in_private_namespace(|dir| {
        let lab = Lab::new(dir);
        let copy = dir.join("copy");
        std::fs::create_dir(&copy).unwrap();
        let tree = mounts::clone_tree(lab.share.root()).unwrap();
        mounts::attach(&tree, CWD, copy.to_str().unwrap()).unwrap();
        rustix::mount::mount_change(&copy, rustix::mount::MountPropagationFlags::DOWNSTREAM)
            .unwrap();
        lab.share.mount_root("late", &image(dir)).unwrap();
        assert!(copy.join("rootfs/late/file").exists());
        assert_eq!(
            errno(std::fs::write(copy.join("volumes/x"), "")),
            Some(libc::EROFS)
        );
        lab.share.unmount_root("late").unwrap();
        assert!(!copy.join("rootfs/late").exists());
    });
}
