//! The machine's whole firmware: at the BIOS's entry point, code that resets.
//!
//! With hardware-reduced ACPI, Linux reboots by EFI's service and, where there is none, by a jump to
//! the BIOS in real mode (`native_machine_emergency_restart`), and never tries ACPI's reset register.

use vm_memory::{Bytes, GuestAddress};

use crate::layout::{ACPI_RESET_PORT, ACPI_RESET_VALUE, BIOS_ENTRY};
use crate::memory::GuestRam;

/// Writes the code to [`BIOS_ENTRY`].
///
/// # Errors
/// When there is no RAM.
pub fn write(memory: &GuestRam) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&code(), GuestAddress(BIOS_ENTRY))
}

fn code() -> [u8; 9] {
    let [port_low, port_high] = ACPI_RESET_PORT.to_le_bytes();
    [
        0xBA,
        port_low,
        port_high, // mov dx, ACPI_RESET_PORT
        0xB0,
        ACPI_RESET_VALUE, // mov al, ACPI_RESET_VALUE
        0xEE,             // out dx, al
        0xF4,             // again: hlt
        0xEB,
        0xFD, // jmp again
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{ACPI_END, ACPI_START};
    use crate::memory;

    #[test]
    fn the_code_fits_in_the_reserved_area() {
        let memory = memory::allocate(64).unwrap();
        let mut written = code();
        written.fill(0);

        write(&memory).unwrap();

        memory
            .read_slice(&mut written, GuestAddress(BIOS_ENTRY))
            .unwrap();
        assert_eq!(written, code());
        assert!(ACPI_START < BIOS_ENTRY && BIOS_ENTRY + (code().len() as u64) < ACPI_END);
    }
}
