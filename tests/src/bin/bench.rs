//! Times Hull against its peers, interleaved on one machine, and prints medians and ratios.
//!
//! Run by `scripts/bench`, which installs the peers. Absolute times say nothing where
//! the machine is emulated; the ratios do.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a benchmark reports by panicking"
)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hull_tests::host;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::{Pod, sleepers};
use hull_tests::series::{Series, print, until_printed};

const ROUNDS: usize = 5;

fn first_output(hull: &Hull) {
    let manifest = hull.manifest(
        "hello.yaml",
        "apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  restartPolicy: Never
  containers:
  - {name: main, image: busybox, command: [echo, hello]}
",
    );
    let archive = hull_tests::hull::image("busybox");
    let loaded = Command::new("podman")
        .arg("load")
        .arg("-i")
        .arg(archive)
        .output()
        .expect("podman");
    assert_success(&loaded, "podman load");
    let podman = |network: &str| {
        let mut command = Command::new("podman");
        command
            .args(["--runtime", "crun", "run", "--rm", "--network", network])
            .args(["docker.io/library/busybox:latest", "echo", "hello"]);
        command
    };
    let ours = |network: &str| {
        let args = ["run", "--network", network].map(OsStr::new);
        hull.command(args.into_iter().chain([manifest.as_os_str()]))
    };
    let mut series = [
        Series::new("podman run, crun, no network"),
        Series::new("hull run, cold, no network"),
        Series::new("podman run, crun, a bridge"),
        Series::new("hull run, cold, a bridge"),
    ];
    // Both make their networks at first use.
    let _ = until_printed(&mut podman("bridge"), "hello");
    let _ = until_printed(&mut ours("hull"), "hello");
    for _ in 0..ROUNDS {
        series[0].add(until_printed(&mut podman("none"), "hello"));
        series[1].add(until_printed(&mut ours("none"), "hello"));
        series[2].add(until_printed(&mut podman("bridge"), "hello"));
        series[3].add(until_printed(&mut ours("hull"), "hello"));
    }
    print("Command to the container's first output", "s", &series);
}

/// An initramfs whose first process prints a line and powers off.
fn tiny_initramfs(dir: &Path) -> PathBuf {
    let script = "set -e; mkdir root; cp /bin/busybox root/busybox
printf '#!/busybox sh\\n/busybox echo init-runs\\n/busybox poweroff -f\\n' > root/init; chmod +x root/init
mkdir root/dev; mknod root/dev/console c 5 1
(cd root && find . | cpio --quiet -o -H newc) > tiny.cpio";
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .output()
        .unwrap();
    assert_success(&output, "making an initramfs");
    dir.join("tiny.cpio")
}

fn boot(hull: &Hull) {
    let guest = PathBuf::from(std::env::var_os("HULL_GUEST_DIR").expect("HULL_GUEST_DIR"));
    let kernel = guest.join("vmlinux");
    let initramfs = tiny_initramfs(hull.work_dir());
    let qemu = || {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-M",
                "microvm,pcie=on,pic=off,pit=off,rtc=off",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-m",
                "256",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", "stdio,id=console"])
            .args(["-device", "virtconsole,chardev=console"])
            .args(["-append", "console=hvc0 quiet panic=-1"])
            .arg("-kernel")
            .arg(&kernel)
            .arg("-initrd")
            .arg(&initramfs);
        command
    };
    let ours = || {
        let mut command = Command::new("boot-machine");
        command.arg(&kernel).arg(&initramfs);
        command
    };
    let mut series = [Series::new("QEMU microvm"), Series::new("hull-vmm")];
    for _ in 0..ROUNDS {
        series[0].add(until_printed(&mut qemu(), "init-runs"));
        series[1].add(until_printed(&mut ours(), "init-runs"));
    }
    print(
        "VMM started to the first line of init, same kernel and initramfs, 1 vCPU, 256 MiB",
        "s",
        &series,
    );
}

fn memory(hull: &Hull) {
    let pod = Pod::start(hull, "idle", &sleepers("idle", &[("one", "")], ""));
    std::thread::sleep(Duration::from_secs(2));
    let (vmm, guest) = host::resident_kib(pod.pid("vmmPid"));
    let (supervisor, _) = host::resident_kib(pod.pid("supervisorPid"));
    println!("Resident memory of an idle pod with one container, in KiB");
    println!(
        "  hull-vmm without guest RAM {vmm}, guest RAM touched {guest}, supervisor {supervisor}"
    );
}

fn main() {
    let hull = Hull::new();
    first_output(&hull);
    boot(&hull);
    memory(&hull);
}
