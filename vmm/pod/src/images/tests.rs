mod unpacking;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::digest::sha256_of;
use super::{ImageError, Progress, Store};

/// An archive in the making: names and contents.
#[derive(Default)]
struct Archive {
    files: Vec<(String, Vec<u8>)>,
}

impl Archive {
    fn blob(&mut self, bytes: &[u8]) -> Value {
        let digest = sha256_of(bytes);
        self.files.push((
            format!("blobs/{}", digest.replace(':', "/")),
            bytes.to_vec(),
        ));
        json!({"digest": digest, "size": bytes.len()})
    }

    fn write(&self, path: &Path) {
        let mut builder = tar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in &self.files {
            append(&mut builder, name, tar::EntryType::Regular, bytes, |_| {});
        }
        builder.finish().unwrap();
    }

    fn write_directory(&self, path: &Path) {
        for (name, bytes) in &self.files {
            let file = path.join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, bytes).unwrap();
        }
    }
}

fn append(
    builder: &mut tar::Builder<impl Write>,
    name: &str,
    kind: tar::EntryType,
    bytes: &[u8],
    change: impl Fn(&mut tar::Header),
) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    // The name as it is: the builder's own setters refuse hostile ones.
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    change(&mut header);
    header.set_cksum();
    builder.append(&header, bytes).unwrap();
}

fn link(target: &str) -> impl Fn(&mut tar::Header) {
    let target = target.to_owned();
    move |header| header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes())
}

fn layer(fill: impl Fn(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    fill(&mut builder);
    builder.into_inner().unwrap()
}

fn simple_layer(text: &str) -> Vec<u8> {
    layer(|tar| {
        append(
            tar,
            "file",
            tar::EntryType::Regular,
            text.as_bytes(),
            |_| {},
        )
    })
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256_of(layer)).collect();
    json!({
        "architecture": "amd64", "os": "linux", "created": "2026-01-01T00:00:00Z",
        "config": {"Cmd": ["sh"], "Env": null, "ExposedPorts": {"80/tcp": {}}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}
    })
    .to_string()
    .into_bytes()
}

/// An OCI layout of one image, its layers stored as `pack` makes them.
fn oci(name: &str, layers: &[Vec<u8>], pack: impl Fn(&[u8]) -> Vec<u8>) -> Archive {
    let mut archive = Archive::default();
    let kind = "application/vnd.oci.image";
    let mut config = archive.blob(&config(layers));
    config["mediaType"] = json!(format!("{kind}.config.v1+json"));
    let layers: Vec<Value> = layers
        .iter()
        .map(|layer| {
            let mut descriptor = archive.blob(&pack(layer));
            descriptor["mediaType"] = json!(format!("{kind}.layer.v1.tar"));
            descriptor
        })
        .collect();
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string();
    let mut manifest = archive.blob(manifest.as_bytes());
    manifest["mediaType"] = json!(format!("{kind}.manifest.v1+json"));
    manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
    // As multi-platform images have it: an index of the image in the index of the layout.
    let other = json!({"mediaType": format!("{kind}.manifest.v1+json"), "size": 1,
        "digest": sha256_of(b"other"), "platform": {"architecture": "arm64", "os": "linux"}});
    let index = json!({"schemaVersion": 2, "manifests": [other, manifest]}).to_string();
    let mut index = archive.blob(index.as_bytes());
    index["mediaType"] = json!(format!("{kind}.index.v1+json"));
    index["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    archive.files.push((
        "index.json".into(),
        json!({"schemaVersion": 2, "manifests": [index]})
            .to_string()
            .into(),
    ));
    archive.files.push((
        "oci-layout".into(),
        b"{\"imageLayoutVersion\":\"1.0.0\"}".to_vec(),
    ));
    archive
}

fn docker(names: &[&str], layers: &[Vec<u8>]) -> Archive {
    let config = config(layers);
    let config_name = format!("{}.json", sha256_of(&config).trim_start_matches("sha256:"));
    let mut archive = Archive::default();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let files: Vec<String> = (0..layers.len())
        .map(|number| format!("{number}/layer.tar"))
        .collect();
    let manifest = json!([{"Config": config_name, "RepoTags": names, "Layers": files}]).to_string();
    archive
        .files
        .extend(files.into_iter().zip(layers.iter().cloned()));
    archive.files.push((config_name, config));
    archive
        .files
        .push(("manifest.json".into(), manifest.into()));
    archive
}

/// An image with one layer in which there is a `file`, for tests elsewhere.
pub fn test_image(store: &Store, dir: &Path) -> super::Image {
    let path = dir.join("image.tar");
    docker(&["x"], &[simple_layer("x")]).write(&path);
    store.load(&path, &mut |_| {}).unwrap();
    store.resolve("x").unwrap()
}

struct Lab {
    dir: TempDir,
    store: Store,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self { dir, store }
    }

    fn load(&self, archive: &Archive) -> Result<Vec<super::Loaded>, ImageError> {
        let path = self.dir.path().join("archive");
        archive.write(&path);
        self.store.load(&path, &mut |_| {})
    }

    fn layers(&self) -> Vec<PathBuf> {
        let under = self.dir.path().join("images/layers/sha256");
        std::fs::read_dir(under)
            .map(|dir| dir.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default()
    }

    /// What is left of unfinished work.
    fn scratch(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("images/tmp"))
            .unwrap()
            .count()
    }

    /// Loads an image of one layer, and returns its root.
    fn unpack(&self, layer: Vec<u8>) -> Result<PathBuf, ImageError> {
        self.load(&oci("example.com/a:1", &[layer], <[u8]>::to_vec))?;
        Ok(self
            .store
            .resolve("example.com/a:1")
            .unwrap()
            .layers
            .remove(0))
    }
}

#[test]
fn archives_of_all_forms_give_the_same_image() {
    let layers = [simple_layer("one"), simple_layer("two")];
    let mut ids = Vec::new();
    for archive in [
        oci("docker.io/library/busybox:latest", &layers, <[u8]>::to_vec),
        oci("busybox:latest", &layers, gzip),
        oci("busybox:latest", &layers, |bytes| {
            zstd::encode_all(bytes, 1).unwrap()
        }),
        docker(&["busybox:latest"], &layers),
    ] {
        let lab = Lab::new();
        lab.load(&archive).unwrap();
        let image = lab.store.resolve("busybox").unwrap();
        assert_eq!(image.reference, "docker.io/library/busybox:latest");
        assert_eq!(std::fs::read(image.layers[1].join("file")).unwrap(), b"two");
        assert_eq!(lab.scratch(), 0);
        ids.push(image.id);
    }
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
}

#[test]
fn directories_and_compressed_archives_are_read() {
    let archive = oci("busybox:latest", &[simple_layer("x")], <[u8]>::to_vec);
    let lab = Lab::new();
    let directory = lab.dir.path().join("layout");
    archive.write_directory(&directory);
    lab.store.load(&directory, &mut |_| {}).unwrap();
    assert!(lab.store.resolve("busybox").is_ok());

    let lab = Lab::new();
    let (plain, packed) = (lab.dir.path().join("plain"), lab.dir.path().join("packed"));
    archive.write(&plain);
    std::fs::write(&packed, gzip(&std::fs::read(&plain).unwrap())).unwrap();
    lab.store.load(&packed, &mut |_| {}).unwrap();
    assert!(lab.store.resolve("busybox").is_ok());
}

#[test]
fn layers_are_shared_and_unpacked_once() {
    let lab = Lab::new();
    let base = simple_layer("base");
    lab.load(&docker(&["a:1"], &[base.clone(), simple_layer("a")]))
        .unwrap();
    lab.load(&docker(&["b:1", "c:1"], &[base, simple_layer("b")]))
        .unwrap();
    assert_eq!(lab.layers().len(), 3);
    let names: Vec<_> = lab
        .store
        .list()
        .unwrap()
        .into_iter()
        .filter_map(|image| image.reference)
        .collect();
    assert_eq!(
        names,
        [
            "docker.io/library/a:1",
            "docker.io/library/b:1",
            "docker.io/library/c:1"
        ]
    );

    let removed = lab.store.remove("b:1").unwrap();
    assert_eq!(removed.untagged, ["docker.io/library/b:1"]);
    assert_eq!(removed.deleted, None);
    assert_eq!(lab.layers().len(), 3);
    assert!(lab.store.remove("c:1").unwrap().deleted.is_some());
    assert_eq!(lab.layers().len(), 2);
    assert!(
        matches!(lab.store.resolve("c:1"), Err(ImageError::NotFound(name)) if name == "docker.io/library/c:1")
    );
    assert!(lab.store.resolve("a:1").is_ok());
    lab.store.remove("a:1").unwrap();
    assert_eq!(lab.layers().len(), 0);
    assert_eq!(
        std::fs::read_dir(lab.dir.path().join("images/blobs/sha256"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(lab.scratch(), 0);
}

#[test]
fn progress_tells_what_is_done() {
    let lab = Lab::new();
    let path = lab.dir.path().join("archive");
    docker(&["a:1"], &[simple_layer("a")]).write(&path);
    let mut steps = Vec::new();
    lab.store.load(&path, &mut |step| steps.push(step)).unwrap();
    assert!(matches!(
        &steps[0],
        Progress::Layer {
            index: 1,
            count: 1,
            ..
        }
    ));
    assert!(matches!(steps[1], Progress::Bytes(bytes) if bytes > 0));
    assert_eq!(steps[2], Progress::Tagged("docker.io/library/a:1".into()));
    let mut again = Vec::new();
    lab.store.load(&path, &mut |step| again.push(step)).unwrap();
    assert_eq!(again[1], Progress::Present);
}

#[test]
fn an_image_in_use_stays() {
    let lab = Lab::new();
    lab.load(&docker(&["a:1", "a:2"], &[simple_layer("a")]))
        .unwrap();
    let image = lab.store.resolve("a:1").unwrap();
    assert!(lab.store.remove("a:2").is_ok());
    assert!(matches!(lab.store.remove("a:1"), Err(ImageError::InUse(_))));
    // A newer image takes the name: the old one's layers stay until nobody uses them.
    lab.load(&docker(&["a:1"], &[simple_layer("newer")]))
        .unwrap();
    assert!(image.layers[0].join("file").exists());
    assert_eq!(lab.store.list().unwrap().len(), 2);
    drop(image);
    lab.load(&docker(&["b:1"], &[simple_layer("b")])).unwrap();
    assert_eq!(lab.layers().len(), 2);
    assert_eq!(lab.store.list().unwrap().len(), 2);
}

#[test]
fn images_are_found_by_name_digest_and_id() {
    let lab = Lab::new();
    lab.load(&oci("busybox:latest", &[simple_layer("x")], <[u8]>::to_vec))
        .unwrap();
    let image = lab.store.resolve("busybox").unwrap();
    let hex = image.id.trim_start_matches("sha256:").to_owned();
    for name in [
        "busybox:latest",
        "library/busybox",
        "docker.io/busybox",
        "docker.io/library/busybox:latest",
        &image.id,
        &hex,
        &hex[..12],
        &format!("busybox@{}", image.digest),
    ] {
        assert_eq!(
            lab.store.resolve(name).map(|found| found.id).ok().as_ref(),
            Some(&image.id),
            "{name}"
        );
    }
    for name in [
        "busybox:1",
        "other",
        "example.com/busybox",
        &format!("other@{}", image.digest),
    ] {
        assert!(
            matches!(lab.store.resolve(name), Err(ImageError::NotFound(_))),
            "{name}"
        );
    }
    assert!(matches!(
        lab.store.resolve("UPPER"),
        Err(ImageError::BadReference { .. })
    ));
}

#[test]
fn an_image_without_a_name_is_used_by_its_id() {
    let lab = Lab::new();
    let loaded = lab.load(&docker(&[], &[simple_layer("x")])).unwrap();
    assert_eq!(loaded[0].reference, None);
    assert!(lab.store.resolve(&loaded[0].id).is_ok());
    assert_eq!(
        lab.store.remove(&loaded[0].id).unwrap().deleted,
        Some(loaded[0].id.clone())
    );
}

#[test]
fn an_image_without_layers_is_an_image() {
    let lab = Lab::new();
    lab.load(&oci("empty:1", &[], <[u8]>::to_vec)).unwrap();
    assert_eq!(
        lab.store.resolve("empty:1").unwrap().layers,
        Vec::<PathBuf>::new()
    );
}

#[test]
fn damage_is_found_and_nothing_is_left() {
    let layers = [simple_layer("x")];
    let mut other_layer = oci("a:1", &layers, <[u8]>::to_vec);
    let at = other_layer
        .files
        .iter()
        .position(|(_, bytes)| *bytes == layers[0])
        .unwrap();
    let last = other_layer.files[at].1.len() - 1;
    other_layer.files[at].1[last] ^= 1;
    let mut wrong_diff_id = docker(&["a:1"], &layers);
    wrong_diff_id.files[0].1 = simple_layer("y");
    let mut no_config = docker(&["a:1"], &layers);
    no_config.files.remove(1);
    let mut damaged_config = docker(&["a:1"], &layers);
    damaged_config.files[1].1.push(b' ');
    let mut cut = oci("a:1", &layers, gzip);
    let at = cut
        .files
        .iter()
        .position(|(_, bytes)| bytes.starts_with(&[0x1f, 0x8b]))
        .unwrap();
    cut.files[at].1.truncate(20);
    for (archive, wanted) in [
        (other_layer, "damaged: its digest is"),
        (wrong_diff_id, "damaged: its digest is"),
        (no_config, "not in the archive"),
        (damaged_config, "damaged: its digest is"),
        (cut, "it has 20 bytes"),
        (Archive::default(), "no image in it"),
    ] {
        let lab = Lab::new();
        let error = lab.load(&archive).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
        assert_eq!((lab.layers().len(), lab.scratch()), (0, 0), "{wanted}");
        assert!(lab.store.list().unwrap().is_empty());
    }
}

#[test]
fn what_is_no_archive_is_refused() {
    let lab = Lab::new();
    let path = lab.dir.path().join("text");
    std::fs::write(&path, "hello".repeat(1000)).unwrap();
    let error = lab.store.load(&path, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("text: no tar archive"), "{error}");
    let error = lab
        .store
        .load(Path::new("/nonexistent"), &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("/nonexistent: No such file"), "{error}");
}

#[test]
fn an_interrupted_load_is_cleaned_up_by_the_next() {
    let lab = Lab::new();
    std::fs::create_dir_all(lab.dir.path().join("images/tmp/x/fs/deep")).unwrap();
    lab.load(&docker(&["a:1"], &[simple_layer("a")])).unwrap();
    assert_eq!(lab.scratch(), 0);
}

#[test]
fn directories_of_the_store_are_closed_to_others() {
    let lab = Lab::new();
    let mode = std::fs::metadata(lab.dir.path().join("images"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o700);
}
