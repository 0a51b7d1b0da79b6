//! Other runtimes, with the same image and command.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hull::{assert_success, image};

/// Whether a program is on PATH.
#[must_use]
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// A program that the environment gives: it is never fetched.
///
/// # Errors
/// That there is none, to be shown.
pub fn given(variable: &str) -> Result<PathBuf, String> {
    match std::env::var_os(variable) {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!("not given ({variable})")),
    }
}

/// Runs a command to its end.
///
/// # Panics
/// When it fails.
pub fn done(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert_success(&output, &format!("{command:?}"));
    String::from_utf8(output.stdout).expect("text")
}

/// A bundle of busybox for `runc` and `crun`.
#[derive(Debug)]
pub struct Bundle(TempDir);

impl Bundle {
    /// Whose program is `echo hello`.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn new(runtime: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let script = "set -e; mkdir -p rootfs/bin rootfs/proc rootfs/sys rootfs/dev rootfs/etc
cp /bin/busybox rootfs/bin/; ln -s busybox rootfs/bin/echo";
        let _ = done(Command::new("sh").args(["-c", script]).current_dir(&dir));
        let _ = done(Command::new(runtime).arg("spec").current_dir(&dir));
        let file = dir.path().join("config.json");
        let text = std::fs::read_to_string(&file).expect("it has been made");
        let mut spec: Value = serde_json::from_str(&text).expect("JSON");
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["echo", "hello"]);
        std::fs::write(&file, spec.to_string()).expect("it is ours");
        Self(dir)
    }

    /// `RUNTIME run` of a container of it.
    #[must_use]
    pub fn run(&self, runtime: &str, id: &str) -> Command {
        let mut command = Command::new(runtime);
        command.arg("run").arg("--bundle").arg(self.0.path());
        command.arg(id);
        command
    }
}

/// Loads busybox for podman.
///
/// # Panics
/// When that fails.
pub fn load_for_podman() {
    let archive = image("busybox");
    let args = [OsStr::new("load"), OsStr::new("-i"), archive.as_os_str()];
    let _ = done(Command::new("podman").args(args));
}

/// `podman run` with crun, in a network.
#[must_use]
pub fn podman(network: &str) -> Command {
    let mut command = Command::new("podman");
    command
        .args(["--runtime", "crun", "run", "--rm", "--network", network])
        .args(["docker.io/library/busybox:latest", "echo", "hello"]);
    command
}

/// Instructions that a command and all that it starts need, by `perf stat`. None: this machine doesn't count them.
#[must_use]
pub fn instructions(command: &Command) -> Option<f64> {
    let mut counted = Command::new("perf");
    counted.args(["stat", "-x", ",", "-e", "instructions"]);
    counted.arg("--").arg(command.get_program());
    counted.args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            counted.env(name, value);
        }
    }
    let output = counted.output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    text.lines()
        .find_map(|line| line.split(',').next()?.parse().ok())
}
