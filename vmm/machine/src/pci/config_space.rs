//! The configuration space of one function: bytes, and which bits of them the guest may write.

/// Size of the part that this machine has; the extended part reads as zero (no capabilities).
const SIZE: usize = 256;
/// Capabilities start after the type 0 header.
const FIRST_CAPABILITY: u8 = 0x40;

/// Offsets in a type 0 header (PCI Local Bus 3.0, section 6.1).
pub mod header {
    pub const VENDOR_ID: u8 = 0x00;
    pub const DEVICE_ID: u8 = 0x02;
    pub const COMMAND: u8 = 0x04;
    pub const STATUS: u8 = 0x06;
    pub const REVISION: u8 = 0x08;
    pub const CLASS: u8 = 0x09;
    pub const BAR0: u8 = 0x10;
    pub const SUBSYSTEM_VENDOR_ID: u8 = 0x2c;
    pub const SUBSYSTEM_ID: u8 = 0x2e;
    pub const CAPABILITIES: u8 = 0x34;
    pub const INTERRUPT_LINE: u8 = 0x3c;
}

/// Command register: the function decodes memory accesses to its BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: no INTx, which no function here has.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    /// Base class, subclass and interface, as in `0x06_00_00`.
    pub class: u32,
    pub revision: u8,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// A type 0 configuration space.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// A bit that is set here can be written by the guest.
    writable: [u8; SIZE],
    /// Where the pointer to the next capability is to be put.
    link: u8,
    /// Where the next capability is to be put.
    free: u8,
}

impl ConfigSpace {
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            link: header::CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        space.set(header::VENDOR_ID, &identity.vendor.to_le_bytes());
        space.set(header::DEVICE_ID, &identity.device.to_le_bytes());
        space.set(header::REVISION, &[identity.revision]);
        let [interface, subclass, class, _] = identity.class.to_le_bytes();
        space.set(header::CLASS, &[interface, subclass, class]);
        space.set(
            header::SUBSYSTEM_VENDOR_ID,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        space.set(header::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.allow(header::COMMAND, &command.to_le_bytes());
        // Software's own note (section 6.2.4), with no meaning to the function.
        space.allow(header::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Makes BAR 0 a 32-bit memory window of `size` bytes, a power of two of at least 16, at `address`.
    pub fn set_bar0(&mut self, address: u32, size: u32) {
        self.set(header::BAR0, &address.to_le_bytes());
        // Only address bits can be written, which is how the guest finds the size (section 6.2.5.1).
        let mask = size.wrapping_neg();
        self.allow(header::BAR0, &mask.to_le_bytes());
    }

    /// Appends a capability: its id, `body` after the two header bytes, and which bits of
    /// the body can be written. `None` when there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u8> {
        let offset = self.free;
        let length = u8::try_from(body.len()).ok()?.checked_add(2)?;
        // Capabilities are aligned to four bytes (section 6.7).
        let free = offset.checked_add(length)?.checked_next_multiple_of(4)?;
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.set(self.link, &[offset]);
        self.link = offset + 1;
        self.free = free;
        self.set(header::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        Some(offset)
    }

    pub fn u16(&self, offset: u8) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub fn u32(&self, offset: u8) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// A guest's read. What is unaligned or no 1, 2 or 4 bytes reads as ones, what is not there as zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        if !natural(offset, data.len()) {
            data.fill(0xff);
            return;
        }
        let start = usize::from(offset);
        match self.bytes.get(start..start + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }

    /// A guest's write. What is unaligned, of another size, or not writable is ignored.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if !natural(offset, data.len()) {
            return;
        }
        let start = usize::from(offset);
        let Some(bytes) = self.bytes.get_mut(start..start + data.len()) else {
            return;
        };
        let writable = &self.writable[start..start + data.len()];
        for ((byte, mask), new) in bytes.iter_mut().zip(writable).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes from `bytes` what a guest can have written.
    pub fn restore(&mut self, bytes: &[u8]) {
        for ((byte, mask), new) in self.bytes.iter_mut().zip(&self.writable).zip(bytes) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    fn set(&mut self, offset: u8, data: &[u8]) {
        let start = usize::from(offset);
        self.bytes[start..start + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, offset: u8, mask: &[u8]) {
        let start = usize::from(offset);
        self.writable[start..start + mask.len()].copy_from_slice(mask);
    }
}

/// Whether an access has a size that configuration space knows, and is aligned to it.
pub fn natural(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(offset).is_multiple_of(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1044,
        class: 0xff_00_00,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.set_bar0(0xC000_0000, 0x8000);
        space
    }

    fn read32(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_is_where_the_header_has_it() {
        let space = space();

        assert_eq!(read32(&space, 0x00), 0x1044_1af4);
        assert_eq!(read32(&space, 0x08), 0xff00_0001);
        assert_eq!(read32(&space, 0x2c), 0x0040_1af4);
    }

    #[test]
    fn a_bar_tells_its_size_to_a_guest_that_writes_ones() {
        let mut space = space();

        space.write(0x10, &[0xff; 4]);

        assert_eq!(read32(&space, 0x10), 0xffff_8000);
    }

    #[test]
    fn capabilities_are_linked_and_aligned() {
        let mut space = space();

        let first = space.add_capability(9, &[14; 15], &[]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[]).unwrap();

        assert_eq!((first, second), (0x40, 0x54));
        assert_eq!(read32(&space, 0x34) & 0xff, 0x40);
        assert_eq!(read32(&space, 0x40) & 0xffff, 0x5409);
        assert_eq!(read32(&space, 0x54) & 0xffff, 0x0011);
        assert_eq!(space.u16(header::STATUS), STATUS_CAPABILITIES);
    }

    #[test]
    fn a_capability_too_many_is_refused() {
        let mut space = space();

        let added = (0..20)
            .filter_map(|_| space.add_capability(9, &[0; 14], &[]))
            .count();

        assert_eq!(added, 11);
    }

    proptest! {
        #[test]
        fn writes_change_nothing_but_writable_bits(
            writes in prop::collection::vec(
                (0u16..4200, prop::collection::vec(any::<u8>(), 0..9)), 0..64),
        ) {
            let mut space = space();
            let before = space.bytes;

            for (offset, data) in &writes {
                space.write(*offset, data);
                let mut data = data.clone();
                space.read(*offset, &mut data);
            }

            let fixed = |bytes: &[u8; SIZE]| -> Vec<u8> {
                bytes.iter().zip(&space.writable).map(|(byte, mask)| byte & !mask).collect()
            };
            prop_assert_eq!(fixed(&space.bytes), fixed(&before));
        }
    }
}
