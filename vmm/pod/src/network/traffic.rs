//! What has gone through the taps of a namespace.

use std::fs;

use super::{Doing, Namespace, Result, tap};
use crate::metrics::InterfaceMetrics;

/// The calling thread's namespace's (proc_pid_net(5)).
const FILE: &str = "/proc/thread-self/net/dev";
/// More taps than a pod can have are not its own.
const MAX: usize = 64;

/// Counts what the guest has sent and received, by tap. Blocks for a moment.
///
/// # Errors
/// [`super::WiringError::Namespace`] if it can't be entered.
pub fn traffic(namespace: &Namespace) -> Result<Vec<InterfaceMetrics>> {
    let text = namespace.run(|| fs::read_to_string(FILE).doing("counting its traffic"))?;
    Ok(text.lines().filter_map(counted).take(MAX).collect())
}

/// A line is `NAME: ` and 8 numbers of what was received, then 8 of what was sent; what a tap receives the guest has
/// sent.
fn counted(line: &str) -> Option<InterfaceMetrics> {
    let (name, numbers) = line.split_once(':')?;
    let name = name.trim();
    if !tap::is_ours(name) {
        return None;
    }
    let numbers: Vec<u64> = numbers
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    Some(InterfaceMetrics {
        tap: name.into(),
        sent_bytes: *numbers.first()?,
        sent_packets: *numbers.get(1)?,
        received_bytes: *numbers.get(8)?,
        received_packets: *numbers.get(9)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_counts_the_other_way_round() {
        let line = " hull0: 100 2 0 0 0 0 0 0 3000 4 0 0 0 0 0 0";

        let counted = counted(line).unwrap();

        assert_eq!((counted.sent_bytes, counted.sent_packets), (100, 2));
        assert_eq!(
            (counted.received_bytes, counted.received_packets),
            (3000, 4)
        );
    }

    #[test]
    fn other_interfaces_are_not_the_machines() {
        let namespace = Namespace::create().unwrap();

        assert_eq!(traffic(&namespace).unwrap(), []);
        assert_eq!(counted("eth0: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0"), None);
        assert_eq!(counted("hull0: 1"), None);
    }
}
