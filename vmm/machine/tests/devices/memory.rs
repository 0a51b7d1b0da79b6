//! Memory that a machine gives back, and memory that is added to one.
//!
//! Needs what all of these tests need.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use hull_machine::client::{Machine, MemoryError};
use hull_machine::control::{AddedMemory, ExitReason, MemoryRefused};

use crate::guest::{hears, image, run_beside, run_hearing, spec};

/// MiB that the guest uses and frees.
const USED: u64 = 128;
/// MiB that may stay: pages are reported in blocks of 2 MiB, and one in which a page is still used stays whole.
const STAYS: u64 = 32;
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
        falls_by(machine, (USED - STAYS) << 20).await;
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

/// MiB that are added to a machine of 256, and how many of them it has after it has given back.
const ADDED: u64 = 512;
const KEPT: u64 = 128;
/// MiB of addresses: more than a page table can map in one entry.
const REGION: u64 = 64 << 10;

/// Looks at the first address of the region while nobody drives the device, waits for memory, uses more than the machine
/// had before, and waits until it is gone again.
const GROW: &str = r#"
total() { awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo; }
driver=/sys/bus/virtio/drivers/virtio_mem
device=$(basename $driver/virtio*)
echo $device > $driver/unbind
echo "nothing: $(devmem 0x100000000 32)"
devmem 0x100000000 32 0x12345678
echo "still nothing: $(devmem 0x100000000 32)"
echo $device > $driver/bind

echo online > /sys/devices/system/memory/auto_online_blocks
before=$(total)
echo "ready"
until [ $(total) -ge $((before + ADDED)) ]; do sleep 0.1; done
echo "grown"
mount -t tmpfs -o size=90% tmpfs /t
yes 'a line of the pattern' | head -c 5242880 > /pattern
for part in $(seq 64); do cp /pattern /t/$part; done
for part in $(seq 64); do cmp /pattern /t/$part || echo "differs"; done
echo "used"
umount /t
echo 3 > /proc/sys/vm/drop_caches
echo "freed"
until [ $(total) -le $((before + KEPT)) ]; do sleep 0.1; done
echo "shrunk"
poweroff -f
"#;

async fn plugged(machine: &Machine, mib: u64) {
    let since = Instant::now();
    loop {
        let AddedMemory { plugged_mib, .. } = machine.added_memory().await.unwrap();
        if plugged_mib == mib {
            return;
        }
        assert!(since.elapsed() < PATIENCE, "{plugged_mib} MiB");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A guest to which memory is added, and from which some is taken.
fn grows(series: &str) {
    let image = image(series);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let grow = GROW
        .replace("ADDED", &ADDED.to_string())
        .replace("KEPT", &KEPT.to_string());
    let (spec, console) = spec(kernel, &image, &format!("{PREPARE}{grow}"), "iomem=relaxed");
    let spec = spec.memory_mib(256).memory_device(REGION);

    let (reason, said) = run_hearing(spec, console, async |machine, mut said| {
        let refused = machine.resize_memory(REGION + 2).await.unwrap_err();
        let region_mib = REGION;
        assert!(matches!(
            refused,
            MemoryError::Refused(MemoryRefused::TooMuch { region_mib: found }) if found == region_mib
        ));
        assert!(hears(&mut said, "ready").await);
        let since = Instant::now();
        machine.resize_memory(ADDED).await.unwrap();
        plugged(machine, ADDED).await;
        println!("plugged after {} ms", since.elapsed().as_millis());

        assert!(hears(&mut said, "grown").await);
        println!("grown after {} ms", since.elapsed().as_millis());
        assert!(hears(&mut said, "freed").await);
        let most = resident(machine);
        machine.resize_memory(KEPT).await.unwrap();
        plugged(machine, KEPT).await;
        let given_back = most.saturating_sub(resident(machine)) >> 20;
        println!("given back: {given_back} MiB");
        // What it has used, but for what lies in what it keeps and had.
        assert!(given_back >= 64, "{given_back} MiB");
    });

    assert_eq!(reason, ExitReason::PowerOff);
    for line in [
        "nothing: 0xFFFFFFFF",
        "still nothing: 0xFFFFFFFF",
        "used",
        "shrunk",
    ] {
        assert!(said.contains(line), "{line:?} is missing");
    }
    assert!(!said.contains("differs"));
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_takes_memory_that_is_added() {
    grows("6.12");
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_takes_memory_that_is_added() {
    grows("6.1");
}

#[test]
#[ignore = "needs KVM"]
fn nothing_is_added_to_a_machine_without_the_device() {
    let image = image("6.12");
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let (spec, console) = spec(kernel, &image, PREPARE, "");

    run_beside(spec, console, async |machine| {
        for refused in [
            machine.resize_memory(2).await.unwrap_err(),
            machine.added_memory().await.unwrap_err(),
        ] {
            assert!(matches!(
                refused,
                MemoryError::Refused(MemoryRefused::NoDevice)
            ));
        }
        machine.stop().await;
    });
}
