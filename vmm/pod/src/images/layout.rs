//! Which images an archive holds, and where their parts are in it.
//!
//! Two forms: the OCI image layout (image-spec, image-layout.md) and that of
//! `docker save` (`manifest.json`). An archive of both is read as the first.

use std::io;

use oci_spec::image::{
    Arch, Descriptor, DescriptorBuilder, Digest, ImageConfiguration, ImageIndex, ImageManifest,
    ImageManifestBuilder, MediaType, Os, Platform,
};
use serde::Deserialize;

use super::digest;
use super::parse;
use super::source::Source;

/// An index of indexes of ... ends here.
const MAX_NESTING: usize = 4;
const MAX_IMAGES: usize = 1000;
/// As many lower layers as overlayfs takes.
const MAX_LAYERS: usize = 500;

/// An image of an archive, with its documents read and checked.
#[derive(Debug)]
pub struct Planned {
    /// Full names.
    pub names: Vec<String>,
    pub digest: String,
    pub manifest: Vec<u8>,
    pub id: String,
    pub config: Vec<u8>,
    pub layers: Vec<PlannedLayer>,
}

#[derive(Debug)]
pub struct PlannedLayer {
    /// Digest of the unpacked tar stream.
    pub diff_id: Digest,
    /// Name of its file in the archive.
    pub file: String,
    /// Digest of that file; None: the archive doesn't say.
    pub digest: Option<Digest>,
    pub size: u64,
}

/// Reads what an archive says of its images.
///
/// # Errors
/// When it is of neither form, or a document of it is missing or damaged.
pub fn plan(source: &Source) -> io::Result<Vec<Planned>> {
    let planned = if source.has("index.json") && source.has("oci-layout") {
        plan_oci(source)?
    } else if source.has("manifest.json") {
        plan_docker(source)?
    } else {
        return Err(io::Error::other(
            "no image in it: there is neither index.json (OCI) nor manifest.json (docker save)",
        ));
    };
    if planned.is_empty() {
        return Err(io::Error::other(
            "no image for this platform (linux on x86-64) in it",
        ));
    }
    Ok(planned)
}

fn plan_oci(source: &Source) -> io::Result<Vec<Planned>> {
    let index: ImageIndex = document(
        &named(source.document("index.json"), "index.json")?,
        "index.json",
    )?;
    let mut planned: Vec<Planned> = Vec::new();
    for descriptor in index.manifests().iter().take(MAX_IMAGES) {
        let Some(manifest) = choose(source, descriptor, 0)? else {
            continue;
        };
        let names = names_of(descriptor);
        // One image under several names has a descriptor for each.
        if let Some(known) = planned
            .iter_mut()
            .find(|known| known.digest == manifest.digest().to_string())
        {
            known.names.extend(names);
            continue;
        }
        planned.push(plan_manifest(source, &manifest, names)?);
    }
    Ok(planned)
}

/// The manifest that a descriptor stands for; of an index, that of our platform.
fn choose(
    source: &Source,
    descriptor: &Descriptor,
    nesting: usize,
) -> io::Result<Option<Descriptor>> {
    if descriptor
        .platform()
        .as_ref()
        .is_some_and(|platform| !is_ours(platform))
    {
        return Ok(None);
    }
    match descriptor.media_type() {
        MediaType::ImageManifest => Ok(Some(descriptor.clone())),
        MediaType::ImageIndex if nesting < MAX_NESTING => {
            let name = blob_name(descriptor.digest());
            let index: ImageIndex = document(&blob(source, descriptor.digest())?, &name)?;
            for below in index.manifests() {
                if let Some(found) = choose(source, below, nesting + 1)? {
                    return Ok(Some(found));
                }
            }
            Ok(None)
        }
        MediaType::Other(kind)
            if kind == "application/vnd.docker.distribution.manifest.v2+json" =>
        {
            Ok(Some(descriptor.clone()))
        }
        _ => Ok(None),
    }
}

fn is_ours(platform: &Platform) -> bool {
    *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64
}

/// Full names that an index gives an image. containerd and Docker write the whole
/// name beside the tag; others write one of both as the reference.
fn names_of(descriptor: &Descriptor) -> Vec<String> {
    let annotations = descriptor.annotations().as_ref();
    let annotation = |key: &str| annotations.and_then(|all| all.get(key)).map(String::as_str);
    annotation("io.containerd.image.name")
        .or_else(|| {
            // A bare tag doesn't say of what.
            annotation("org.opencontainers.image.ref.name").filter(|name| name.contains(['/', ':']))
        })
        .and_then(full_name)
        .into_iter()
        .collect()
}

/// A name as the store has it: with registry and tag.
pub fn full_name(name: &str) -> Option<String> {
    parse(name).ok().map(|reference| reference.whole())
}

fn plan_manifest(
    source: &Source,
    descriptor: &Descriptor,
    names: Vec<String>,
) -> io::Result<Planned> {
    let manifest = blob(source, descriptor.digest())?;
    let parsed: ImageManifest = document(&manifest, &blob_name(descriptor.digest()))?;
    let config = blob(source, parsed.config().digest())?;
    let diff_ids = diff_ids(&config, &blob_name(parsed.config().digest()))?;
    if diff_ids.len() != parsed.layers().len() {
        return Err(io::Error::other(
            "its manifest and its configuration differ in the number of layers",
        ));
    }
    let layers = parsed
        .layers()
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| PlannedLayer {
            diff_id,
            file: blob_name(layer.digest()),
            digest: Some(layer.digest().clone()),
            size: layer.size(),
        })
        .collect();
    Ok(Planned {
        names,
        digest: descriptor.digest().to_string(),
        manifest,
        id: parsed.config().digest().to_string(),
        config,
        layers,
    })
}

/// An entry of `docker save`'s manifest.json.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn plan_docker(source: &Source) -> io::Result<Vec<Planned>> {
    let images: Vec<DockerImage> = document(
        &named(source.document("manifest.json"), "manifest.json")?,
        "manifest.json",
    )?;
    images
        .iter()
        .take(MAX_IMAGES)
        .map(|image| plan_docker_image(source, image))
        .collect()
}

fn plan_docker_image(source: &Source, image: &DockerImage) -> io::Result<Planned> {
    let config = named(source.document(&image.config), &image.config)?;
    let id = digest::sha256_of(&config);
    // Its name is its digest: `HEX.json` or `blobs/sha256/HEX`.
    let stem = image
        .config
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(".json");
    if stem.len() == 64 && format!("sha256:{stem}") != id {
        return Err(io::Error::other(format!(
            "{}: damaged: its digest is {id}",
            image.config
        )));
    }
    let diff_ids = diff_ids(&config, &image.config)?;
    if diff_ids.len() != image.layers.len() {
        return Err(io::Error::other(
            "its manifest and its configuration differ in the number of layers",
        ));
    }
    let mut layers = Vec::new();
    for (file, diff_id) in image.layers.iter().zip(diff_ids) {
        let (_, size) = named(source.reader(file), file)?;
        layers.push(PlannedLayer {
            diff_id,
            file: file.clone(),
            digest: None,
            size,
        });
    }
    let manifest = manifest_of(&id, config.len() as u64, &layers)?;
    Ok(Planned {
        names: image
            .repo_tags
            .iter()
            .flatten()
            .filter_map(|name| full_name(name))
            .collect(),
        digest: digest::sha256_of(&manifest),
        manifest,
        id,
        config,
        layers,
    })
}

/// The manifest that `docker save` leaves out; the layers are those of the archive.
fn manifest_of(id: &str, size: u64, layers: &[PlannedLayer]) -> io::Result<Vec<u8>> {
    let config: Digest = id.parse().map_err(io::Error::other)?;
    let layers: Vec<Descriptor> = layers
        .iter()
        .map(|layer| Descriptor::new(MediaType::ImageLayer, layer.size, layer.diff_id.clone()))
        .collect();
    let manifest = DescriptorBuilder::default()
        .media_type(MediaType::ImageConfig)
        .size(size)
        .digest(config)
        .build()
        .and_then(|config| {
            ImageManifestBuilder::default()
                .schema_version(2_u32)
                .media_type(MediaType::ImageManifest)
                .config(config)
                .layers(layers)
                .build()
        })
        .map_err(io::Error::other)?;
    serde_json::to_vec(&manifest).map_err(io::Error::other)
}

fn diff_ids(config: &[u8], name: &str) -> io::Result<Vec<Digest>> {
    let config: ImageConfiguration = document(config, name)?;
    let linux = *config.os() == Os::Linux && *config.architecture() == Arch::Amd64;
    if !linux {
        return Err(io::Error::other(format!(
            "the image is for {} on {}, and this is linux on amd64",
            config.os(),
            config.architecture()
        )));
    }
    let ids = config.rootfs().diff_ids();
    if ids.len() > MAX_LAYERS {
        return Err(io::Error::other(format!(
            "it has more than {MAX_LAYERS} layers"
        )));
    }
    ids.iter()
        .map(|id| {
            id.parse()
                .map_err(|error| io::Error::other(format!("{name}: {error}")))
        })
        .collect()
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.digest())
}

/// A document of the archive, with its digest checked.
fn blob(source: &Source, wanted: &Digest) -> io::Result<Vec<u8>> {
    let name = blob_name(wanted);
    let bytes = named(source.document(&name), &name)?;
    named(digest::check(&bytes, wanted), &name)?;
    Ok(bytes)
}

fn document<T: for<'de> Deserialize<'de>>(bytes: &[u8], name: &str) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|error| io::Error::other(format!("{name}: {error}")))
}

fn named<T>(result: io::Result<T>, name: &str) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
}
