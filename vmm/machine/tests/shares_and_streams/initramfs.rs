//! A guest image's initramfs with this program in place of the agent.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::Path;

/// The image's archive with another `/init`: the kernel unpacks what follows over what comes first.
pub fn with_init(image: &Path, init: &Path) -> File {
    let mut archive = fs::read(image.join("initramfs.cpio")).unwrap();
    for (name, mode, content) in [
        ("proc", 0o40_755, Vec::new()),
        ("sys", 0o40_755, Vec::new()),
        ("rw", 0o40_755, Vec::new()),
        ("ro", 0o40_755, Vec::new()),
        ("init", 0o100_755, fs::read(init).unwrap()),
        ("TRAILER!!!", 0, Vec::new()),
    ] {
        append(&mut archive, name, mode, &content);
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&archive).unwrap();
    file.rewind().unwrap();
    file
}

/// Adds a file in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let pad = |archive: &mut Vec<u8>| archive.resize(archive.len().next_multiple_of(4), 0);
    let (size, name_size) = (
        u32::try_from(content.len()).unwrap(),
        u32::try_from(name.len() + 1).unwrap(),
    );
    pad(archive);
    archive.extend(b"070701");
    for field in [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        write!(archive, "{field:08X}").unwrap();
    }
    archive.extend(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend(content);
    pad(archive);
}
