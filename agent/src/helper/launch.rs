//! The last steps of a container's or exec's process before it becomes the program.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::unistd::{AccessFlags, access};
use oci_spec::runtime::{LinuxCapabilities, Spec};
use rustix::termios::tcsetwinsize;

use super::Reply;
use crate::container::seccomp::Program;
use crate::stdio::Size;

const NOT_FOUND: &str = "hull: program not found: ";
const NOT_EXECUTABLE: &str = "hull: program not executable: ";
/// Ends the program's name within a longer text.
const MARK: char = '\u{1}';

/// How the process becomes its program.
#[derive(Clone, Debug)]
pub struct Launch {
    exec: bool,
    limits: Limits,
    terminal_size: Option<Size>,
}

/// What the program may do.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    pub filter: Option<Program>,
    /// See [`super::Confinement::capabilities`].
    pub capabilities: Option<LinuxCapabilities>,
}

impl Launch {
    /// A container's first process.
    pub fn first(limits: Limits) -> Self {
        Self {
            exec: false,
            limits,
            terminal_size: None,
        }
    }

    pub fn exec(limits: Limits, terminal_size: Option<Size>) -> Self {
        Self {
            exec: true,
            limits,
            terminal_size,
        }
    }

    fn confine(&self) -> Result<(), String> {
        if let Some(filter) = &self.limits.filter {
            filter
                .load()
                .map_err(|error| format!("loading the seccomp filter: {error}"))?;
        }
        if let Some(wanted) = &self.limits.capabilities {
            capabilities::drop_privileges(wanted, create_syscall().as_ref())
                .map_err(|error| format!("dropping capabilities: {error}"))?;
        }
        Ok(())
    }
}

impl Executor for Launch {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let refuse = |text: String| Err(ExecutorValidationError::ArgValidationError(text));
        let Some(process) = spec.process() else {
            return refuse("the specification has no process".into());
        };
        let Some(program) = process.args().as_ref().and_then(|args| args.first()) else {
            return refuse("the process has no arguments".into());
        };
        let path = process
            .env()
            .iter()
            .flatten()
            .find_map(|entry| entry.strip_prefix("PATH="))
            .unwrap_or_default();
        match find(program, path) {
            // The last that is done before the container waits for its start: as libcontainer would.
            Found::Executable if !self.exec => self
                .confine()
                .map_err(ExecutorValidationError::ArgValidationError),
            Found::Executable => Ok(()),
            Found::Missing => refuse(format!("{NOT_FOUND}{program}{MARK}")),
            Found::NotExecutable => refuse(format!("{NOT_EXECUTABLE}{program}{MARK}")),
        }
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args: Vec<CString> = spec
            .process()
            .iter()
            .flat_map(|process| process.args().iter().flatten())
            .map(|arg| CString::new(arg.as_str()).map_err(|_| ExecutorError::InvalidArg))
            .collect::<Result<_, _>>()?;
        let program = args.first().ok_or(ExecutorError::InvalidArg)?;
        if let Some(size) = self.terminal_size {
            // A terminal that can't be resized is still a terminal.
            let _ = tcsetwinsize(rustix::stdio::stdin(), size.into());
        }
        // Rust's start-up ignores it, and a program inherits that.
        // SAFETY: the default action runs no code of ours.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
        if self.exec {
            self.confine().map_err(ExecutorError::Other)?;
        }

        let Err(errno) = nix::unistd::execvp(program, &args);
        if self.exec {
            return Err(ExecutorError::Other(format!(
                "executing {program:?}: {errno}"
            )));
        }
        // Nobody waits for a container's start to fail: say it where its output goes.
        eprintln!("hull: executing {program:?}: {errno}");
        std::process::exit(match errno {
            nix::errno::Errno::ENOENT => 127,
            _ => 126,
        });
    }

    fn setup_envs(
        &self,
        wanted: HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        for (name, _) in std::env::vars_os() {
            // SAFETY: the process has one thread.
            unsafe { std::env::remove_var(name) };
        }
        for (name, value) in &wanted {
            // set_var panics on these; no shell could make them either.
            if !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0') {
                // SAFETY: the process has one thread.
                unsafe { std::env::set_var(name, value) };
            }
        }
        Ok(())
    }
}

enum Found {
    Executable,
    NotExecutable,
    Missing,
}

/// Looks a program up as execvp will.
fn find(program: &str, path: &str) -> Found {
    let candidates: Vec<PathBuf> = if program.contains('/') {
        vec![PathBuf::from(program)]
    } else {
        path.split(':')
            .map(|directory| match directory {
                "" => Path::new(".").join(program),
                _ => Path::new(directory).join(program),
            })
            .collect()
    };
    let mut found = Found::Missing;
    for candidate in candidates {
        let Ok(metadata) = candidate.metadata() else {
            continue;
        };
        if metadata.is_file() && access(&candidate, AccessFlags::X_OK).is_ok() {
            return Found::Executable;
        }
        found = Found::NotExecutable;
    }
    found
}

/// The reply for a failure that [`Launch::validate`] caused.
pub fn refusal(text: &str) -> Option<Reply> {
    let program = |prefix: &str| {
        let (_, rest) = text.split_once(prefix)?;
        let (program, _) = rest.split_once(MARK)?;
        Some(program.to_owned())
    };
    program(NOT_FOUND)
        .map(|program| Reply::NotFound { program })
        .or_else(|| program(NOT_EXECUTABLE).map(|program| Reply::NotExecutable { program }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_being_wrapped() {
        let text = format!("creating: x: {NOT_FOUND}/bin/no such{MARK}, and more");
        let reply = refusal(&text);
        assert!(matches!(reply, Some(Reply::NotFound { program }) if program == "/bin/no such"));
        assert!(refusal("mounting /proc: EPERM").is_none());
    }

    #[test]
    fn programs_are_found_by_path_and_by_name() {
        assert!(matches!(find("sh", "/nowhere:/bin"), Found::Executable));
        assert!(matches!(find("/bin/sh", ""), Found::Executable));
        assert!(matches!(find("sh", "/nowhere"), Found::Missing));
        assert!(matches!(find("/etc/passwd", ""), Found::NotExecutable));
        assert!(matches!(find("/etc", ""), Found::NotExecutable));
    }
}
