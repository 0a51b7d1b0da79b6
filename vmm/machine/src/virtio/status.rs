//! The device status field: which steps a driver may take, and in what order (Virtio 1.2, section 2.1).

/// The driver has seen the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive it.
pub const DRIVER: u8 = 2;
/// The driver is set up.
pub const DRIVER_OK: u8 = 4;
/// The driver has said which features it takes.
pub const FEATURES_OK: u8 = 8;
/// The device can't go on without a reset.
pub const NEEDS_RESET: u8 = 0x40;
/// The driver has given up.
pub const FAILED: u8 = 0x80;

/// What a write to the status register asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, or nothing that is allowed now.
    None,
    Reset,
    Acknowledge,
    Driver,
    /// To be granted only if the features are acceptable.
    FeaturesOk,
    /// To be granted only if the queues are acceptable.
    DriverOk,
    Failed,
}

/// The step from `current` that a driver asks for by writing `written`.
///
/// A driver adds one bit at a time, in order; it clears none but all (section 2.1.1).
pub fn step(current: u8, written: u8) -> Step {
    if written == 0 {
        return Step::Reset;
    }
    // NEEDS_RESET is the device's: a driver that writes it, or doesn't, means nothing by it.
    let current_driver = current & !NEEDS_RESET;
    let written = written & !NEEDS_RESET;
    if current_driver & !written != 0 {
        return Step::None;
    }
    let added = written & !current_driver;
    if added & FAILED != 0 {
        return Step::Failed;
    }
    if current & (NEEDS_RESET | FAILED) != 0 {
        return Step::None;
    }
    match (current_driver, added) {
        (0, ACKNOWLEDGE) => Step::Acknowledge,
        (ACKNOWLEDGE, DRIVER) => Step::Driver,
        (current, FEATURES_OK) if current == ACKNOWLEDGE | DRIVER => Step::FeaturesOk,
        (current, DRIVER_OK) if current == ACKNOWLEDGE | DRIVER | FEATURES_OK => Step::DriverOk,
        _ => Step::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_a_good_driver_are_allowed() {
        assert_eq!(step(0, 1), Step::Acknowledge);
        assert_eq!(step(1, 3), Step::Driver);
        assert_eq!(step(3, 11), Step::FeaturesOk);
        assert_eq!(step(11, 15), Step::DriverOk);
        assert_eq!(step(15, 0), Step::Reset);
    }

    #[test]
    fn steps_left_out_or_taken_back_are_not() {
        assert_eq!(step(0, 15), Step::None);
        assert_eq!(step(3, 7), Step::None);
        assert_eq!(step(15, 11), Step::None);
        assert_eq!(step(15, 15), Step::None);
    }

    #[test]
    fn a_device_that_needs_a_reset_takes_nothing_else_but_failure() {
        assert_eq!(step(11 | NEEDS_RESET, 15), Step::None);
        assert_eq!(step(11 | NEEDS_RESET, 11 | FAILED), Step::Failed);
        assert_eq!(step(11 | NEEDS_RESET, 0), Step::Reset);
    }
}
