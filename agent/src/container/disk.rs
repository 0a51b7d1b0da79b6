//! A root file system on a disk of the machine, mounted for one container.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use hull_protocol::agent::Disk;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{Doing, Error, Result, shorten};

/// The file systems that are mounted. What the guest's kernel lacks of them is an error of the mount.
const FILE_SYSTEMS: [&str; 2] = ["ext4", "xfs"];
/// VIRTIO_BLK_ID_BYTES: the longest serial number.
const MAX_SERIAL: usize = 20;
/// A page, as mount(2) has it, less the NUL.
const MAX_OPTIONS: usize = 4095;
/// In which the driver sees a disk that was put in, and the kernel lets go of one that was unmounted.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);

/// A disk that is mounted. The mount goes with it.
#[derive(Debug)]
pub struct Mounted {
    device: PathBuf,
    pub place: PathBuf,
}

/// Waits until the disk is in its slot, and mounts it at `place`, which is made.
pub fn mount_at(disk: &Disk, place: PathBuf) -> Result<Mounted> {
    if !FILE_SYSTEMS.contains(&disk.file_system.as_str()) {
        return Err(Error::Invalid(format!(
            "a root file system can't be {:?}, but {}",
            shorten(&disk.file_system, 32),
            FILE_SYSTEMS.join(" or ")
        )));
    }
    let options = disk.options.join(",");
    if options.len() > MAX_OPTIONS {
        return Err(Error::Invalid(format!(
            "the mount options of a disk have more than {MAX_OPTIONS} bytes"
        )));
    }
    let options = std::ffi::CString::new(options)
        .map_err(|_| Error::Invalid("the mount options of a disk have a NUL".into()))?;
    let device = wait_for(&disk.serial)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place)
        .doing(|| format!("making {}", place.display()))?;
    let mut flags = MountFlags::NODEV;
    if disk.read_only {
        flags |= MountFlags::RDONLY;
    }
    let mounted = mount(&device, &place, disk.file_system.as_str(), flags, &*options);
    if let Err(error) = mounted {
        // It is empty.
        let _ = fs::remove_dir(&place);
        return Err(error).doing(|| {
            format!(
                "mounting disk {} as the {} root file system",
                disk.serial, disk.file_system
            )
        });
    }
    Ok(Mounted { device, place })
}

impl Mounted {
    /// Unmounts it, and returns when the kernel has written what it had of it, and has let go of the disk.
    pub fn unmount(&self) -> Result<()> {
        let doing = || format!("unmounting {}", self.place.display());
        match unmount(&self.place, UnmountFlags::NOFOLLOW) {
            // It isn't one any more.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error).doing(doing),
        }
        // The container's own mounts of it go in the kernel's time.
        let free = || {
            let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
            match rustix::fs::openat(CWD, &self.device, flags, Mode::empty()) {
                Err(Errno::BUSY) => Ok(None),
                Ok(_) => Ok(Some(())),
                Err(error) => Err(error),
            }
        };
        poll(free, || {
            format!("waiting until {} is free", self.device.display())
        })?;
        let _ = fs::remove_dir(&self.place);
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::warn!("{error}");
            // Nobody new comes in.
            let _ = unmount(&self.place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

/// The device of the disk with that serial number, once it has a size.
fn wait_for(serial: &str) -> Result<PathBuf> {
    if serial.is_empty() || serial.len() > MAX_SERIAL {
        return Err(Error::Invalid("a disk has no serial number".into()));
    }
    let name = find(serial)?;
    let size = Path::new("/sys/block").join(&name).join("size");
    let has_size = || match text(&size) {
        Ok(sectors) if sectors.trim() != "0" => Ok(Some(())),
        Ok(_) => Ok(None),
        Err(error) => Err(error),
    };
    poll(has_size, || format!("waiting for disk {serial}"))?;
    Ok(Path::new("/dev").join(name))
}

fn find(serial: &str) -> Result<String> {
    let doing = || format!("looking for disk {serial}");
    for entry in fs::read_dir("/sys/block").doing(doing)? {
        let entry = entry.doing(doing)?;
        // What has none is another kind of device.
        if text(&entry.path().join("serial")).is_ok_and(|text| text.trim_end() == serial)
            && let Ok(name) = entry.file_name().into_string()
        {
            return Ok(name);
        }
    }
    Err(Error::NotFound {
        kind: "disk",
        id: serial.to_owned(),
    })
}

fn text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(64).read_to_string(&mut text)?;
    Ok(text)
}

/// Asks until there is an answer, at most for [`LIMIT`].
fn poll<T, E: Into<std::io::Error>>(
    ask: impl Fn() -> std::result::Result<Option<T>, E>,
    doing: impl Fn() -> String + Copy,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().map_err(Into::into).doing(doing)? {
            return Ok(answer);
        }
        if begun.elapsed() > LIMIT {
            return Err(Error::State(format!("{}: it takes too long", doing())));
        }
        sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(file_system: &str, serial: &str) -> Disk {
        Disk {
            serial: serial.into(),
            file_system: file_system.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let root = tempfile::tempdir().unwrap();
        for (disk, said) in [
            (disk("nfs", "a"), "\"nfs\""),
            (disk("ext4", ""), "serial"),
            (disk("ext4", &"a".repeat(21)), "serial"),
            (disk("ext4", "no such serial"), "no such serial"),
        ] {
            let error = mount_at(&disk, root.path().join("place")).unwrap_err();

            assert!(error.to_string().contains(said), "{error}");
        }
        assert!(!root.path().join("place").exists());
    }
}
