//! What a process that waits beside its pod for days needs of memory.

use std::ffi::c_void;
use std::fs;

use rustix::mm::{Advice, madvise};

/// Unmaps the program's code, of which a start has touched most; what is run again is mapped again from the page
/// cache, a few pages at a time. The kernel then sees which of it is used at all.
pub fn shrink() {
    let maps = match fs::read_to_string("/proc/self/maps") {
        Ok(maps) => maps,
        Err(error) => {
            tracing::debug!(%error, "reading /proc/self/maps");
            return;
        }
    };
    for (start, length) in maps.lines().filter_map(code) {
        let start = std::ptr::with_exposed_provenance_mut::<c_void>(start);
        // SAFETY: a private mapping of a file that nobody can write to, neither there (the mapping is not writable) nor
        // in the file (ETXTBSY): the pages that come back are the same.
        let unmapped = unsafe { madvise(start, length, Advice::LinuxDontNeed) };
        if let Err(error) = unmapped {
            tracing::debug!(%error, "unmapping code");
        }
    }
}

/// Where a line of `/proc/PID/maps` (`proc_pid_maps(5)`) has a program's code, and how many bytes.
fn code(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let file = fields.nth(3)?;
    let address = |hex| usize::from_str_radix(hex, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    (permissions == "r-xp" && file.starts_with('/')).then_some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_what_is_executable_and_of_a_file() {
        let line = |permissions, file| {
            format!("7fb043a7e000-7fb0444b5000 {permissions} 0027e000 fe:00 1234 {file}")
        };
        assert_eq!(
            code(&line("r-xp", "/usr/bin/hull")),
            Some((0x7fb0_43a7_e000, 0xa3_7000))
        );
        for other in [
            line("r--p", "/usr/bin/hull"),
            line("rwxp", "/usr/bin/hull"),
            line("r-xp", "[vdso]"),
            line("r-xp", ""),
            "7fb043a7e000 r-xp".to_owned(),
            String::new(),
        ] {
            assert_eq!(code(&other), None, "{other}");
        }
    }

    #[test]
    fn a_program_goes_on_without_its_pages() {
        shrink();
        assert!(
            fs::read_to_string("/proc/self/maps")
                .is_ok_and(|maps| maps.lines().any(|line| code(line).is_some()))
        );
    }
}
