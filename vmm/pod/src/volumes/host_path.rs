//! hostPath: whether what a volume points to is what the manifest says, and making
//! what may be made.

use std::fs::{DirBuilder, FileType, Metadata, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;
use rustix::fs::{CWD, Mode, OFlags};

use super::{Doing, Notice, VolumeError};
use crate::manifest::PodManifest;

/// A `hostPath.type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No type: anything, and a directory if there is nothing.
    Any,
    Directory,
    DirectoryOrCreate,
    File,
    FileOrCreate,
    Socket,
    CharDevice,
    BlockDevice,
}

/// Looks at what the volumes of a pod point to; changes nothing.
///
/// # Errors
/// [`VolumeError::Refused`] when a host path is missing or not of its type.
pub fn check(manifest: &PodManifest) -> Result<Vec<Notice>, VolumeError> {
    let mut notices = Vec::new();
    for (index, volume) in manifest.spec().volumes.iter().flatten().enumerate() {
        let Some(source) = &volume.host_path else {
            continue;
        };
        let field = format!("{}: spec.volumes[{index}].hostPath", manifest.source);
        let kind = Kind::of(source);
        check_one(source, kind).map_err(|message| {
            VolumeError::Refused(format!("{field}.path: {:?}: {message}", source.path))
        })?;
        let unusable = match kind {
            Kind::Socket => "connect to the host's process behind the socket",
            Kind::CharDevice | Kind::BlockDevice => "open the host's device",
            _ => continue,
        };
        notices.push(Notice(format!(
            "{field}: {:?}: containers see the file but can't {unusable}: they run under a kernel of their own",
            source.path
        )));
    }
    Ok(notices)
}

/// Opens what a volume points to, after making it where the type says so.
pub fn open(source: &HostPathVolumeSource) -> Result<OwnedFd, VolumeError> {
    let path = Path::new(&source.path);
    let kind = Kind::of(source);
    match kind {
        Kind::Any | Kind::DirectoryOrCreate if is_missing(path) => DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(path)
            .doing(|| format!("making directory {} for a volume", path.display()))?,
        Kind::FileOrCreate if is_missing(path) => {
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(path)
                .doing(|| format!("making file {} for a volume", path.display()))?;
        }
        _ => {}
    }
    let fd = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing(|| format!("opening {} for a volume", path.display()))?;
    // What has been opened is what is bound, whatever the name stands for by now.
    let file = std::fs::File::from(fd);
    let metadata = file
        .metadata()
        .doing(|| format!("looking at {} for a volume", path.display()))?;
    kind.accepts(&metadata)
        .map_err(|message| VolumeError::Refused(format!("volume {:?}: {message}", source.path)))?;
    Ok(file.into())
}

fn is_missing(path: &Path) -> bool {
    matches!(std::fs::metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

fn check_one(source: &HostPathVolumeSource, kind: Kind) -> Result<(), String> {
    let path = Path::new(&source.path);
    match std::fs::metadata(path) {
        Ok(metadata) => kind.accepts(&metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match kind {
            Kind::Any | Kind::DirectoryOrCreate => can_make_in(path.parent(), true),
            Kind::FileOrCreate => can_make_in(path.parent(), false),
            _ => Err(format!(
                "there is no such file or directory, and the type is {kind:?}"
            )),
        },
        Err(error) => Err(error.to_string()),
    }
}

/// Whether the parent of something that is to be made is a directory, or can become one.
fn can_make_in(parent: Option<&Path>, with_parents: bool) -> Result<(), String> {
    let Some(parent) = parent else {
        return Ok(());
    };
    match std::fs::metadata(parent) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(format!("{} is not a directory", parent.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound && with_parents => {
            can_make_in(parent.parent(), true)
        }
        Err(error) => Err(format!("{}: {error}", parent.display())),
    }
}

impl Kind {
    fn of(source: &HostPathVolumeSource) -> Self {
        match source.type_.as_deref().unwrap_or_default() {
            "Directory" => Self::Directory,
            "DirectoryOrCreate" => Self::DirectoryOrCreate,
            "File" => Self::File,
            "FileOrCreate" => Self::FileOrCreate,
            "Socket" => Self::Socket,
            "CharDevice" => Self::CharDevice,
            "BlockDevice" => Self::BlockDevice,
            _ => Self::Any,
        }
    }

    fn accepts(self, metadata: &Metadata) -> Result<(), String> {
        let found = metadata.file_type();
        let fits = match self {
            Self::Any => true,
            Self::Directory | Self::DirectoryOrCreate => found.is_dir(),
            Self::File | Self::FileOrCreate => found.is_file(),
            Self::Socket => found.is_socket(),
            Self::CharDevice => found.is_char_device(),
            Self::BlockDevice => found.is_block_device(),
        };
        if fits {
            Ok(())
        } else {
            Err(format!("is {}, and the type is {self:?}", describe(found)))
        }
    }
}

fn describe(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_file() {
        "a file"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "a pipe"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    fn pod(path: &str, kind: &str) -> PodManifest {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {{volumes: [{{name: v, hostPath: \
             {{path: {path}, type: \"{kind}\"}}}}], containers: [{{name: a, image: b}}]}}}}"
        );
        manifest::parse("p.yaml", &text).unwrap().remove(0)
    }

    fn source(path: &Path, kind: &str) -> HostPathVolumeSource {
        HostPathVolumeSource {
            path: path.to_str().unwrap().into(),
            type_: Some(kind.into()),
        }
    }

    #[test]
    fn every_type_is_checked_against_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let directory = dir.path().to_str().unwrap();
        let (file, socket) = (file.to_str().unwrap(), socket.to_str().unwrap());
        let right = [
            (directory, "Directory"),
            (directory, "DirectoryOrCreate"),
            (directory, ""),
            (file, ""),
            (file, "File"),
            (file, "FileOrCreate"),
            (socket, "Socket"),
            ("/dev/null", "CharDevice"),
        ];
        let refused: Vec<_> = right
            .iter()
            .filter(|(path, kind)| check(&pod(path, kind)).is_err())
            .collect();
        assert_eq!(refused, Vec::<&(&str, &str)>::new());
        let wrong = [
            (file, "Directory", "is a file, and the type is Directory"),
            (
                file,
                "DirectoryOrCreate",
                "is a file, and the type is DirectoryOrCreate",
            ),
            (directory, "File", "is a directory, and the type is File"),
            (
                directory,
                "FileOrCreate",
                "is a directory, and the type is FileOrCreate",
            ),
            (file, "Socket", "is a file, and the type is Socket"),
            (
                "/dev/null",
                "BlockDevice",
                "is a character device, and the type is BlockDevice",
            ),
            (
                socket,
                "CharDevice",
                "is a socket, and the type is CharDevice",
            ),
        ];
        for (path, kind, message) in wrong {
            let error = check(&pod(path, kind)).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("p.yaml: spec.volumes[0].hostPath.path: {path:?}: {message}")
            );
        }
    }

    #[test]
    fn what_is_missing_must_be_something_that_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("file"), "").unwrap();
        let fault = |name: &str, kind: &str| {
            check(&pod(&path(name), kind))
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert_eq!(fault("a/b/c", ""), "");
        assert_eq!(fault("a/b/c", "DirectoryOrCreate"), "");
        assert_eq!(fault("a", "FileOrCreate"), "");
        assert!(fault("a/b", "FileOrCreate").contains("No such file"));
        assert!(fault("a", "Directory").contains("there is no such file or directory"));
        assert!(fault("a", "File").contains("there is no such file or directory"));
        assert!(fault("a", "Socket").contains("there is no such file or directory"));
        assert!(fault("file/b", "").contains("Not a directory"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_type_promises_is_made() {
        let dir = tempfile::tempdir().unwrap();
        open(&source(&dir.path().join("a/b"), "")).unwrap();
        open(&source(&dir.path().join("c"), "FileOrCreate")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
        assert!(dir.path().join("c").is_file());
        assert!(open(&source(&dir.path().join("d"), "Directory")).is_err());
        assert!(matches!(
            open(&source(&dir.path().join("c"), "Directory")),
            Err(VolumeError::Refused(_))
        ));
    }

    #[test]
    fn what_a_machine_cannot_use_is_said() {
        let notices = check(&pod("/dev/null", "CharDevice")).unwrap();
        assert!(
            notices[0].0.contains("can't open the host's device"),
            "{notices:?}"
        );
        assert_eq!(check(&pod("/tmp", "Directory")).unwrap(), Vec::new());
    }
}
