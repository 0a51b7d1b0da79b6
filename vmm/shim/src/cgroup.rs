//! The pod's cgroup on the host: shim and machine are in it, so that the pod pays for them.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::Spec;

/// Where the cgroups of version 2 are.
const ROOT: &str = "/sys/fs/cgroup";
/// For the last process to leave a cgroup. containerd waits 5 s in all.
const LIMIT: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(20);

/// Where the specification has the container's cgroup. None: nowhere, or the host has no cgroups of version 2.
#[must_use]
pub fn of(spec: &Spec) -> Option<PathBuf> {
    let path = spec.linux().as_ref()?.cgroups_path().as_ref()?;
    let beneath = resolve(path.to_str()?)?;
    let root = Path::new(ROOT);
    root.join("cgroup.controllers")
        .exists()
        .then(|| root.join(beneath))
}

/// Makes the cgroup, and moves this process into it, and with it all that it starts.
///
/// # Errors
/// When the kernel says no.
pub fn enter(cgroup: &Path) -> io::Result<()> {
    fs::create_dir_all(cgroup)?;
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}

/// Removes the cgroup, when all have left it. That there is none is no error.
///
/// # Errors
/// When somebody stays in it.
pub fn remove(cgroup: &Path) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && begun.elapsed() < LIMIT =>
            {
                std::thread::sleep(AGAIN);
            }
            removed => return removed,
        }
    }
}

/// The directory of a cgroup beneath the root: a path as it is, and `SLICE:PREFIX:NAME` as systemd names its units.
fn resolve(path: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = path.split(':').collect();
    let resolved = match parts[..] {
        [slice, prefix, name] => {
            let scope = format!("{prefix}-{name}.scope");
            slice_directory(slice)?.join(scope)
        }
        _ => PathBuf::from(path.trim_start_matches('/')),
    };
    let plain = |part| matches!(part, Component::Normal(_));
    (resolved.components().count() > 0 && resolved.components().all(plain)).then_some(resolved)
}

/// `a-b.slice` lies in `a.slice`.
fn slice_directory(slice: &str) -> Option<PathBuf> {
    let name = match slice {
        "" => "system",
        slice => slice.strip_suffix(".slice")?,
    };
    let mut directory = PathBuf::new();
    if name == "-" {
        return Some(directory);
    }
    let mut sofar = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !sofar.is_empty() {
            sofar.push('-');
        }
        sofar.push_str(part);
        directory.push(format!("{sofar}.slice"));
    }
    Some(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(path: &str) -> Option<String> {
        resolve(path).map(|path| path.display().to_string())
    }

    #[test]
    fn paths_stay_and_units_are_found() {
        assert_eq!(resolved("/default/web").unwrap(), "default/web");
        assert_eq!(
            resolved("kubepods-burstable-podab_c.slice:cri-containerd:1f").unwrap(),
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab_c.slice/\
             cri-containerd-1f.scope"
        );
        assert_eq!(resolved(":runc:x").unwrap(), "system.slice/runc-x.scope");
    }

    #[test]
    fn nothing_outside_is_named() {
        for path in ["", "/", "../x", "/a/../../x", "a-.slice:b:c", "a:b:c"] {
            assert_eq!(resolved(path), None, "{path:?}");
        }
        assert_eq!(resolved("a.slice:../../x:y"), None);
    }

    #[test]
    fn what_is_not_there_is_removed_already() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = root.path().join("pod");
        fs::create_dir(&cgroup).unwrap();

        remove(&cgroup).unwrap();
        remove(&cgroup).unwrap();
    }
}
