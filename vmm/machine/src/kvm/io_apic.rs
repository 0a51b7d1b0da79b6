//! The one interrupt that is no device's message: an IOAPIC with a single pin, for ACPI's events.
//!
//! Intel 82093AA, as far as an edge-triggered pin goes: what its redirection entry says is a message to a local APIC,
//! and a line carries it as it does those of MSI-X. Nothing is to be told of an interrupt's end.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::layout::{IOAPIC, IOAPIC_SIZE, LOCAL_APIC};
use crate::pci::platform::{MsiLine, MsiMessage, Platform};

/// Registers in memory (section 3.1): which one is meant, and its content.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
/// Registers by number (section 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const ENTRY_LOW: u8 = 0x10;
const ENTRY_HIGH: u8 = 0x11;
/// Of the 82093AA, with a last entry 0.
const VERSION_82093AA: u32 = 0x11;
const ID_BITS: u32 = 0xF << 24;

/// What of an entry can be written (section 3.2.4): vector, modes of delivery and destination, polarity, trigger and
/// mask; and the destination. Delivery status and remote IRR stay clear.
const WRITABLE: u64 = 0xFF << 56 | 0x1_AFFF;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// Bits 0 to 10 of an entry are those of a message's data: vector and delivery mode.
const MESSAGE_DATA: u64 = 0x7FF;
const LOGICAL: u64 = 1 << 11;
/// In a message's address (Intel SDM, volume 3, section 11.11.1).
const MESSAGE_DESTINATION_SHIFT: u32 = 12;
const MESSAGE_LOGICAL: u64 = 1 << 2;

/// An IOAPIC of one pin.
#[derive(Debug)]
pub struct IoApic {
    line: Arc<dyn MsiLine>,
    registers: Mutex<IoApicState>,
}

/// Its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    selected: u8,
    id: u32,
    entry: u64,
}

impl IoApic {
    /// As after a reset: the pin is masked.
    ///
    /// # Errors
    /// When the platform has no line for it.
    pub fn new(platform: &dyn Platform) -> io::Result<Self> {
        Ok(Self {
            line: platform.msi_line()?,
            registers: Mutex::default(),
        })
    }

    /// Raises the pin for a moment. While it is masked that is kept.
    ///
    /// # Errors
    /// When the line is broken.
    pub fn pulse(&self) -> io::Result<()> {
        self.line.signal()
    }

    /// Its registers. The processors don't run.
    #[must_use]
    pub fn state(&self) -> IoApicState {
        *self.lock()
    }

    /// Has registers of before, as if the guest had written them.
    pub fn restore(&self, state: IoApicState) {
        let mut registers = self.lock();
        registers.selected = state.selected;
        registers.id = state.id & ID_BITS;
        self.set_entry(&mut registers, state.entry);
    }

    /// Fills `data` if the address is its own. Reads are of 32 bits; others give zeroes.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some(register) = register(address) else {
            return false;
        };
        let registers = self.lock();
        let value = match register {
            SELECT => registers.selected.into(),
            WINDOW => registers.read(),
            _ => 0,
        };
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(data) => *data = value.to_le_bytes(),
            Err(_) => data.fill(0),
        }
        true
    }

    /// Takes `data` if the address is its own. Writes are of 32 bits; others do nothing.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some(register) = register(address) else {
            return false;
        };
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return true;
        };
        let value = u32::from_le_bytes(data);
        let mut registers = self.lock();
        match (register, registers.selected) {
            (SELECT, _) => registers.selected = data[0],
            (WINDOW, ID) => registers.id = value & ID_BITS,
            (WINDOW, ENTRY_LOW) => {
                let entry = registers.entry >> 32 << 32 | u64::from(value);
                self.set_entry(&mut registers, entry);
            }
            (WINDOW, ENTRY_HIGH) => {
                let entry = registers.entry & u64::from(u32::MAX) | u64::from(value) << 32;
                self.set_entry(&mut registers, entry);
            }
            _ => {}
        }
        true
    }

    fn set_entry(&self, registers: &mut IoApicState, entry: u64) {
        let entry = entry & WRITABLE;
        registers.entry = entry;
        let result = if entry & MASKED == 0 {
            self.line.connect(message(entry))
        } else {
            self.line.disconnect()
        };
        if let Err(error) = result {
            log::warn!("the guest's interrupt of ACPI goes nowhere: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for IoApicState {
    fn default() -> Self {
        Self {
            selected: 0,
            id: 0,
            entry: MASKED,
        }
    }
}

impl IoApicState {
    #[expect(clippy::cast_possible_truncation, reason = "a half of the entry")]
    fn read(&self) -> u32 {
        match self.selected {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_82093AA,
            ENTRY_LOW => self.entry as u32,
            ENTRY_HIGH => (self.entry >> 32) as u32,
            _ => 0,
        }
    }
}

/// The register at an address. None: another's.
fn register(address: u64) -> Option<u64> {
    let offset = address.checked_sub(IOAPIC)?;
    (offset < IOAPIC_SIZE).then_some(offset)
}

fn message(entry: u64) -> MsiMessage {
    let destination = entry >> DESTINATION_SHIFT;
    let logical = if entry & LOGICAL == 0 {
        0
    } else {
        MESSAGE_LOGICAL
    };
    MsiMessage {
        address: LOCAL_APIC | destination << MESSAGE_DESTINATION_SHIFT | logical,
        data: (entry & MESSAGE_DATA) as u32,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[derive(Debug, Default)]
    struct Line {
        connected: Mutex<Option<MsiMessage>>,
    }

    impl MsiLine for Line {
        fn connect(&self, message: MsiMessage) -> io::Result<()> {
            *self.connected.lock().unwrap() = Some(message);
            Ok(())
        }
        fn disconnect(&self) -> io::Result<()> {
            *self.connected.lock().unwrap() = None;
            Ok(())
        }
        fn signal(&self) -> io::Result<()> {
            Ok(())
        }
        fn is_pending(&self) -> bool {
            false
        }
        fn clear(&self) {}
    }

    #[derive(Debug, Default)]
    struct Hypervisor(Arc<Line>);

    impl Platform for Hypervisor {
        fn msi_line(&self) -> io::Result<Arc<dyn MsiLine>> {
            Ok(Arc::clone(&self.0) as Arc<dyn MsiLine>)
        }
        fn attach_doorbell(&self, _: u64, _: &EventFd) -> io::Result<()> {
            Ok(())
        }
        fn detach_doorbell(&self, _: u64, _: &EventFd) -> io::Result<()> {
            Ok(())
        }
        fn hold(&self) {}
        fn connect_held(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn io_apic() -> (Arc<Line>, IoApic) {
        let hypervisor = Hypervisor::default();
        (Arc::clone(&hypervisor.0), IoApic::new(&hypervisor).unwrap())
    }

    fn set(io_apic: &IoApic, register: u8, value: u32) {
        assert!(io_apic.write(IOAPIC, &u32::from(register).to_le_bytes()));
        assert!(io_apic.write(IOAPIC + 0x10, &value.to_le_bytes()));
    }

    fn get(io_apic: &IoApic, register: u8) -> u32 {
        assert!(io_apic.write(IOAPIC, &u32::from(register).to_le_bytes()));
        let mut data = [0; 4];
        assert!(io_apic.read(IOAPIC + 0x10, &mut data));
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_entry_that_is_not_masked_is_a_message() {
        let (line, io_apic) = io_apic();
        assert_eq!(get(&io_apic, VERSION), 0x11);
        assert_eq!(get(&io_apic, ENTRY_LOW), 0x1_0000);

        set(&io_apic, ENTRY_HIGH, 0x0300_0000);
        assert_eq!(*line.connected.lock().unwrap(), None);
        set(&io_apic, ENTRY_LOW, 0x0931);

        let message = MsiMessage {
            address: 0xFEE0_3004,
            data: 0x131,
        };
        assert_eq!(*line.connected.lock().unwrap(), Some(message));
        set(&io_apic, ENTRY_LOW, 0x1_0931);
        assert_eq!(*line.connected.lock().unwrap(), None);
    }

    #[test]
    fn a_state_is_as_the_guest_had_written_it() {
        let (_, one) = io_apic();
        set(&one, ENTRY_HIGH, 0x0300_0000);
        set(&one, ENTRY_LOW, 0x0031);
        let (line, other) = io_apic();

        other.restore(one.state());

        assert_eq!(one.state(), other.state());
        assert!(line.connected.lock().unwrap().is_some());
    }

    proptest! {
        #[test]
        fn no_access_is_of_more_than_the_page_and_none_fails(
            offset in 0..2 * IOAPIC_SIZE,
            selected: u8,
            data in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let (_, io_apic) = io_apic();
            let address = IOAPIC - IOAPIC_SIZE / 2 + offset;
            let there = (IOAPIC..IOAPIC + IOAPIC_SIZE).contains(&address);
            let mut read = data.clone();

            io_apic.write(IOAPIC, &u32::from(selected).to_le_bytes());

            prop_assert_eq!(io_apic.write(address, &data), there);
            prop_assert_eq!(io_apic.read(address, &mut read), there);
            prop_assert_eq!(io_apic.state().entry & !WRITABLE, 0);
        }
    }
}
