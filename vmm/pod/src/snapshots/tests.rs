//! Snapshots that are whole, and others.

use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::manifest;
use crate::state::{Directories, Registry};

fn contents(registry: &Registry) -> (Claim, Contents) {
    let manifest = "{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {containers: [{name: one, image: busybox}]}}";
    let manifest = manifest::parse("p.yaml", manifest).unwrap().remove(0);
    let containers = vec![ContainerStatus::new("one", "busybox")];
    let claim = registry
        .claim("web", "Always", vec![], containers, None)
        .unwrap();
    let contents = Contents {
        manifest,
        status: claim.status.clone(),
        size: MachineSize {
            vcpus: 1,
            memory_mib: 256,
        },
        networks: vec!["hull".into()],
        ports: vec!["8080:80".parse().unwrap()],
    };
    (claim, contents)
}

/// A finished snapshot, of a pod with a file on disk.
async fn taken() -> (TempDir, PathBuf, Registry) {
    let root = tempfile::tempdir().unwrap();
    let dirs = Directories::new(root.path().join("run"), root.path().join("data"));
    let registry = Registry::open(dirs, |_, _| Ok(())).unwrap();
    let (claim, contents) = contents(&registry);
    fs::write(claim.dir.data().join("logs/kept"), "kept").unwrap();
    let path = root.path().join("snapshot");
    let unfinished = Unfinished::begin(&path).unwrap();
    let files = unfinished.files().unwrap();
    write_contents(&files.pod, &contents).unwrap();
    File::from(files.machine.state.try_clone().unwrap())
        .write_all(b"state")
        .unwrap();
    File::from(files.machine.memory.try_clone().unwrap())
        .set_len(1 << 20)
        .unwrap();
    pack(claim.dir.data(), files.files).await.unwrap();
    unfinished.finish().await.unwrap();
    registry.abandon(claim).unwrap();
    (root, path, registry)
}

fn refused(path: &Path) -> String {
    crate::text::chain(&Snapshot::open(path).unwrap_err())
}

#[tokio::test]
async fn what_is_taken_is_restored() {
    let (_root, path, registry) = taken().await;
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);

    for name in ["web", "other"] {
        let snapshot = Snapshot::open(&path).unwrap();
        assert_eq!(snapshot.contents.asked()[0].publication.host_port, 8080);
        let containers = snapshot.contents.status.containers.clone();
        let mut claim = registry
            .claim(name, "Always", vec![], containers, None)
            .unwrap();
        let restored = snapshot.restore(&mut claim).unwrap();

        let kept = fs::read_to_string(claim.dir.data().join("logs/kept"));
        assert_eq!(kept.unwrap(), "kept");
        assert_eq!(restored.size.memory_mib, 256);
    }
}

#[test]
fn a_directory_that_is_no_snapshot_is_refused_with_the_reason() {
    let root = tempfile::tempdir().unwrap();

    assert!(refused(root.path()).contains("there is no snapshot.json"));
    assert!(refused(&root.path().join("nowhere")).contains("there is no snapshot.json"));
}

#[tokio::test]
async fn every_damage_is_noticed() {
    let (_root, path, _) = taken().await;
    for name in ALL {
        let file = path.join(name);
        let good = fs::read(&file).unwrap();

        let mut bytes = good.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(refused(&path).contains(&format!("{name} has been changed")));
        fs::write(&file, &good[..good.len() - 1]).unwrap();
        assert!(refused(&path).contains(&format!("{name} has {} bytes", good.len() - 1)));
        fs::remove_file(&file).unwrap();
        assert!(refused(&path).contains(&format!("{name}: No such file")));
        std::os::unix::fs::symlink("/etc/hostname", &file).unwrap();
        assert!(refused(&path).contains(name));

        fs::remove_file(&file).unwrap();
        fs::write(&file, &good).unwrap();
    }
    Snapshot::open(&path).unwrap();
}

#[tokio::test]
async fn another_versions_is_refused() {
    let (_root, path, _) = taken().await;
    let text = fs::read_to_string(path.join(DESCRIPTION)).unwrap();

    let newer = text.replace("\"format\": 1", "\"format\": 2");
    fs::write(path.join(DESCRIPTION), newer).unwrap();
    assert!(refused(&path).contains("a snapshot of form 2"));
    let own = format!("\"hull\": \"{}\"", env!("CARGO_PKG_VERSION"));
    let other = text.replace(&own, "\"hull\": \"9.9.9\", \"more\": 1");
    fs::write(path.join(DESCRIPTION), other).unwrap();
    assert!(refused(&path).contains("was taken by Hull 9.9.9"));
}

#[test]
fn a_directory_with_something_in_it_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("mine"), "mine").unwrap();
    fs::write(root.path().join("memory"), "mine").unwrap();

    let refused = Unfinished::begin(root.path());

    assert!(matches!(refused, Err(SnapshotError::NotEmpty(_))));
    assert_eq!(fs::read(root.path().join("memory")).unwrap(), b"mine");
}

#[tokio::test]
async fn what_is_there_of_another_snapshot_is_told() {
    let root = tempfile::tempdir().unwrap();
    let killed = Unfinished::begin(root.path()).unwrap();
    let _ = killed.files().unwrap();
    std::mem::forget(killed);

    let refused = Unfinished::begin(root.path()).unwrap_err().to_string();

    assert!(
        refused.contains("(files.tar, memory, pod.json, state) and no snapshot.json"),
        "{refused}"
    );
    let (_root, path, _) = taken().await;
    let refused = Unfinished::begin(&path);
    assert!(matches!(refused, Err(SnapshotError::Taken(_))));
}

#[tokio::test]
async fn nothing_is_left_of_one_that_is_not_finished() {
    let root = tempfile::tempdir().unwrap();
    let new = root.path().join("new");
    for path in [root.path(), &new] {
        let unfinished = Unfinished::begin(path).unwrap();
        let _ = unfinished.files().unwrap();
        // Given up while the files are read.
        tokio::select! {
            biased;
            _ = unfinished.finish() => panic!("it is finished at once"),
            () = std::future::ready(()) => {}
        }
    }

    assert!(!new.exists());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let dirs = Directories::new(root.path().join("run"), root.path().join("data"));
    let registry = Registry::open(dirs, |_, _| Ok(())).unwrap();
    let (_claim, good) = contents(&registry);
    let parse = |contents: &Contents| Contents::parse(&serde_json::to_vec(contents).unwrap());
    parse(&good).unwrap();

    let mut other = good.clone();
    other.status.containers[0].name = "two".into();
    assert!(parse(&other).is_err());
    let mut other = good.clone();
    other.status.joined = other.status.containers.clone();
    assert!(parse(&other).is_err());
}

#[test]
fn a_renamed_pod_keeps_its_hostname() {
    let root = tempfile::tempdir().unwrap();
    let dirs = Directories::new(root.path().join("run"), root.path().join("data"));
    let registry = Registry::open(dirs, |_, _| Ok(())).unwrap();
    let (_claim, contents) = contents(&registry);

    let renamed = contents.manifest.clone().renamed("other").unwrap();

    assert_eq!(
        (renamed.name(), renamed.hostname()),
        ("other", "web".into())
    );
    assert!(contents.manifest.renamed("no/name").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn changed_texts_are_read_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories::new(root.path().join("run"), root.path().join("data"));
        let registry = Registry::open(dirs, |_, _| Ok(())).unwrap();
        let (_claim, contents) = contents(&registry);
        let description = Description {
            format: FORMAT,
            hull: env!("CARGO_PKG_VERSION").into(),
            created_at: Timestamp::UNIX_EPOCH,
            files: BTreeMap::new(),
        };
        for mut text in [
            serde_json::to_vec(&contents).unwrap(),
            serde_json::to_vec(&description).unwrap(),
        ] {
            for (place, value) in &changes {
                let place = place.index(text.len());
                text[place] = *value;
            }
            // A panic is the failure.
            for text in [&text[..], &text[..cut.index(text.len())]] {
                if let Ok(contents) = Contents::parse(text) {
                    let _ = (contents.choice(), contents.asked(), contents.images());
                }
                drop(parse_description(root.path(), text));
            }
        }
    }
}
