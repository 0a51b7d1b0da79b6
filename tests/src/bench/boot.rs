//! From the start of a VMM to the first line of init: one kernel, one initramfs, 1 vCPU, 256 MiB.
//!
//! The distribution's kernel is what all of them can show a line with: the tuned one has no serial port. With that there are
//! rows of their own.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::build::Build;
use super::firecracker;
use super::options::Options;
use super::peers::{done, given, installed, instructions};
use super::report::{Report, Table};
use super::series::{Contender, Then, interleave, until};
use crate::hull::target;

pub const TITLE: &str =
    "VMM started to the first line of init, the distribution's kernel, 1 vCPU, 256 MiB";
pub const TUNED: &str = "VMM started to the first line of init, the guest's own kernel";
pub const QEMU: &str = "QEMU microvm";
pub const FIRECRACKER: &str = "Firecracker";
pub const OURS: &str = "hull-vmm";
/// Of init.
const LINE: &str = "init-runs";

/// An initramfs whose first process does what a script says.
///
/// # Panics
/// When it can't be made.
#[must_use]
pub fn initramfs(dir: &Path, init: &str) -> PathBuf {
    std::fs::create_dir_all(dir).expect("the work directory is writable");
    std::fs::write(dir.join("init"), format!("#!/busybox sh\n{init}\n")).expect("it is writable");
    let script =
        "set -e; mkdir root; cp /bin/busybox root/busybox; mv init root/init; chmod +x root/init
mkdir root/dev; mknod root/dev/console c 5 1
(cd root && find . | cpio --quiet -o -H newc) > initramfs.cpio";
    let _ = done(Command::new("sh").args(["-c", script]).current_dir(dir));
    dir.join("initramfs.cpio")
}

/// Where a console is for QEMU.
#[derive(Debug, Clone, Copy)]
enum Console {
    Serial,
    Virtio,
}

fn qemu(kernel: &Path, initramfs: &Path, console: Console) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-no-reboot"]);
    match console {
        Console::Serial => command
            .args(["-M", "microvm,pic=off,pit=off,rtc=off"])
            .args(["-serial", "stdio"])
            .args(["-append", "console=ttyS0 quiet panic=-1 noreplace-smp"]),
        Console::Virtio => command
            .args(["-M", "microvm,pcie=on,pic=off,pit=off,rtc=off"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", "stdio,id=console"])
            .args(["-device", "virtconsole,chardev=console"])
            .args(["-append", "console=hvc0 quiet panic=-1 noreplace-smp"]),
    };
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    command
}

/// The kernel that all VMMs boot.
#[must_use]
pub fn distributions_kernel() -> PathBuf {
    target("guest-6.12").join("vmlinux")
}

fn cloud_hypervisor(program: &Path, kernel: &Path, initramfs: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(["--cpus", "boot=1", "--memory", "size=256M"])
        .args(["--console", "tty", "--serial", "off"])
        .args(["--cmdline", "console=hvc0 quiet panic=-1 noreplace-smp"])
        .arg("--kernel")
        .arg(kernel)
        .arg("--initramfs")
        .arg(initramfs);
    command
}

/// # Panics
/// When one of them doesn't boot.
pub fn measure(options: &Options, builds: &[Build], report: &mut Report) {
    let Some(own) = builds.first() else { return };
    let dir = own.hull.work_dir().join("boot");
    let initramfs = initramfs(&dir, &format!("/busybox echo {LINE}\n/busybox poweroff -f"));
    let kernel = distributions_kernel();
    let boots = |name: &str, then, command: Command| {
        let mut command = command;
        Contender::new(name, move |_| until(&mut command, LINE, then))
    };
    let peer = |name: &str, variable: &str, command: &dyn Fn(&Path) -> Command| {
        // It may have no way to power off.
        match given(variable) {
            Ok(program) => boots(name, Then::Kill, command(&program)),
            Err(why) => Contender::absent(name, why),
        }
    };
    let mut contenders = Vec::new();
    contenders.push(if installed("qemu-system-x86_64") {
        boots(QEMU, Then::End, qemu(&kernel, &initramfs, Console::Serial))
    } else {
        Contender::absent(QEMU, "not installed")
    });
    contenders.push(peer(FIRECRACKER, "HULL_BENCH_FIRECRACKER", &|program| {
        firecracker::boot(program, &dir, &kernel, &initramfs)
    }));
    contenders.push(peer(
        "Cloud Hypervisor",
        "HULL_BENCH_CLOUD_HYPERVISOR",
        &|program| cloud_hypervisor(program, &kernel, &initramfs),
    ));
    for build in builds {
        let command = build.boot(&kernel, &initramfs);
        contenders.push(boots(&build.name(OURS), Then::End, command));
    }
    let rows = interleave(options.rounds(), false, contenders);
    report.add(Table::new(TITLE, "s", rows));

    let mut contenders = Vec::new();
    if installed("qemu-system-x86_64") {
        let command = qemu(&own.guest.join("vmlinux"), &initramfs, Console::Virtio);
        contenders.push(boots(QEMU, Then::End, command));
    }
    for build in builds {
        let command = build.boot(&build.guest.join("vmlinux"), &initramfs);
        contenders.push(boots(&build.name(OURS), Then::End, command));
    }
    let rows = interleave(options.rounds(), false, contenders);
    report.add(Table::new(TUNED, "s", rows));
    if options.short {
        return;
    }
    match instructions(&own.boot(&kernel, &initramfs)) {
        Some(count) => report.note(&format!("{OURS}: {count:.0} instructions for that boot")),
        None => report.note("instructions: not counted, this machine has no counters (perf stat)"),
    }
}
