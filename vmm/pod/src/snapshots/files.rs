//! What a pod has on disk, in an archive of tar's: with owners, modes, holes, extended attributes and an overlay's
//! whiteouts, whatever file system it is on.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use tokio::io::AsyncReadExt;

use crate::text::{cut, printable};

/// Bytes of what tar says of a fault, and of them as they are told, at most.
const MESSAGE_MAX: u64 = 1000;
const MESSAGE_CHARS: usize = 1000;
/// Made anew for each mount, and nothing of the pod's.
const LEFT_OUT: [&str; 2] = ["./rootfs/*/work", "./rootfs/*/stage"];
/// A file was written to meanwhile (tar(1)): a log, for all else stands still.
const CHANGED: i32 = 1;

/// Writes what is below `data` to `archive`. Nothing of the pod may run. Dropping the future ends it.
///
/// # Errors
/// When it can't be read or written, or there is no tar.
pub(crate) async fn pack(data: &Path, archive: OwnedFd) -> io::Result<()> {
    let mut tar = tar(data);
    tar.args(["--create", "--format=posix", "--sparse"])
        .args(["--anchored", "--no-wildcards-match-slash"])
        .args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")))
        .arg(".")
        .stdout(Stdio::from(archive));
    let mut tar = tokio::process::Command::from(tar);
    let mut tar = tar.kill_on_drop(true).spawn().map_err(no_tar)?;
    let mut message = Vec::new();
    if let Some(mut stderr) = tar.stderr.take() {
        // As in `unpack`.
        let mut beginning = (&mut stderr).take(MESSAGE_MAX);
        let _ = beginning.read_to_end(&mut message).await;
        let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
    }
    judge(tar.wait().await?, &message, &[0, CHANGED])
}

/// Puts what is in `archive` below `data`.
///
/// # Errors
/// When it can't be read or written, or there is no tar.
pub(crate) fn unpack(archive: File, data: &Path) -> io::Result<()> {
    let mut tar = tar(data);
    tar.args(["--extract", "--same-owner", "--same-permissions"])
        .stdin(Stdio::from(archive))
        .stdout(Stdio::null());
    let mut tar = tar.spawn().map_err(no_tar)?;
    let mut message = Vec::new();
    if let Some(mut stderr) = tar.stderr.take() {
        // The beginning tells; the rest is read so that tar can end.
        let _ = Read::take(&mut stderr, MESSAGE_MAX).read_to_end(&mut message);
        let _ = io::copy(&mut stderr, &mut io::sink());
    }
    judge(tar.wait()?, &message, &[0])
}

fn tar(directory: &Path) -> Command {
    let mut tar = Command::new("tar");
    tar.arg("--directory")
        .arg(directory)
        .args([
            "--file=-",
            "--numeric-owner",
            "--acls",
            "--xattrs",
            "--xattrs-include=*",
        ])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    tar
}

fn no_tar(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("running tar: {error}"))
}

fn judge(status: ExitStatus, message: &[u8], good: &[i32]) -> io::Result<()> {
    if status.code().is_some_and(|code| good.contains(&code)) {
        return Ok(());
    }
    let message = printable(message).replace("\\n", "; ");
    Err(io::Error::other(format!(
        "tar: {status}: {}",
        cut(&message, MESSAGE_CHARS).trim_end_matches("; ")
    )))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[tokio::test]
    async fn what_is_packed_is_unpacked() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("from"), root.path().join("to"));
        let upper = from.join("rootfs/web/upper");
        fs::create_dir_all(upper.join("stage/work")).unwrap();
        fs::create_dir_all(from.join("rootfs/web/work/work")).unwrap();
        fs::create_dir_all(from.join("rootfs/web/stage")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(upper.join("stage/work/file"), "content").unwrap();
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/etc/passwd", upper.join("link")).unwrap();
        fs::hard_link(upper.join("stage/work/file"), upper.join("same")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            upper.join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let archive = tempfile::tempfile().unwrap();

        let packed = pack(&from, archive.try_clone().unwrap().into());
        packed.await.unwrap();
        rustix::fs::seek(&archive, rustix::fs::SeekFrom::Start(0)).unwrap();
        unpack(archive, &to).unwrap();

        let upper = to.join("rootfs/web/upper");
        assert_eq!(fs::read(upper.join("same")).unwrap(), b"content");
        assert_eq!(fs::metadata(upper.join("same")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(&upper).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(
            fs::read_link(upper.join("link")).unwrap(),
            Path::new("/etc/passwd")
        );
        assert!(upper.join("stage/work/file").exists() && upper.join("pipe").exists());
        assert!(!to.join("rootfs/web/work").exists() && !to.join("rootfs/web/stage").exists());
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("archive");
        fs::write(&path, "no archive at all").unwrap();

        let refused = unpack(File::open(path).unwrap(), root.path()).unwrap_err();

        assert!(refused.to_string().starts_with("tar: "), "{refused}");
    }
}
