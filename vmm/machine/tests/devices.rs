//! Linux's own drivers on the bus and its devices, on every kernel that is supported.
//!
//! Needs what the tests in `boot.rs` need.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "all of it is a test"
)]

mod guest;
#[path = "devices/memory.rs"]
mod memory;
#[path = "devices/network.rs"]
mod network;

use std::fs::File;
use std::io::{Read, Seek};

use hull_machine::control::ExitReason;

use guest::{image, run, spec};

const MIB: usize = 1 << 20;

/// Tries the devices, and says how it went. `/dev/vda` is a disk of 8 MiB, `/dev/vdb` one that is read-only.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/load 2> /dev/null); do
    insmod "/modules/$module"
done
dmesg -n 1
exec > /dev/hvc0 2>&1

for device in /sys/bus/pci/devices/*; do
    echo "pci: ${device##*/} $(cat $device/vendor) $(cat $device/device) $(ls $device/msi_irqs | wc -l)"
done

# The pattern stays the same from one look to the next, and goes round the page cache.
yes 'a line of the pattern' | head -c 1048576 > /pattern
reads_back() { dd if=/dev/vda of=/back bs=64k count=16 iflag=direct 2> /dev/null; cmp /pattern /back && echo "$1: same"; }
dd if=/pattern of=/dev/vda bs=64k oflag=direct conv=fsync 2> /dev/null
reads_back written
echo "serial: $(cat /sys/block/vda/serial)"
echo "sectors: $(cat /sys/block/vda/size)"

cmp -n 4096 /dev/vdb /dev/zero && echo 'read-only: read'
dd if=/pattern of=/dev/vdb bs=4k count=1 2> /dev/null || echo "read-only: refused ($(cat /sys/block/vdb/ro))"

echo "entropy: $(cat /sys/class/misc/hw_random/rng_current)"
irq=$(grep virtio1-input /proc/interrupts | cut -d : -f 1)
for mask in 1 2 1 2; do
    echo $mask > /proc/irq/$((irq))/smp_affinity
    dd if=/dev/hwrng of=/dev/null bs=64 count=16 2> /dev/null
done
set -- $(grep virtio1-input /proc/interrupts)
[ $2 -gt 0 ] && [ $3 -gt 0 ] && echo 'interrupts: on both processors'

device=$(readlink -f /sys/block/vda/device/..)
address=${device##*/}
echo $address > /sys/bus/pci/drivers/virtio-pci/unbind
echo $address > /sys/bus/pci/drivers/virtio-pci/bind
reads_back rebound
before=$(head -n 1 $device/resource)
echo 1 > $device/remove
echo 1 > /sys/bus/pci/rescan
reads_back rescanned
[ "$before" != "$(head -n 1 $device/resource)" ] && echo 'BAR: moved'

blkdiscard -o 0 -l 65536 /dev/vda && echo 'discarded'
poweroff -f
"#;

/// What the drivers of `kernel` say, and what is on the writable disk afterwards.
fn tried(kernel: &str) -> (ExitReason, String, Vec<u8>) {
    let image = image(kernel);
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let mut disk = tempfile::tempfile().unwrap();
    disk.set_len(8 * MIB as u64).unwrap();
    let read_only = tempfile::NamedTempFile::new().unwrap();
    read_only.as_file().set_len(MIB as u64).unwrap();
    let (spec, console) = spec(kernel, &image, INIT, "");
    let spec = spec
        .vcpus(2)
        .block("writable", disk.try_clone().unwrap(), false)
        .block("other", File::open(read_only.path()).unwrap(), true);

    let (reason, said) = run(spec, console, None);

    let mut content = Vec::new();
    disk.rewind().unwrap();
    disk.read_to_end(&mut content).unwrap();
    (reason, said, content)
}

#[track_caller]
fn assert_works(kernel: &str) {
    let (reason, said, disk) = tried(kernel);

    assert_eq!(reason, ExitReason::PowerOff);
    let found: Vec<_> = said
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("pci: "))
        .collect();
    assert_eq!(
        found,
        [
            "0000:00:00.0 0x1b36 0x0008 0",
            "0000:00:01.0 0x1af4 0x1043 3",
            "0000:00:02.0 0x1af4 0x1044 2",
            "0000:00:03.0 0x1af4 0x1042 2",
            "0000:00:04.0 0x1af4 0x1042 2",
        ]
    );
    for line in [
        "written: same",
        "serial: writable",
        "sectors: 16384",
        "read-only: read",
        "read-only: refused (1)",
        "entropy: virtio_rng.0",
        "interrupts: on both processors",
        "rebound: same",
        "rescanned: same",
        "BAR: moved",
        "discarded",
    ] {
        assert!(said.contains(line), "{line:?} is missing");
    }
    let mut pattern = b"a line of the pattern\n".repeat(MIB / 22 + 1);
    pattern.truncate(MIB);
    pattern[..0x1_0000].fill(0);
    assert!(disk[..MIB] == pattern);
    assert!(disk[MIB..].iter().all(|byte| *byte == 0));
}

#[test]
#[ignore = "needs KVM"]
fn the_default_kernel_drives_every_device() {
    assert_works("default");
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_12_drives_every_device() {
    assert_works("6.12");
}

#[test]
#[ignore = "needs KVM"]
fn linux_6_1_drives_every_device() {
    assert_works("6.1");
}
