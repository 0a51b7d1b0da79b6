//! The machine's virtio-net devices, in the order of their PCI addresses.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Doing, Result};

/// Where the kernel lists virtio devices, whatever network namespace their interfaces are in.
pub const SYSFS: &str = "/sys/bus/virtio/devices";

/// Device type of a network card (virtio 1.2, section 5).
const NETWORK: u32 = 1;

/// The names of the bus's network devices (`virtio3`), in the order of their PCI addresses.
pub fn network_devices(sysfs: &Path) -> Result<Vec<String>> {
    let doing = || format!("listing {}", sysfs.display());
    let mut found = Vec::new();
    let entries = match fs::read_dir(sysfs) {
        // No driver of any virtio device: there is none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.doing(doing)?,
    };
    for entry in entries {
        let entry = entry.doing(doing)?;
        let path = entry.path();
        let kind = fs::read_to_string(path.join("device"))
            .doing(|| format!("reading the type of {}", path.display()))?;
        let kind = kind.trim().trim_start_matches("0x");
        if u32::from_str_radix(kind, 16) != Ok(NETWORK) {
            continue;
        }
        let target = fs::read_link(&path).doing(|| format!("reading {}", path.display()))?;
        if let (Some(address), Ok(name)) = (pci_address(&target), entry.file_name().into_string()) {
            found.push((address, name));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

/// Domain, bus, device and function of the card that a virtio device is on.
fn pci_address(device: &Path) -> Option<(u32, u8, u8, u8)> {
    let card: PathBuf = device.parent()?.into();
    let text = card.file_name()?.to_str()?;
    let (text, function) = text.split_once('.')?;
    let mut parts = text.split(':');
    let domain = u32::from_str_radix(parts.next()?, 16).ok()?;
    let bus = u8::from_str_radix(parts.next()?, 16).ok()?;
    let device = u8::from_str_radix(parts.next()?, 16).ok()?;
    let function = u8::from_str_radix(function, 16).ok()?;
    parts
        .next()
        .is_none()
        .then_some((domain, bus, device, function))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn network_devices_are_in_pci_order() {
        let root = tempfile::tempdir().unwrap();
        let sysfs = root.path().join("bus/virtio/devices");
        fs::create_dir_all(&sysfs).unwrap();
        for (name, card, kind) in [
            ("virtio0", "0000:00:03.0", "0x0003"),
            ("virtio9", "0000:00:06.0", "0x0001"),
            ("virtio10", "0000:00:0a.0", "0x0001"),
            ("virtio2", "0000:01:00.0", "0x0001"),
            ("virtio4", "0000:00:05.0", "0x0001"),
        ] {
            let below = format!("devices/pci0000:00/{card}/{name}");
            fs::create_dir_all(root.path().join(&below)).unwrap();
            fs::write(root.path().join(&below).join("device"), format!("{kind}\n")).unwrap();
            symlink(format!("../../../{below}"), sysfs.join(name)).unwrap();
        }

        let found = network_devices(&sysfs).unwrap();

        assert_eq!(found, ["virtio4", "virtio9", "virtio10", "virtio2"]);
    }

    #[test]
    fn a_device_on_another_bus_has_no_place() {
        for path in [
            "../../../devices/platform/virtio-mmio.0/virtio0",
            "virtio0",
            "/",
        ] {
            assert_eq!(pci_address(Path::new(path)), None, "{path}");
        }
    }
}
