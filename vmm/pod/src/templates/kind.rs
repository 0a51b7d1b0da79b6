//! What a template must be like to be a pod's machine.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Hexadecimal digits of an id: enough that no two of a host are alike.
const ID_DIGITS: usize = 16;
/// Bytes of `/proc/cpuinfo` in which the first processor is whole.
const PROCESSOR_MAX: u64 = 1 << 14;

/// Two machines of one kind differ in nothing that their guest could see before its pod comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kind {
    /// Clones have addresses of their kernel in common, and so may know each other's: only within a tenant.
    pub tenant: String,
    pub vcpus: u8,
    pub memory_mib: u64,
    pub disk_slots: u8,
    pub interfaces: u8,
    /// Of each interface.
    pub queue_pairs: u8,
    pub udp_segmentation: bool,
    /// The kernel's.
    pub command_line: String,
    /// `hull-vmm`, kernel and initramfs.
    pub files: Vec<FileIdentity>,
    pub host: HostIdentity,
}

impl Kind {
    /// By which it is found on disk, and named by people.
    #[must_use]
    pub fn id(&self) -> String {
        // Of numbers and text only: there is nothing that JSON couldn't have.
        digest(&serde_json::to_vec(self).unwrap_or_default())
    }

    /// Whether a machine of this kind can still come to be: its files are those that are there, and so is the host's
    /// kernel.
    #[must_use]
    pub fn is_current(&self) -> bool {
        let same =
            |file: &FileIdentity| FileIdentity::at(&file.path).is_ok_and(|found| found.is_of(file));
        self.host == HostIdentity::here() && self.files.iter().all(same)
    }
}

/// What a guest's state depends on that the host decides: KVM's own, and what the processor can do. A disk may come up
/// again in another machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostIdentity {
    /// Release and version, as `uname` has them.
    kernel: String,
    /// The digest of what `/proc/cpuinfo` says of the first processor, but for its clock.
    processor: String,
}

impl HostIdentity {
    /// Of the host that this runs on.
    #[must_use]
    pub fn here() -> Self {
        let name = rustix::system::uname();
        let mut processors = Vec::new();
        // Who can't read it is nobody whose machines run.
        let _ = File::open("/proc/cpuinfo")
            .and_then(|file| file.take(PROCESSOR_MAX).read_to_end(&mut processors));
        Self {
            kernel: format!(
                "{} {}",
                name.release().to_string_lossy(),
                name.version().to_string_lossy()
            ),
            processor: processor(&String::from_utf8_lossy(&processors)),
        }
    }
}

/// The lines of the first processor are before the first empty one.
fn processor(cpuinfo: &str) -> String {
    let lines = cpuinfo.lines().take_while(|line| !line.is_empty());
    let lasting =
        lines.filter(|line| !line.starts_with("cpu MHz") && !line.starts_with("bogomips"));
    digest(lasting.collect::<Vec<_>>().join("\n").as_bytes())
}

/// As many hexadecimal digits of the SHA-256 as an id has.
fn digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let mut digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.truncate(ID_DIGITS);
    digits
}

/// A file, and what tells that it has been changed without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FileIdentity {
    pub path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    /// Nanoseconds since 1970 of the last change of its content, and of anything.
    modified: i128,
    changed: i128,
}

impl FileIdentity {
    /// # Errors
    /// When the file can't be looked at.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::of(path, &std::fs::metadata(path)?))
    }

    /// The same of a file that is open.
    #[must_use]
    pub fn of(path: &Path, metadata: &Metadata) -> Self {
        let nanoseconds = |seconds, rest| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether both are of the same file in the same state, wherever that lies.
    #[must_use]
    pub fn is_of(&self, other: &Self) -> bool {
        let path = PathBuf::new();
        let anywhere = |identity: &Self| Self {
            path: path.clone(),
            ..identity.clone()
        };
        anywhere(self) == anywhere(other)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn kind(files: &[&Path]) -> Kind {
        Kind {
            tenant: "cli".into(),
            vcpus: 2,
            memory_mib: 1024,
            disk_slots: 0,
            interfaces: 1,
            queue_pairs: 2,
            udp_segmentation: true,
            files: files
                .iter()
                .map(|path| FileIdentity::at(path).unwrap())
                .collect(),
            command_line: "quiet".into(),
            host: HostIdentity::here(),
        }
    }

    #[test]
    fn kinds_that_differ_in_anything_have_other_ids() {
        let one = kind(&[]);
        let others = [
            Kind {
                tenant: "default/team".into(),
                ..one.clone()
            },
            Kind {
                vcpus: 1,
                ..one.clone()
            },
            Kind {
                disk_slots: 16,
                ..one.clone()
            },
            Kind {
                host: HostIdentity {
                    kernel: "5.15".into(),
                    ..one.host.clone()
                },
                ..one.clone()
            },
        ];
        for other in others {
            assert_ne!(one.id(), other.id(), "{other:?}");
        }
        assert_eq!(one.id(), one.clone().id());
        assert_eq!(one.id().len(), ID_DIGITS);
    }

    #[test]
    fn a_processor_is_the_same_at_any_clock_and_another_with_other_abilities() {
        let text = |megahertz, flags| {
            format!(
                "model name\t: EPYC\ncpu MHz\t: {megahertz}\nflags\t: {flags}\n\nprocessor\t: 1\n"
            )
        };

        assert_eq!(processor(&text(2000, "fpu")), processor(&text(3100, "fpu")));
        assert_ne!(
            processor(&text(2000, "fpu")),
            processor(&text(2000, "fpu avx"))
        );
    }

    #[test]
    fn a_kind_is_over_when_a_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("vmlinux");
        std::fs::write(&kernel, "one").unwrap();
        let kind = kind(&[&kernel]);
        assert!(kind.is_current());

        std::fs::write(directory.path().join("new"), "one").unwrap();
        std::fs::rename(directory.path().join("new"), &kernel).unwrap();

        assert!(!kind.is_current());
        std::fs::remove_file(&kernel).unwrap();
        assert!(!kind.is_current());
    }
}
