//! Firecracker, by its own interface: boots, and goes on from a snapshot.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::scaled;

/// What it has by itself, and a console.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 noreplace-smp reboot=k nomodule pci=off i8042.noaux i8042.nomux \
                       i8042.dumbkbd swiotlb=noforce";
/// The longest that it may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine of 1 vCPU and 256 MiB.
fn configuration(dir: &Path, kernel: &Path, initramfs: &Path) -> PathBuf {
    let file = dir.join("firecracker.json");
    let text = json!({
        "boot-source": {
            "kernel_image_path": kernel,
            "initrd_path": initramfs,
            "boot_args": CMDLINE,
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
    });
    std::fs::write(&file, text.to_string()).expect("the work directory is writable");
    file
}

/// A machine that boots, its console on standard output.
#[must_use]
pub fn boot(program: &Path, dir: &Path, kernel: &Path, initramfs: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("--no-api").arg("--config-file");
    command.arg(configuration(dir, kernel, initramfs));
    command
}

/// A snapshot of a guest that prints lines without end.
#[derive(Debug)]
pub struct Snapshot {
    program: PathBuf,
    dir: PathBuf,
}

impl Snapshot {
    /// Boots the guest, and puts it aside when it prints `line`.
    ///
    /// # Panics
    /// When Firecracker doesn't.
    #[must_use]
    pub fn take(program: &Path, dir: &Path, kernel: &Path, initramfs: &Path, line: &str) -> Self {
        let snapshot = Self {
            program: program.to_owned(),
            dir: dir.to_owned(),
        };
        let configuration = configuration(dir, kernel, initramfs);
        let mut machine = snapshot.start(&[configuration.as_os_str()]);
        machine.until(line);
        machine.ask("PATCH", "/vm", &json!({"state": "Paused"}));
        let body = json!({
            "snapshot_type": "Full",
            "snapshot_path": dir.join("state"),
            "mem_file_path": dir.join("memory"),
        });
        machine.ask("PUT", "/snapshot/create", &body);
        snapshot
    }

    /// Seconds from the start of a process until the guest, restored in it, has printed `line`.
    ///
    /// # Panics
    /// When it doesn't.
    #[must_use]
    pub fn restore(&self, line: &str) -> f64 {
        let start = Instant::now();
        let mut machine = self.start(&[]);
        let body = json!({
            "snapshot_path": self.dir.join("state"),
            "mem_backend": {"backend_type": "File", "backend_path": self.dir.join("memory")},
            "resume_vm": true,
        });
        machine.ask("PUT", "/snapshot/load", &body);
        machine.until(line);
        start.elapsed().as_secs_f64()
    }

    fn start(&self, configuration: &[&std::ffi::OsStr]) -> Process {
        let socket = self.dir.join("api");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(&self.program);
        command.arg("--api-sock").arg(&socket);
        if let Some(file) = configuration.first() {
            command.arg("--config-file").arg(file);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("Firecracker starts");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Process {
            child,
            output,
            socket,
        }
    }
}

/// Killed when it is dropped.
struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
    socket: PathBuf,
}

impl Process {
    fn until(&mut self, wanted: &str) {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = self.output.read_until(b'\n', &mut line).expect("a pipe");
            assert!(read > 0, "Firecracker ended");
            if String::from_utf8_lossy(&line).contains(wanted) {
                return;
            }
        }
    }

    /// One request, which must be taken.
    fn ask(&self, method: &str, path: &str, body: &Value) {
        let mut connection = self.connect();
        let body = body.to_string();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        connection
            .write_all(request.as_bytes())
            .expect("Firecracker reads");
        let mut answer = [0; 1024];
        let length = connection.read(&mut answer).expect("Firecracker answers");
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.starts_with("HTTP/1.1 204"), "{path}: {answer}");
    }

    fn connect(&self) -> UnixStream {
        let start = Instant::now();
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(connection) => return connection,
                Err(error) => assert!(start.elapsed() < scaled(PATIENCE), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
