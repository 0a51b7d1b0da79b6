//! Machines from their first instruction to their end, on every kernel that is supported.
//!
//! Each runs in its own jailed `hull-vmm`. Needs root, KVM, busybox, and `HULL_GUEST_DIR` with the images
//! that `guest-image/build` makes: `scripts/with-kvm PROGRAM --ignored`, as `scripts/test` does.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of it is a test"
)]

mod guest;

use std::fs::File;
use std::path::Path;

use hull_machine::boot::kernel;
use hull_machine::client::Machine;
use hull_machine::control::ExitReason;

use guest::{image, initramfs, run, spec};

/// Takes over the guest: loads the image's modules, says so on the console, and ends as it is told.
const INIT: &str = r#"#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
for module in $(busybox cat /modules/load 2> /dev/null); do
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

fn boot(kernel: &str, vcpus: u8, cmdline: &str) -> (ExitReason, String) {
    let image = image(kernel);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, cmdline);
    run(spec.vcpus(vcpus), console, None)
}

#[track_caller]
fn assert_ends(kernel: &str, vcpus: u8, cmdline: &str, expected: &ExitReason) {
    let (reason, console) = boot(kernel, vcpus, cmdline);

    assert_eq!(&reason, expected);
    assert!(console.contains(&format!("init: up, processors: {vcpus}")));
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_powers_off() {
    assert_ends("default", 1, "end=power-off", &ExitReason::PowerOff);
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
fn the_default_kernel_has_two_processors() {
    assert_ends("default", 2, "end=power-off", &ExitReason::PowerOff);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_has_two_processors() {
    assert_ends("6.1", 2, "end=power-off", &ExitReason::PowerOff);
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_resets() {
    assert_ends("default", 1, "end=reset", &ExitReason::Reset);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_resets() {
    assert_ends("6.1", 1, "end=reset", &ExitReason::Reset);
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_panics() {
    assert_ends("default", 2, "end=panic panic=-1", &ExitReason::Panic);
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
fn the_default_kernel_triple_faults() {
    assert_ends("default", 1, "end=reset reboot=t", &ExitReason::TripleFault);
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_triple_faults() {
    assert_ends("6.1", 1, "end=reset reboot=t", &ExitReason::TripleFault);
}

#[test]
#[ignore = "needs KVM"]
fn a_running_machine_is_stopped() {
    let image = image("default");
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, "end=never");

    let (reason, _) = run(spec.vcpus(2), console, Some("init: up, processors: 2"));

    assert_eq!(reason, ExitReason::Stopped);
}

#[test]
#[ignore = "needs KVM"]
fn memory_past_the_gap_is_used() {
    let image = image("default");
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, "end=power-off");

    let (reason, console) = run(spec.memory_mib(3584), console, None);

    assert_eq!(reason, ExitReason::PowerOff);
    assert!(console.contains("100000000-11fffffff : System RAM"));
}

#[test]
#[ignore = "needs KVM"]
fn what_is_no_kernel_is_refused_with_the_reason() {
    let image = image("default");
    let (spec, _console) = spec(initramfs(&image, INIT), &image, INIT, "");
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
    let image = image("default");
    let packed = image.with_file_name("kernels").join("6.12/vmlinuz");
    let cache = tempfile::tempdir().unwrap();
    let kernel = kernel::open(&packed, cache.path()).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, "end=power-off");

    let (reason, _) = run(spec, console, None);

    assert_eq!(reason, ExitReason::PowerOff);
}
