//! The `hull` command with directories of its own, so that tests don't meet.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

/// A host with Hull on it: run and data directories that no other test uses.
#[derive(Debug)]
pub struct Hull {
    run: TempDir,
    data: TempDir,
    work: TempDir,
    guest: Option<PathBuf>,
}

impl Hull {
    /// With the `busybox` image loaded.
    ///
    /// # Panics
    /// When the image can't be loaded.
    #[must_use]
    pub fn new() -> Self {
        let hull = Self::without_images();
        let archive = image("busybox");
        let _ = hull.ok(["load".as_ref(), archive.as_os_str()]);
        hull
    }

    /// With these images, in a store that all such hosts share: loading large ones takes its time.
    ///
    /// # Panics
    /// When an image can't be loaded.
    #[must_use]
    pub fn with_images(names: &[&str]) -> Self {
        static LOADED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let hull = Self::without_images();
        let shared = data_root().join("test-images");
        std::fs::create_dir_all(&shared).expect("the data directory is writable");
        symlink(shared, hull.data.path().join("images")).expect("the data directory is writable");
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            if !loaded.contains(*name) {
                let _ = hull.ok(["load".as_ref(), image(name).as_os_str()]);
                loaded.insert((*name).to_owned());
            }
        }
        hull
    }

    /// With an image store that has nothing.
    ///
    /// # Panics
    /// When the directories can't be made.
    #[must_use]
    pub fn without_images() -> Self {
        Self {
            run: tempfile::tempdir_in("/run").expect("/run is writable"),
            data: tempfile::tempdir_in(data_root()).expect("the data directory is writable"),
            work: tempfile::tempdir().expect("a temporary directory"),
            guest: None,
        }
    }

    /// With another guest image than that of `HULL_GUEST_DIR`.
    #[must_use]
    pub fn with_guest(mut self, guest: impl Into<PathBuf>) -> Self {
        self.guest = Some(guest.into());
        self
    }

    /// Where this host's pods have their state.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.run.path().join("hull")
    }

    /// Images and what pods keep on disk.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        self.data.path()
    }

    /// A directory for the test's own files (hostPath volumes, manifests).
    #[must_use]
    pub fn work_dir(&self) -> &Path {
        self.work.path()
    }

    /// `hull` with these arguments, not started yet.
    #[must_use]
    pub fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = command(&self.run_dir(), self.data.path());
        command.args(args).stdin(Stdio::null());
        if let Some(guest) = &self.guest {
            command.env("HULL_GUEST_DIR", guest);
        }
        command
    }

    /// A shell script that runs on a terminal of its own, with `hull` as this host's.
    #[must_use]
    pub fn script(&self, text: &str) -> Command {
        let mut command = Command::new("script");
        command
            .args(["--quiet", "--return", "--command", text, "/dev/null"])
            .env("HULL_RUN_DIR", self.run_dir())
            .env("HULL_DATA_DIR", self.data.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs `hull` to its end.
    #[must_use]
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Output {
        self.command(args).output().expect("hull is on PATH")
    }

    /// Runs `hull`, which must succeed, and returns its output.
    #[must_use]
    pub fn ok<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> String {
        let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let output = self.run(&args);
        assert_success(&output, &format!("hull {args:?}"));
        String::from_utf8(output.stdout).expect("output is text")
    }

    /// Runs `hull` with `-o json`, which must succeed.
    #[must_use]
    pub fn json<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> serde_json::Value {
        let mut args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        args.extend(["-o".into(), "json".into()]);
        serde_json::from_str(&self.ok(&args)).expect("-o json prints JSON")
    }

    /// Writes a manifest for this test.
    #[must_use]
    pub fn manifest(&self, name: &str, text: &str) -> PathBuf {
        let path = self.work_dir().join(name);
        std::fs::write(&path, text).expect("the work directory is writable");
        path
    }
}

impl Default for Hull {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Hull {
    fn drop(&mut self) {
        let _ = self.run(["rm", "--force", "--all"]);
    }
}

fn command(run: &Path, data: &Path) -> Command {
    let mut command = Command::new("hull");
    command.env("HULL_RUN_DIR", run).env("HULL_DATA_DIR", data);
    command
}

/// An image archive that `scripts/test` has made.
#[must_use]
pub fn image(name: &str) -> PathBuf {
    target("images").join(format!("{name}.tar"))
}

/// What the project's scripts have built under this name.
#[must_use]
pub fn target(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target")
        .join(name)
}

/// # Panics
/// When the command failed, with what it printed.
pub fn assert_success(output: &Output, what: &str) {
    assert!(
        output.status.success(),
        "{what}: {}\nstdout: {}\nstderr: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}

/// Where Hull's data is by default: a file system that overlayfs can write to.
fn data_root() -> &'static Path {
    let root = Path::new("/var/lib/hull");
    std::fs::create_dir_all(root).expect("/var/lib is writable");
    root
}
