//! The `hull` command with directories of its own, so that tests don't meet.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

/// A host with Hull on it: run and data directories that no other test uses.
#[derive(Debug)]
pub struct Hull {
    run: TempDir,
    data: Data,
    work: TempDir,
    guest: Option<PathBuf>,
    /// Which templates machines begin with.
    templates: &'static str,
    /// Where `hull` is. None: on PATH.
    programs: Option<PathBuf>,
}

/// A data directory.
#[derive(Debug)]
enum Data {
    /// Goes with its host.
    Own(TempDir),
    Shared(PathBuf),
}

impl Data {
    fn path(&self) -> &Path {
        match self {
            Self::Own(directory) => directory.path(),
            Self::Shared(path) => path,
        }
    }
}

impl Hull {
    /// With the `busybox` image loaded.
    ///
    /// # Panics
    /// When the image can't be loaded.
    #[must_use]
    pub fn new() -> Self {
        Self::without_images().load("busybox")
    }

    /// With one more image.
    ///
    /// # Panics
    /// When it can't be loaded.
    #[must_use]
    pub fn load(self, name: &str) -> Self {
        let _ = self.ok(["load".as_ref(), image(name).as_os_str()]);
        self
    }

    /// With these images and no networks, in a data directory that all such hosts share: large images
    /// are loaded once. One at a time; see [`crate::network::host_network`].
    ///
    /// # Panics
    /// When an image can't be loaded.
    #[must_use]
    pub fn with_images(names: &[&str]) -> Self {
        static LOADED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let shared = data_root().join("of-tests");
        std::fs::create_dir_all(&shared).expect("the data directory is writable");
        let hull = Self::with_data(Data::Shared(shared));
        hull.remove_networks();
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
        let data = tempfile::tempdir_in(data_root()).expect("the data directory is writable");
        Self::with_data(Data::Own(data))
    }

    fn with_data(data: Data) -> Self {
        Self {
            run: tempfile::tempdir_in("/run").expect("/run is writable"),
            data,
            work: tempfile::tempdir().expect("a temporary directory"),
            guest: None,
            // What a test sees must not depend on which pods came before.
            templates: "off",
            programs: None,
        }
    }

    fn remove_networks(&self) {
        let networks = self.run(["network", "ls", "--quiet"]).stdout;
        let networks = String::from_utf8_lossy(&networks);
        for network in networks.lines() {
            let _ = self.run(["network", "rm", network]);
        }
    }

    /// With another guest image than that of `HULL_GUEST_DIR`.
    #[must_use]
    pub fn with_guest(mut self, guest: impl Into<PathBuf>) -> Self {
        self.guest = Some(guest.into());
        self
    }

    /// Whose machines begin with templates; those of other hosts don't.
    #[must_use]
    pub fn with_templates(mut self) -> Self {
        self.templates = "tenant";
        self
    }

    /// With the programs of another directory than PATH's.
    #[must_use]
    pub fn with_programs(mut self, programs: impl Into<PathBuf>) -> Self {
        self.programs = Some(programs.into());
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
        let program = self.programs.as_ref().map(|programs| programs.join("hull"));
        let mut command = Command::new(program.unwrap_or_else(|| "hull".into()));
        command
            .env("HULL_RUN_DIR", self.run_dir())
            .env("HULL_DATA_DIR", self.data.path())
            .env("HULL_TEMPLATES", self.templates);
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
            .env("HULL_TEMPLATES", self.templates)
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
        if matches!(self.data, Data::Shared(_)) {
            self.remove_networks();
        }
    }
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

/// Runs `cat; echo end` behind this command: its input's bursts come back one by one, and after its end
/// what is printed then.
///
/// # Panics
/// When they don't, or the command fails.
pub fn bursts_pass(command: &mut Command) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("hull is on PATH");
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut burst = [0; 6];
    for _ in 0..3 {
        stdin.write_all(b"burst\n").expect("hull reads");
        stdout.read_exact(&mut burst).expect("hull writes");
        assert_eq!(&burst, b"burst\n");
    }
    drop(stdin);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("text");
    assert_eq!(rest, "end\n");
    assert!(child.wait().expect("a child").success());
}

/// Where Hull's data is by default: a file system that overlayfs can write to.
fn data_root() -> &'static Path {
    let root = Path::new("/var/lib/hull");
    std::fs::create_dir_all(root).expect("/var/lib is writable");
    root
}
