//! The supervisor's side: a share, and a machine that is launched on it.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hull_machine::client::{Machine, MachineSpec};
use hull_machine::config::CachePolicy;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use tokio::runtime::Runtime;

/// Mounts made from here on are this process's own, as a supervisor's are.
pub fn own_mounts() {
    // SAFETY: the process has one thread, and nothing in it keeps a path across this.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
}

/// A directory as a pod's share root: a shared mount.
pub struct Share {
    directory: tempfile::TempDir,
}

impl Share {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        rustix::mount::mount(
            "tmpfs",
            path,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            None,
        )
        .unwrap();
        rustix::mount::mount_change(path, MountPropagationFlags::SHARED).unwrap();
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), UnmountFlags::DETACH);
    }
}

/// A launched machine, and all that it needs to go on.
pub struct Launched {
    pub runtime: Runtime,
    pub machine: Option<Machine>,
    pub share: Share,
    console: PipeReader,
}

impl Launched {
    pub fn machine(&self) -> &Machine {
        self.machine.as_ref().unwrap()
    }

    /// A file of the machine's in /proc.
    pub fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc")
            .join(self.machine().pid().to_string())
            .join(name)
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.proc(name)).unwrap()
    }

    /// What the guest has written so far, if it has written anything.
    pub fn console(&mut self) -> String {
        rustix::io::ioctl_fionbio(&self.console, true).unwrap();
        let mut text = Vec::new();
        // It ends with "would block".
        let _ = self.console.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The `status` of each thread, with its name first.
    pub fn threads(&self) -> Vec<(String, String)> {
        std::fs::read_dir(self.proc("task"))
            .unwrap()
            .map(|task| {
                let task = task.unwrap().path();
                let name = std::fs::read_to_string(task.join("comm")).unwrap();
                let status = std::fs::read_to_string(task.join("status")).unwrap();
                (name.trim().to_owned(), status)
            })
            .collect()
    }
}

/// A jailed process without a machine.
pub fn launch() -> Launched {
    let null = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap()
    };
    launch_with(&std::env::current_exe().unwrap(), |console| {
        MachineSpec::new(null(), null(), console)
    })
}

pub fn launch_with(binary: &Path, spec: impl FnOnce(OwnedFd) -> MachineSpec) -> Launched {
    let share = Share::new();
    let (console, output) = std::io::pipe().unwrap();
    let spec = spec(output.into()).share("hull", open_root(share.path()), false, CachePolicy::Auto);
    let runtime = Runtime::new().unwrap();
    let (machine, _connections) = runtime.block_on(Machine::launch(binary, spec)).unwrap();
    Launched {
        runtime,
        machine: Some(machine),
        share,
        console,
    }
}

fn open_root(path: &Path) -> OwnedFd {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).unwrap()
}

/// A supervisor that prints its machine's pid and waits to be killed.
pub fn run(share: &str) -> ExitCode {
    let null = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap()
    };
    let spec = MachineSpec::new(null(), null(), null()).share(
        "hull",
        open_root(Path::new(share)),
        false,
        CachePolicy::Auto,
    );
    let runtime = Runtime::new().unwrap();
    let binary = std::env::current_exe().unwrap();
    runtime.block_on(async {
        let (machine, _connections) = Machine::launch(&binary, spec).await.unwrap();
        println!("{}", machine.pid());
        machine.wait().await;
    });
    ExitCode::FAILURE
}
