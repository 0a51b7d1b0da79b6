//! Memory that a machine gives back.
//!
//! Needs what all of these tests need.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use hull_machine::client::Machine;
use hull_machine::control::ExitReason;

use crate::guest::{image, run_beside, spec};

/// MiB that the guest uses and frees.
const USED: u64 = 128;
/// Linux reports pages two seconds after they were freed; emulated, that is longer.
const PATIENCE: Duration = Duration::from_secs(120);

const PREPARE: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /t
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/load 2> /dev/null); do
    insmod "/modules/$module"
done
dmesg -n 1
exec > /dev/hvc0 2>&1
"#;

/// Bytes of guest memory and of `hull-vmm` that the host has given.
fn resident(machine: &Machine) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kibibytes << 10
}

/// Waits until `bytes` less are resident than ever before.
async fn falls_by(machine: &Machine, bytes: u64) {
    let since = Instant::now();
    let mut most = 0;
    loop {
        let now = resident(machine);
        most = most.max(now);
        if most - now >= bytes {
            return;
        }
        let [most, now] = [most, now].map(|bytes| bytes >> 20);
        assert!(since.elapsed() < PATIENCE, "{now} MiB after {most}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A guest that uses memory and frees it, and ends when the host is done.
fn frees(kernel: &str) {
    let image = image(kernel);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let init = format!(
        "{PREPARE}\
         mount -t tmpfs tmpfs /t\n\
         dd if=/dev/zero of=/t/used bs=1M count={USED} 2> /dev/null\n\
         echo used\n\
         sleep 3\n\
         rm /t/used\n\
         echo freed\n\
         sleep 600\n"
    );
    let (spec, console) = spec(kernel, &image, &init, "");

    let (reason, _) = run_beside(spec.memory_mib(512).balloon(), console, async |machine| {
        falls_by(machine, (USED - 8) << 20).await;
        machine.stop().await;
    });

    assert_eq!(reason, ExitReason::Stopped);
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_gives_freed_memory_back() {
    frees("default");
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_gives_freed_memory_back() {
    frees("6.1");
}
