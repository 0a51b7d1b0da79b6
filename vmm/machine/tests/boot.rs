//! Machines from their first instruction to their end, on every kernel that is supported.
//!
//! Each runs in its own jailed `hull-vmm`. Needs root, KVM, busybox, and `HULL_GUEST_DIR` with the images
//! that `guest-image/build` makes: `scripts/with-kvm PROGRAM --ignored`, as `scripts/test` does.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of it is a test"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_machine::boot::kernel;
use hull_machine::client::{Machine, MachineSpec};
use hull_machine::control::ExitReason;
use rustix::pipe::{PipeFlags, pipe_with};

/// Generous: emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// Takes over the guest: loads the image's modules, says so on the console, and ends as it is told.
const INIT: &str = r#"#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules/load); do
    busybox insmod "/modules/$module"
done
exec > /dev/hvc0 2>&1
echo "init: up, processors: $(busybox nproc)"
busybox grep RAM /proc/iomem
case $(busybox cat /proc/cmdline) in
    *end=power-off*) busybox poweroff -f ;;
    *end=reset*) busybox reboot -f ;;
    *end=panic*) echo c > /proc/sysrq-trigger ;;
esac
while :; do busybox sleep 1000; done
"#;

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

fn initramfs(image: &Path) -> File {
    let mut archive = fs::read(image.join("initramfs.cpio")).unwrap();
    append(&mut archive, "proc", 0o40_755, b"");
    append(&mut archive, "bin", 0o40_755, b"");
    let busybox = fs::read("/bin/busybox").unwrap();
    append(&mut archive, "bin/busybox", 0o100_755, &busybox);
    append(&mut archive, "init", 0o100_755, INIT.as_bytes());
    append(&mut archive, "TRAILER!!!", 0, b"");
    let path = tempfile::NamedTempFile::new().unwrap();
    fs::write(&path, archive).unwrap();
    File::open(&path).unwrap()
}

/// The image of 6.12, or that of 6.1 beside it.
fn image(series: &str) -> PathBuf {
    let newest = std::env::var_os("HULL_GUEST_DIR").expect("HULL_GUEST_DIR names the guest image");
    match series {
        "6.12" => newest.into(),
        _ => {
            let mut other = newest;
            other.push("-");
            other.push(series);
            other.into()
        }
    }
}

fn spec(
    kernel: impl Into<std::os::fd::OwnedFd>,
    image: &Path,
    cmdline: &str,
) -> (MachineSpec, File) {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let spec = MachineSpec::new(kvm, kernel, writer)
        .initramfs(initramfs(image))
        .cmdline(format!("console=hvc0 {cmdline}"));
    (spec, reader.into())
}

/// Runs the machine to its end, or stops it when the console has said `stop_at`.
fn run(spec: MachineSpec, console: File, stop_at: Option<&str>) -> (ExitReason, String) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let binary = Path::new(env!("CARGO_BIN_EXE_hull-vmm"));
        let (machine, _) = Machine::launch(binary, spec).await.unwrap();
        let (seen, mut stop) = tokio::sync::oneshot::channel();
        let stop_at = stop_at.map(str::to_owned);
        let output = tokio::task::spawn_blocking(move || follow(console, stop_at, seen));
        let reason = tokio::select! {
            reason = tokio::time::timeout(PATIENCE, machine.wait()) => reason.ok(),
            Ok(()) = &mut stop => {
                machine.stop().await;
                tokio::time::timeout(PATIENCE, machine.wait()).await.ok()
            }
        };
        machine.kill();
        let output = output.await.unwrap();
        print!("{output}");
        (reason.expect("the machine ends"), output)
    })
}

/// All that the console says; tells `seen` when it has said `stop_at`.
fn follow(
    mut console: File,
    stop_at: Option<String>,
    seen: tokio::sync::oneshot::Sender<()>,
) -> String {
    let mut output = String::new();
    let mut seen = stop_at.map(|text| (text, seen));
    let mut part = [0; 4096];
    loop {
        let count = console.read(&mut part).unwrap();
        if count == 0 {
            return output;
        }
        output.push_str(&String::from_utf8_lossy(&part[..count]));
        if let Some((_, seen)) = seen.take_if(|(text, _)| output.contains(text.as_str())) {
            let _ = seen.send(());
        }
    }
}

fn boot(series: &str, vcpus: u8, cmdline: &str) -> (ExitReason, String) {
    let image = image(series);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, cmdline);
    run(spec.vcpus(vcpus), console, None)
}

#[track_caller]
fn assert_ends(series: &str, vcpus: u8, cmdline: &str, expected: &ExitReason) {
    let (reason, console) = boot(series, vcpus, cmdline);

    assert_eq!(&reason, expected);
    assert!(console.contains(&format!("init: up, processors: {vcpus}")));
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_powers_off() {
    assert_ends("6.12", 1, "end=power-off", &ExitReason::PowerOff);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_powers_off() {
    assert_ends("6.1", 1, "end=power-off", &ExitReason::PowerOff);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_has_two_processors() {
    assert_ends("6.12", 2, "end=power-off", &ExitReason::PowerOff);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_has_two_processors() {
    assert_ends("6.1", 2, "end=power-off", &ExitReason::PowerOff);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_resets() {
    assert_ends("6.12", 1, "end=reset", &ExitReason::Reset);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_resets() {
    assert_ends("6.1", 1, "end=reset", &ExitReason::Reset);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_panics() {
    assert_ends("6.12", 2, "end=panic panic=-1", &ExitReason::Panic);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_panics() {
    assert_ends("6.1", 2, "end=panic panic=-1", &ExitReason::Panic);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_triple_faults() {
    assert_ends("6.12", 1, "end=reset reboot=t", &ExitReason::TripleFault);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_triple_faults() {
    assert_ends("6.1", 1, "end=reset reboot=t", &ExitReason::TripleFault);
}

#[test]
#[ignore = "needs KVM"]
fn a_running_machine_is_stopped() {
    let image = image("6.12");
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, "end=never");

    let (reason, _) = run(spec.vcpus(2), console, Some("init: up, processors: 2"));

    assert_eq!(reason, ExitReason::Stopped);
}

#[test]
#[ignore = "needs KVM"]
fn memory_past_the_gap_is_used() {
    let image = image("6.12");
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, "end=power-off");

    let (reason, console) = run(spec.memory_mib(3584), console, None);

    assert_eq!(reason, ExitReason::PowerOff);
    assert!(console.contains("100000000-11fffffff : System RAM"));
}

#[test]
#[ignore = "needs KVM"]
fn what_is_no_kernel_is_refused_with_the_reason() {
    let image = image("6.12");
    let (spec, _console) = spec(initramfs(&image), &image, "");
    let runtime = tokio::runtime::Runtime::new().unwrap();

    let launched = runtime.block_on(Machine::launch(
        Path::new(env!("CARGO_BIN_EXE_hull-vmm")),
        spec,
    ));

    let error = launched.unwrap_err();
    let reason = std::error::Error::source(&error).unwrap().to_string();
    assert!(reason.contains("loading the kernel"), "{reason}");
}

/// What a package of the distribution holds boots once it is unpacked.
#[test]
#[ignore = "needs KVM"]
fn a_bzimage_is_unpacked_and_boots() {
    let image = image("6.12");
    let packed = image.with_file_name("kernels").join("6.12/vmlinuz");
    let cache = tempfile::tempdir().unwrap();
    let kernel = kernel::open(&packed, cache.path()).unwrap();
    let (spec, console) = spec(kernel, &image, "end=power-off");

    let (reason, _) = run(spec, console, None);

    assert_eq!(reason, ExitReason::PowerOff);
}
