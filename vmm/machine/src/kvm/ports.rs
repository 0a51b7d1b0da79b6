//! The I/O ports of the machine, all of them: sleep, reset, and word of a panic.

use crate::boot::acpi::S5_SLEEP_TYPE;
use crate::control::ExitReason;
use crate::layout::{
    ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT,
    PVPANIC_PORT,
};

/// `SLP_TYPx` and `SLP_EN` of the sleep control register (ACPI 6.5, table 4.21).
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The guest has panicked; the only event of pvpanic that this machine knows.
const PANICKED: u8 = 1 << 0;

/// Reads a port. Where nothing is, the bus floats high.
pub fn read(port: u16, data: &mut [u8]) {
    data.fill(match port {
        ACPI_SLEEP_CONTROL_PORT | ACPI_SLEEP_STATUS_PORT | ACPI_RESET_PORT => 0,
        // Which events can be told.
        PVPANIC_PORT => PANICKED,
        _ => 0xFF,
    });
}

/// Writes a port; the machine's end, if that is what it means.
pub fn write(port: u16, data: &[u8]) -> Option<ExitReason> {
    let value = *data.first()?;
    match port {
        ACPI_SLEEP_CONTROL_PORT => {
            let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            let off = value & SLEEP_ENABLE != 0 && sleep_type == S5_SLEEP_TYPE;
            off.then_some(ExitReason::PowerOff)
        }
        ACPI_RESET_PORT => (value == ACPI_RESET_VALUE).then_some(ExitReason::Reset),
        PVPANIC_PORT => (value & PANICKED != 0).then_some(ExitReason::Panic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s5_powers_off_and_no_other_sleep_does() {
        assert_eq!(write(0x600, &[0x34]), Some(ExitReason::PowerOff));
        for value in [0, 0x14, 0x20, 0x30, 0x38] {
            assert_eq!(write(0x600, &[value]), None);
        }
    }

    #[test]
    fn the_reset_value_resets() {
        assert_eq!(write(0x602, &[1]), Some(ExitReason::Reset));
        assert_eq!(write(0x602, &[0]), None);
    }

    #[test]
    fn pvpanic_tells_of_a_panic_only() {
        let mut events = [0];

        read(0x505, &mut events);

        assert_eq!(events, [1]);
        assert_eq!(write(0x505, &[1]), Some(ExitReason::Panic));
        assert_eq!(write(0x505, &[2]), None);
    }

    /// CVE-2015-3456: a device that nobody used was there all the same.
    #[test]
    fn cve_2015_3456_no_other_port_is_there() {
        let there: Vec<u16> = (0..=u16::MAX)
            .filter(|port| {
                let mut data = [0];
                read(*port, &mut data);
                data != [0xFF] || (0..=u8::MAX).any(|value| write(*port, &[value]).is_some())
            })
            .collect();

        assert_eq!(there, [0x505, 0x600, 0x601, 0x602]);
    }

    #[test]
    fn an_empty_access_does_nothing() {
        read(0x505, &mut []);
        assert_eq!(write(0x600, &[]), None);
    }
}
