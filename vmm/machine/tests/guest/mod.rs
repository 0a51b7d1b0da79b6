//! Machines for tests: each runs in its own jailed `hull-vmm`, with busybox and a script as its init.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_machine::client::{Machine, MachineSpec};
use hull_machine::control::ExitReason;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::watch;

/// Generous: emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// Adds files to an initramfs in the "newc" format: the kernel unpacks what follows over what comes first.
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let pad = |archive: &mut Vec<u8>| archive.resize(archive.len().next_multiple_of(4), 0);
    pad(archive);
    let fields = [
        1,
        mode,
        0,
        0,
        1,
        0,
        u32::try_from(content.len()).unwrap(),
        0,
        0,
        0,
        0,
        u32::try_from(name.len() + 1).unwrap(),
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        write!(archive, "{field:08X}").unwrap();
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

/// The image's initramfs, with busybox and an init of the test's own.
pub fn initramfs(image: &Path, init: &str) -> File {
    let mut archive = fs::read(image.join("initramfs.cpio")).unwrap();
    append(&mut archive, "proc", 0o40_755, b"");
    append(&mut archive, "bin", 0o40_755, b"");
    let busybox = fs::read("/bin/busybox").unwrap();
    append(&mut archive, "bin/busybox", 0o100_755, &busybox);
    append(&mut archive, "init", 0o100_755, init.as_bytes());
    append(&mut archive, "TRAILER!!!", 0, b"");
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(&path, archive).unwrap();
    File::open(&path).unwrap()
}

/// The image with this kernel: `default`, which pods have, or a stock one, whose image is beside it.
pub fn image(kernel: &str) -> PathBuf {
    let default = std::env::var_os("HULL_GUEST_DIR").expect("HULL_GUEST_DIR names the guest image");
    let default = PathBuf::from(default);
    match kernel {
        "default" => default,
        _ => default.with_file_name(format!("guest-{kernel}")),
    }
}

/// A machine of one processor, and the reader of its console.
pub fn spec(
    kernel: impl Into<OwnedFd>,
    image: &Path,
    init: &str,
    cmdline: &str,
) -> (MachineSpec, File) {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let spec = MachineSpec::new(kvm, kernel, writer)
        .initramfs(initramfs(image, init))
        .cmdline(format!("console=hvc0 {cmdline}"));
    (spec, reader.into())
}

/// Runs the machine to its end, or stops it when the console has said `stop_at`.
pub fn run(spec: MachineSpec, console: File, stop_at: Option<&str>) -> (ExitReason, String) {
    run_hearing(spec, console, async |machine, mut said| {
        let Some(text) = stop_at else { return };
        if hears(&mut said, text).await {
            machine.stop().await;
        }
    })
}

/// Runs the machine to its end; `meanwhile` is done to it at the same time.
#[allow(dead_code, reason = "not all tests that run machines need it")]
pub fn run_beside(
    spec: MachineSpec,
    console: File,
    meanwhile: impl AsyncFnOnce(&Machine),
) -> (ExitReason, String) {
    run_hearing(spec, console, async |machine, _| meanwhile(machine).await)
}

/// The same; `meanwhile` hears what the console says.
pub fn run_hearing(
    spec: MachineSpec,
    console: File,
    meanwhile: impl AsyncFnOnce(&Machine, Said),
) -> (ExitReason, String) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let binary = Path::new(env!("CARGO_BIN_EXE_hull-vmm"));
        let (machine, _) = Machine::launch(binary, spec).await.unwrap();
        let (saying, said) = watch::channel(String::new());
        let output = tokio::task::spawn_blocking(move || follow(console, &saying));
        let end = async { tokio::join!(machine.wait(), meanwhile(&machine, said)).0 };
        let reason = tokio::time::timeout(PATIENCE, end).await.ok();
        machine.kill();
        let output = output.await.unwrap();
        print!("{output}");
        (reason.expect("the machine ends"), output)
    })
}

/// All that the console has said so far.
pub type Said = watch::Receiver<String>;

/// Waits until the console has said `text`. False: it never will.
pub async fn hears(said: &mut Said, text: &str) -> bool {
    said.wait_for(|said| said.contains(text)).await.is_ok()
}

/// All that the console says.
fn follow(mut console: File, saying: &watch::Sender<String>) -> String {
    let mut part = [0; 4096];
    loop {
        let count = console.read(&mut part).unwrap();
        if count == 0 {
            return saying.borrow().clone();
        }
        let text = String::from_utf8_lossy(&part[..count]);
        saying.send_modify(|said| said.push_str(&text));
    }
}
