//! The guest's kernel: an ELF image, loaded; a bzImage, unpacked to one first.
//!
//! Linux `Documentation/arch/x86/boot.rst`. The kernel's own decompressor would do it in
//! the guest at every boot; here it is done once, and the result is kept.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use sha2::{Digest, Sha256};
use vm_memory::GuestAddress;

use crate::layout::HIGH_MEMORY;
use crate::memory::GuestRam;

/// Largest kernel file that is read.
const MAX_IMAGE: u64 = 256 << 20;
/// Largest kernel that is unpacked: several times that of any distribution.
const MAX_UNPACKED: usize = 512 << 20;
/// Kernels are packed with dictionaries of up to 128 MiB (`scripts/xz_wrap.sh`, `zstd --ultra`).
const MAX_DECODER_MEMORY: u64 = 256 << 20;

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// The legacy frame: `lz4 -l`, which knows no sizes and no sums.
const LZ4_LEGACY_MAGIC: &[u8] = b"\x02\x21\x4c\x18";
/// All blocks of a legacy frame but the last unpack to this.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// Why there is no kernel to boot.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("reading the kernel {path}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("keeping the unpacked kernel in {path}", path = path.display())]
    Cache { path: PathBuf, source: io::Error },
    #[error("the kernel file is larger than {} MiB", MAX_IMAGE >> 20)]
    TooLarge,
    #[error("the kernel is neither an ELF image nor a bzImage of boot protocol 2.08 or later")]
    NotAKernel,
    #[error("the bzImage's payload lies outside of the file: it is cut short or damaged")]
    Truncated,
    #[error(
        "the bzImage is packed in a format that starts with {0:02x?}; zstd, LZ4, gzip and xz are understood"
    )]
    Format([u8; 4]),
    #[error("the bzImage unpacks to {0} bytes, more than the {MAX_UNPACKED} allowed")]
    UnpackedSize(u64),
    #[error("the bzImage's {format} payload is damaged")]
    Damaged {
        format: &'static str,
        source: io::Error,
    },
    #[error("what the bzImage holds is not an ELF image")]
    NotElf,
    #[error("loading the kernel into guest memory")]
    Load(#[source] linux_loader::loader::Error),
    #[error("the kernel has no PVH entry point; it needs CONFIG_PVH")]
    NoPvh,
}

/// Where a loaded kernel starts and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Its PVH entry point.
    pub entry: GuestAddress,
    /// The first address past it, what it clears at start included.
    pub end: GuestAddress,
}

/// Loads an ELF kernel to where it is linked.
///
/// # Errors
/// When it isn't one, has no PVH note, or doesn't fit.
pub fn load(memory: &GuestRam, kernel: &mut File) -> Result<Loaded, KernelError> {
    let result = Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_MEMORY)))
        .map_err(KernelError::Load)?;
    match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(Loaded {
            entry,
            end: GuestAddress(result.kernel_end),
        }),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(KernelError::NoPvh)
        }
    }
}

/// Opens the kernel at `path` as an ELF image.
///
/// A bzImage is unpacked into `cache_dir`, under its content's hash; later calls find it there.
///
/// # Errors
/// When it can't be read, kept, or unpacked.
pub fn open(path: &Path, cache_dir: &Path) -> Result<File, KernelError> {
    let read_error = |source| KernelError::Read {
        path: path.into(),
        source,
    };
    let cache_error = |source| KernelError::Cache {
        path: cache_dir.into(),
        source,
    };
    let mut file = File::open(path).map_err(read_error)?;
    let mut magic = Vec::new();
    Read::by_ref(&mut file)
        .take(ELF_MAGIC.len() as u64)
        .read_to_end(&mut magic)
        .map_err(read_error)?;
    if magic == ELF_MAGIC {
        return Ok(file);
    }
    let mut image = magic;
    file.take(MAX_IMAGE)
        .read_to_end(&mut image)
        .map_err(read_error)?;
    if image.len() as u64 > MAX_IMAGE {
        return Err(KernelError::TooLarge);
    }

    let kept = cache_dir.join(format!("{:x}.elf", Sha256::digest(&image)));
    match File::open(&kept) {
        Ok(file) => return Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(cache_error(error)),
    }
    let elf = unpack(&image)?;
    std::fs::create_dir_all(cache_dir).map_err(cache_error)?;
    let mut new = tempfile::NamedTempFile::new_in(cache_dir).map_err(cache_error)?;
    new.write_all(&elf).map_err(cache_error)?;
    // Under its final name it is whole, whoever else unpacks the same kernel now.
    new.as_file().sync_data().map_err(cache_error)?;
    new.persist(&kept)
        .map_err(|error| cache_error(error.error))?;
    File::open(&kept).map_err(cache_error)
}

/// Unpacks a bzImage to the ELF image inside.
///
/// # Errors
/// When it isn't one, is damaged, or unpacks to more than is allowed.
pub fn unpack(bzimage: &[u8]) -> Result<Vec<u8>, KernelError> {
    let payload = payload(bzimage)?;
    // The kernel's build appends the unpacked size where the format doesn't end with it itself, as gzip's does.
    let (stream, size) = payload
        .split_last_chunk::<4>()
        .ok_or(KernelError::Truncated)?;
    let (format, packed, unpack): (_, _, Unpack) = match payload {
        [0x1f, 0x8b, ..] => ("gzip", payload, unpack_gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", stream, unpack_zstd),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => ("xz", stream, unpack_xz),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("LZ4", stream, unpack_lz4_legacy),
        [a, b, c, d, ..] => return Err(KernelError::Format([*a, *b, *c, *d])),
        _ => return Err(KernelError::Truncated),
    };
    let size = u32::from_le_bytes(*size);
    let size = usize::try_from(size)
        .ok()
        .filter(|size| *size <= MAX_UNPACKED)
        .ok_or(KernelError::UnpackedSize(size.into()))?;
    let elf = unpack(packed, size).map_err(|source| KernelError::Damaged { format, source })?;
    if !elf.starts_with(ELF_MAGIC) {
        return Err(KernelError::NotElf);
    }
    Ok(elf)
}

/// Unpacks to exactly that many bytes.
type Unpack = fn(&[u8], usize) -> io::Result<Vec<u8>>;

/// Finds the packed kernel by the header's `payload_offset` and `payload_length`.
fn payload(image: &[u8]) -> Result<&[u8], KernelError> {
    let field = |offset: usize| image.get(offset..).and_then(<[u8]>::first_chunk::<4>);
    let word = |offset: usize| field(offset).map(|field| u32::from_le_bytes(*field));
    let version = word(0x206).unwrap_or(0) & 0xffff;
    if field(0x202) != Some(b"HdrS") || version < 0x0208 {
        return Err(KernelError::NotAKernel);
    }
    // Zero means four, for a reason that only the oldest boot loaders know.
    let setup_sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(sectors) => usize::from(*sectors),
    };
    let to_usize = |value: u32| usize::try_from(value).ok();
    let range = || {
        let start = ((setup_sectors + 1) * 512).checked_add(to_usize(word(0x248)?)?)?;
        let end = start.checked_add(to_usize(word(0x24c)?)?)?;
        image.get(start..end)
    };
    range().ok_or(KernelError::Truncated)
}

/// Reads `size` bytes, and makes sure that there are no more.
fn read_all(reader: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::with_capacity(size);
    reader.take(size as u64 + 1).read_to_end(&mut unpacked)?;
    if unpacked.len() != size {
        return Err(wrong_size());
    }
    Ok(unpacked)
}

fn wrong_size() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it does not unpack to the size that it states",
    )
}

fn unpack_gzip(stream: &[u8], size: usize) -> io::Result<Vec<u8>> {
    read_all(flate2::read::GzDecoder::new(stream), size)
}

fn unpack_zstd(stream: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
    decoder.window_log_max(MAX_DECODER_MEMORY.ilog2())?;
    read_all(decoder.single_frame(), size)
}

fn unpack_xz(stream: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let decoder = xz2::stream::Stream::new_stream_decoder(MAX_DECODER_MEMORY, 0)?;
    read_all(xz2::bufread::XzDecoder::new_stream(stream, decoder), size)
}

fn unpack_lz4_legacy(stream: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = vec![0; size];
    let mut written = 0;
    let mut rest = stream
        .strip_prefix(LZ4_LEGACY_MAGIC)
        .ok_or_else(wrong_size)?;
    while let Some((length, blocks)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| wrong_size())?;
        let (block, next) = blocks.split_at_checked(length).ok_or_else(wrong_size)?;
        let end = size.min(written + LZ4_LEGACY_BLOCK);
        let room = unpacked.get_mut(written..end).ok_or_else(wrong_size)?;
        let count = lz4_flex::block::decompress_into(block, room)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if count == 0 {
            return Err(wrong_size());
        }
        written += count;
        rest = next;
    }
    if written != size {
        return Err(wrong_size());
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const SETUP_SECTORS: u8 = 3;
    const SETUP_SIZE: usize = (SETUP_SECTORS as usize + 1) * 512;

    fn elf(size: usize) -> Vec<u8> {
        let filling = (0..=u8::MAX).cycle();
        ELF_MAGIC
            .iter()
            .copied()
            .chain(filling)
            .take(size)
            .collect()
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; SETUP_SIZE + 64];
        let length = u32::try_from(payload.len()).unwrap();
        image[0x1f1] = SETUP_SECTORS;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&64_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what else the kernel's build puts there");
        image
    }

    fn sized(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
        packed.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
        packed
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd_sized(content: &[u8]) -> Vec<u8> {
        sized(zstd::encode_all(content, 1).unwrap(), content.len())
    }

    fn xz(content: &[u8]) -> Vec<u8> {
        let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(content).unwrap();
        sized(encoder.finish().unwrap(), content.len())
    }

    fn lz4_legacy(content: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_LEGACY_MAGIC.to_vec();
        for block in content.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend_from_slice(&block);
        }
        sized(packed, content.len())
    }

    #[test]
    fn every_format_unpacks_to_what_was_packed() {
        let content = elf(100_000);

        for packed in [
            gzip(&content),
            zstd_sized(&content),
            xz(&content),
            lz4_legacy(&content),
        ] {
            assert!(unpack(&bzimage(&packed)).unwrap() == content);
        }
    }

    #[test]
    fn lz4_blocks_follow_each_other() {
        let content = elf(LZ4_LEGACY_BLOCK + 5);

        assert!(unpack(&bzimage(&lz4_legacy(&content))).unwrap() == content);
    }

    #[test]
    fn a_payload_that_states_another_size_is_refused() {
        let content = elf(5000);
        let cut = |mut packed: Vec<u8>| {
            packed.truncate(packed.len() - 4);
            packed
        };

        for stated in [4999, 5001] {
            for packed in [
                sized(cut(zstd_sized(&content)), stated),
                sized(cut(xz(&content)), stated),
                sized(cut(lz4_legacy(&content)), stated),
                sized(cut(gzip(&content)), stated),
            ] {
                assert!(matches!(
                    unpack(&bzimage(&packed)),
                    Err(KernelError::Damaged { .. })
                ));
            }
        }
    }

    #[test]
    fn a_payload_larger_than_allowed_is_refused_before_it_is_unpacked() {
        let packed = sized(zstd::encode_all(&b""[..], 1).unwrap(), MAX_UNPACKED + 1);

        assert!(matches!(
            unpack(&bzimage(&packed)),
            Err(KernelError::UnpackedSize(_))
        ));
    }

    #[test]
    fn an_unknown_format_is_named() {
        assert!(matches!(
            unpack(&bzimage(b"BZh9 and so on")),
            Err(KernelError::Format([b'B', b'Z', b'h', b'9']))
        ));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let mut old = bzimage(&gzip(&elf(100)));
        old[0x206..0x208].copy_from_slice(&0x207_u16.to_le_bytes());

        for image in [&b""[..], b"#!/bin/sh\n", &[0; 0x300], &old] {
            assert!(matches!(unpack(image), Err(KernelError::NotAKernel)));
        }
        assert!(matches!(
            unpack(&bzimage(&gzip(b"not ELF"))),
            Err(KernelError::NotElf)
        ));
    }

    #[test]
    fn a_file_that_ends_early_is_refused() {
        let whole = bzimage(&gzip(&elf(5000)));

        let cut = &whole[..SETUP_SIZE + 100];

        assert!(matches!(unpack(cut), Err(KernelError::Truncated)));
    }

    #[test]
    fn an_elf_image_is_opened_as_it_is_and_nothing_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        std::fs::write(&path, elf(100)).unwrap();
        let cache = dir.path().join("cache");

        open(&path, &cache).unwrap();

        assert!(!cache.exists());
    }

    #[test]
    fn a_bzimage_is_unpacked_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        let cache = dir.path().join("cache");
        std::fs::write(&path, bzimage(&gzip(&elf(5000)))).unwrap();
        let names = || {
            let entries = std::fs::read_dir(&cache).unwrap();
            entries
                .map(|entry| entry.unwrap().path())
                .collect::<Vec<_>>()
        };

        open(&path, &cache).unwrap();
        let kept = names();
        std::fs::write(&kept[0], b"what was kept").unwrap();
        let mut again = String::new();
        open(&path, &cache)
            .unwrap()
            .read_to_string(&mut again)
            .unwrap();

        assert_eq!(kept.len(), 1);
        assert_eq!(again, "what was kept");
        assert_eq!(names(), kept);
    }

    const LOADED_AT: u64 = 0x100_0000;
    const CODE: &[u8] = b"what the processor runs";

    /// An ELF image of a note and a segment.
    fn vmlinux(note_name: &[u8; 4]) -> Vec<u8> {
        let half = |image: &mut Vec<u8>, value: u16| image.extend(value.to_le_bytes());
        let word = |image: &mut Vec<u8>, value: u32| image.extend(value.to_le_bytes());
        let long = |image: &mut Vec<u8>, value: u64| image.extend(value.to_le_bytes());
        let mut image = ELF_MAGIC.to_vec();
        image.extend([2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for value in [2, 62] {
            half(&mut image, value);
        }
        word(&mut image, 1);
        for value in [LOADED_AT, 64, 0] {
            long(&mut image, value);
        }
        word(&mut image, 0);
        for value in [64, 56, 2, 0, 0, 0] {
            half(&mut image, value);
        }
        // The program headers: type, flags, offset, two addresses, two sizes, alignment.
        let code = CODE.len() as u64;
        for (kind, offset, address, size, in_memory) in
            [(4, 176, 0, 20, 20), (1, 196, LOADED_AT, code, 0x1000)]
        {
            word(&mut image, kind);
            word(&mut image, 5);
            for value in [offset, address, address, size, in_memory, 1] {
                long(&mut image, value);
            }
        }
        // Name size, description size, type; XEN_ELFNOTE_PHYS32_ENTRY is 18.
        for value in [4, 4, 18] {
            word(&mut image, value);
        }
        image.extend(note_name);
        word(&mut image, 0x100_0010);
        image.extend(CODE);
        image
    }

    fn load_image(image: &[u8]) -> (Result<Loaded, KernelError>, GuestRam) {
        let memory = crate::memory::allocate(64).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        (load(&memory, &mut file), memory)
    }

    #[test]
    fn a_kernel_lies_where_it_is_linked_and_starts_where_its_note_says() {
        let (loaded, memory) = load_image(&vmlinux(b"Xen\0"));

        let mut code = vec![0; CODE.len()];
        memory
            .read_slice(&mut code, GuestAddress(LOADED_AT))
            .unwrap();
        let loaded = loaded.unwrap();
        assert_eq!(code, CODE);
        assert_eq!(loaded.entry, GuestAddress(0x100_0010));
        assert_eq!(loaded.end, GuestAddress(LOADED_AT + 0x1000));
    }

    #[test]
    fn a_kernel_without_a_pvh_note_is_refused() {
        let (loaded, _) = load_image(&vmlinux(b"GNU\0"));

        assert!(matches!(loaded, Err(KernelError::NoPvh)));
    }

    proptest! {
        /// A crafted note made the loader go round for ever.
        #[test]
        fn ghsa_52h2_m2cf_9jh6_a_damaged_kernel_is_loaded_or_refused_in_time(
            damage in proptest::collection::vec((0_usize..196, any::<u8>()), 1..8),
        ) {
            let mut image = vmlinux(b"Xen\0");
            for (position, value) in damage {
                image[position] = value;
            }
            let start = std::time::Instant::now();

            // Either is fine.
            let _ = load_image(&image);

            prop_assert!(start.elapsed() < std::time::Duration::from_secs(5));
        }

        #[test]
        fn no_damage_makes_it_panic_or_grow(position in 0_usize..4000, value: u8, format in 0_usize..4) {
            let content = elf(3000);
            let packed = [gzip(&content), zstd_sized(&content), xz(&content), lz4_legacy(&content)];
            let mut image = bzimage(&packed[format]);
            let position = position % image.len();
            image[position] = value;

            let unpacked = unpack(&image);

            prop_assert!(unpacked.is_err() || unpacked.unwrap().len() <= 3000);
        }
    }
}
