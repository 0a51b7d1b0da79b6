//! From the kernel's start of /init to a machine that containers can run in.

use std::ffi::CStr;
use std::fs::{self, File};

use rustix::mount::{MountFlags, mount, mount_move, mount_remount};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::container::cgroup;
use crate::error::{Doing, Error, Result};
use crate::growth;
use crate::modules;

/// The root that containers can be pivoted away from.
const ROOT: &str = "/root";

/// Makes the machine ready. The calling process is process 1, in the initramfs.
pub fn boot() -> Result<()> {
    make_directory(ROOT)?;
    mount_at(
        "tmpfs",
        ROOT,
        "tmpfs",
        MountFlags::NODEV,
        Some(c"mode=755,size=64m"),
    )?;
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    for (source, name, kind, flags, options) in [
        ("proc", "proc", "proc", quiet | MountFlags::NODEV, None),
        ("sysfs", "sys", "sysfs", quiet | MountFlags::NODEV, None),
        ("devtmpfs", "dev", "devtmpfs", quiet, Some(c"mode=755")),
        (
            "tmpfs",
            "run",
            "tmpfs",
            quiet | MountFlags::NODEV,
            Some(c"mode=755,size=50%"),
        ),
    ] {
        let target = format!("{ROOT}/{name}");
        make_directory(&target)?;
        mount_at(source, &target, kind, flags, options)?;
    }
    let has_console = use_console();
    modules::load_at_start()?;
    if !has_console {
        // Its driver was among them. Without any the agent works all the same, only silently.
        use_console();
    }
    modules::keep_on_demand(ROOT)?;
    enter_root()?;
    modules::serve_requests()?;

    for (name, kind, flags, options) in [
        (
            "/dev/pts",
            "devpts",
            quiet,
            Some(c"newinstance,ptmxmode=0666,mode=620"),
        ),
        (
            "/dev/shm",
            "tmpfs",
            quiet | MountFlags::NODEV,
            Some(c"mode=1777"),
        ),
        (cgroup::MOUNT, "cgroup2", quiet | MountFlags::NODEV, None),
    ] {
        make_directory(name)?;
        mount_at(kind, name, kind, flags, options)?;
    }
    cgroup::set_up()?;
    growth::take_memory_that_comes()?;
    raise_limits()
}

fn make_directory(path: &str) -> Result<()> {
    fs::create_dir_all(path).doing(|| format!("making {path}"))
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: Option<&CStr>,
) -> Result<()> {
    mount(source, target, kind, flags, options).doing(|| format!("mounting {target}"))
}

/// Standard output goes to the console, also when the kernel could not open it for us.
fn use_console() -> bool {
    let path = format!("{ROOT}/dev/console");
    let Ok(console) = File::options().read(true).write(true).open(path) else {
        return false;
    };
    let to_console = rustix::stdio::dup2_stdin(&console)
        .and_then(|()| rustix::stdio::dup2_stdout(&console))
        .and_then(|()| rustix::stdio::dup2_stderr(&console));
    to_console.is_ok()
}

/// Leaves the initramfs, from which nothing can be pivoted away. It stays below, read
/// only and out of reach: processes run from its copy of this program, and not even
/// /proc/PID/exe lets anybody write to it (CVE-2019-5736).
fn enter_root() -> Result<()> {
    let flags = MountFlags::RDONLY;
    mount_remount("/", flags, c"")
        .or_else(|_| mount_remount("/", flags | MountFlags::BIND, c""))
        .doing(|| "making the initramfs read-only".into())?;
    rustix::process::chdir(ROOT).doing(|| "entering the root".into())?;
    mount_move(".", "/").doing(|| "moving the root".into())?;
    rustix::process::chroot(".").doing(|| "entering the root".into())?;
    rustix::process::chdir("/").doing(|| "entering the root".into())
}

/// The kernel gives process 1 a bound of 4096 descriptors, and containers inherit it.
fn raise_limits() -> Result<()> {
    let limit = Rlimit {
        current: Some(65_536),
        maximum: Some(1_048_576),
    };
    setrlimit(Resource::Nofile, limit).doing(|| "raising the limit on descriptors".into())
}

/// Powers the machine off. Does not return.
pub fn power_off() -> ! {
    rustix::fs::sync();
    let error = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    // A machine that can't power off ends as a crashed one.
    panic!("powering off: {error:?}");
}

/// An error of the start, as the console shows it.
pub fn report(error: &Error) {
    eprintln!("hull-agent: {error}");
}
