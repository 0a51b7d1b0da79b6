//! Signals by the names that people and images use.

/// All but the real-time ones, whose numbers are the same on every architecture that Hull runs on.
const NAMES: &[(&str, libc::c_int)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];
/// As a C library numbers them: the kernel's first two are its own.
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// The number of a signal: `TERM`, `SIGTERM`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
#[must_use]
pub fn parse(text: &str) -> Option<u32> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Ok(number) = name.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return u32::try_from(*number).ok();
    }
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => RTMIN,
        (Some(offset), _) => RTMIN.checked_add(offset.strip_prefix('+')?.parse().ok()?)?,
        (_, Some("")) => RTMAX,
        (_, Some(offset)) => RTMAX.checked_sub(offset.strip_prefix('-')?.parse().ok()?)?,
        (None, None) => return None,
    };
    (RTMIN..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_and_numbers() {
        assert_eq!(parse("TERM"), Some(15));
        assert_eq!(parse("sigkill"), Some(9));
        assert_eq!(parse("15"), Some(15));
        assert_eq!(parse("SIGRTMIN+3"), Some(37));
        assert_eq!(parse("RTMAX-1"), Some(63));
    }

    #[test]
    fn what_is_no_signal() {
        for text in ["", "0", "65", "SIG", "NOPE", "RTMIN+31", "RTMIN3", "-9"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
