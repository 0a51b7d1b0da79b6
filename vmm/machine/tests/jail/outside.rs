//! The tests: each launches a jailed process and looks at it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_machine::channel::{ChannelError, MAX_DESCRIPTORS};
use hull_machine::client::{ConnectError, LaunchError, Machine, MachineSpec};
use hull_machine::config::CachePolicy;
use hull_machine::control::ExitReason;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::inmate::Deed;
use super::supervisor::{Launched, Share, launch, launch_with};

/// Generous: an emulated machine takes its time.
const PATIENCE: Duration = Duration::from_secs(300);

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP (capabilities(7)).
const FILE_SERVER: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

const SIGSYS: i32 = 31;

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.strip_prefix(':')).unwrap().trim()
}

fn capabilities(status: &str, set: &str) -> u64 {
    u64::from_str_radix(field(status, set), 16).unwrap()
}

fn assert_filters(launched: &Launched) {
    for (name, status) in launched.threads() {
        assert_eq!(field(&status, "Seccomp"), "2", "{name}");
        assert_eq!(field(&status, "NoNewPrivs"), "1", "{name}");
    }
}

/// Threads that serve files, and the one that makes them, have what they need of it; no other has any.
fn assert_capabilities(launched: &Launched) {
    let kept = |name: &str| u64::from(name.starts_with("fs") || name == "nursery") * FILE_SERVER;
    // A thread has its name a moment before it has dropped what it was born with.
    let settled = || {
        let threads = launched.threads();
        let mut threads = threads.into_iter();
        threads.all(|(name, status)| capabilities(&status, "CapEff") == kept(&name))
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !settled() && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    for (name, status) in launched.threads() {
        let expected = kept(&name);
        for (set, expected) in [
            ("CapEff", expected),
            ("CapPrm", expected),
            ("CapInh", 0),
            ("CapAmb", 0),
            ("CapBnd", 0),
        ] {
            assert_eq!(capabilities(&status, set), expected, "{name}: {set}");
        }
    }
}

fn assert_namespaces(launched: &Launched) {
    for name in ["user", "mnt", "pid", "ipc", "uts", "net", "cgroup"] {
        let theirs = fs::read_link(launched.proc("ns").join(name)).unwrap();
        let ours = fs::read_link(Path::new("/proc/self/ns").join(name)).unwrap();
        assert_ne!(theirs, ours, "{name}");
    }
    let status = launched.read("status");
    assert_eq!(field(&status, "NSpid").split('\t').next_back(), Some("1"));
    assert_eq!(field(&status, "PPid"), std::process::id().to_string());
}

fn assert_root(launched: &Launched) {
    let root = launched.proc("root");
    assert_eq!(names(&root), ["shares"]);
    assert_eq!(names(&root.join("shares")), ["0"]);
    assert!(fs::create_dir(root.join("new")).is_err());
    let mounts = launched.read("mountinfo");
    let mut points: Vec<_> = mounts
        .lines()
        .map(|mount| {
            let fields: Vec<_> = mount.split(' ').collect();
            let rights = fields[5].strip_suffix(",relatime").unwrap_or(fields[5]);
            (fields[4], rights)
        })
        .collect();
    points.sort_unstable();
    assert_eq!(
        points,
        [
            ("/", "ro,nosuid,nodev,noexec"),
            ("/shares/0", "rw,nosuid,nodev")
        ]
    );
    let cwd = fs::metadata(launched.proc("cwd")).unwrap();
    assert_eq!(cwd.ino(), fs::metadata(&root).unwrap().ino());
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What each descriptor leads to, without numbers.
fn descriptors(launched: &Launched) -> BTreeSet<String> {
    fs::read_dir(launched.proc("fd"))
        .unwrap()
        .map(|entry| {
            let to = fs::read_link(entry.unwrap().path()).unwrap();
            let to = to.to_str().unwrap().to_owned();
            to.split(":[").next().unwrap().to_owned()
        })
        .collect()
}

fn assert_memory(launched: &Launched) {
    let maps = launched.read("maps");
    for map in maps.lines() {
        let rights = map.split(' ').nth(1).unwrap();
        assert!(!(rights.contains('w') && rights.contains('x')), "{map}");
    }
    assert!(maps.lines().count() > 3);
}

pub fn every_thread_has_its_filter() {
    let launched = launch();
    assert_eq!(launched.threads().len(), 5);
    assert_filters(&launched);
}

pub fn only_file_server_threads_have_capabilities() {
    let launched = launch();
    assert_capabilities(&launched);
}

pub fn no_namespace_is_the_hosts() {
    let launched = launch();
    assert_namespaces(&launched);
}

pub fn every_id_is_itself() {
    let launched = launch();
    for map in ["uid_map", "gid_map"] {
        for line in launched.read(map).lines() {
            let ids: Vec<&str> = line.split_ascii_whitespace().collect();
            assert_eq!(ids[0], ids[1], "{line}");
        }
    }
    let status = launched.read("status");
    assert_eq!(field(&status, "Uid"), "0\t0\t0\t0");
    assert_eq!(field(&status, "Groups"), "");
}

pub fn the_root_holds_only_the_shares() {
    let launched = launch();
    assert_root(&launched);
}

pub fn no_descriptor_is_left_over() {
    // One that the process gets without being told of it.
    let (left_over, _writer) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&left_over, rustix::io::FdFlags::empty()).unwrap();

    let launched = launch();

    // "/" is /proc/self/fd, the root of its own mount; "/null" is on the host's /dev, of which nothing else is there.
    let expected = ["/", "/null", "/dev/null", "pipe", "socket"].map(String::from);
    assert_eq!(descriptors(&launched), BTreeSet::from(expected));
    let pipes = fs::read_dir(launched.proc("fd"))
        .unwrap()
        .map(|entry| fs::read_link(entry.unwrap().path()).unwrap())
        .filter(|to| to.to_str().unwrap().starts_with("pipe:"))
        .count();
    assert_eq!(pipes, 1, "the console's");
}

pub fn no_memory_is_writable_and_executable() {
    let launched = launch();
    assert_memory(&launched);
}

pub fn resources_are_limited() {
    let launched = launch();
    let limits = launched.read("limits");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..]
            .split_ascii_whitespace()
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(limit("Max core file size"), "0 0");
    assert_eq!(limit("Max locked memory"), "0 0");
    assert_eq!(limit("Max msgqueue size"), "0 0");
    let files: u64 = limit("Max open files")
        .split(' ')
        .next_back()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1024..=1 << 20).contains(&files), "{files}");
}

pub fn a_mount_made_later_comes_and_goes() {
    let launched = launch();
    let inside = launched.proc("root/shares/0/later/file");
    let later = launched.share.path().join("later");
    fs::create_dir(&later).unwrap();

    rustix::mount::mount("tmpfs", &later, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(later.join("file"), "mounted").unwrap();
    let seen = fs::read_to_string(&inside);
    rustix::mount::unmount(&later, UnmountFlags::empty()).unwrap();
    let gone = fs::exists(&inside);

    assert_eq!(seen.unwrap(), "mounted");
    assert!(!gone.unwrap());
}

pub fn the_file_server_acts_as_any_owner() {
    let launched = launch();
    let private = launched.share.path().join("private");
    fs::create_dir(&private).unwrap();
    chown(&private, Some(65_000), Some(65_000)).unwrap();
    fs::set_permissions(
        &private,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();

    attempt(&launched, Deed::FileServerChowns).unwrap();

    let file = fs::metadata(private.join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (70_000, 80_000));
}

pub fn procfs_ends_at_the_descriptors() {
    let launched = launch();

    attempt(&launched, Deed::FileServerClimbs).unwrap();
}

fn attempt(launched: &Launched, deed: Deed) -> Result<(), ConnectError> {
    let machine = launched.machine();
    launched
        .runtime
        .block_on(async { tokio::time::timeout(PATIENCE, machine.connect(deed as u32)).await })
        .unwrap()
        .map(drop)
}

/// `allowed` shows that it is `deed` that kills.
fn assert_deed_kills(allowed: Deed, deed: Deed) {
    let launched = launch();
    fs::create_dir(launched.share.path().join("private")).unwrap();
    attempt(&launched, allowed).unwrap();

    let error = attempt(&launched, deed).unwrap_err();

    let ended = matches!(error, ConnectError::Ended(ExitReason::Killed(SIGSYS)));
    assert!(ended, "{error:?}");
}

pub fn a_forbidden_call_of_a_vcpu_kills() {
    assert_deed_kills(Deed::VcpuAnswers, Deed::VcpuOpens);
}

pub fn a_forbidden_call_of_a_device_kills() {
    assert_deed_kills(Deed::DeviceAnswers, Deed::DeviceOpens);
}

pub fn a_forbidden_call_of_the_file_server_kills() {
    assert_deed_kills(Deed::FileServerChowns, Deed::FileServerMakesSocket);
}

pub fn a_forbidden_call_of_the_control_thread_kills() {
    assert_deed_kills(Deed::DeviceAnswers, Deed::ControlOpens);
}

pub fn executable_memory_kills() {
    assert_deed_kills(Deed::DeviceAnswers, Deed::DeviceMapsExecutable);
}

pub fn a_heap_that_shrinks_calls_nothing_forbidden() {
    let launched = launch();

    let freed = attempt(&launched, Deed::DeviceFreesMuch);

    assert!(freed.is_ok(), "{freed:?}");
}

pub fn a_panic_ends_the_machine_with_its_reason() {
    let launched = launch();

    let error = attempt(&launched, Deed::DevicePanics).unwrap_err();

    let ConnectError::Ended(ExitReason::Failed(reason)) = error else {
        panic!("{error:?}");
    };
    assert!(reason.contains("as asked"), "{reason}");
}

fn wait(launched: &Launched) -> ExitReason {
    let machine = launched.machine();
    launched
        .runtime
        .block_on(async { tokio::time::timeout(PATIENCE, machine.wait()).await })
        .unwrap()
}

pub fn a_kill_is_seen() {
    let launched = launch();

    launched.machine().kill();

    assert_eq!(wait(&launched), ExitReason::Killed(9));
}

pub fn stop_gives_stopped() {
    let launched = launch();

    launched.runtime.block_on(launched.machine().stop());

    assert_eq!(wait(&launched), ExitReason::Stopped);
}

/// Whether a process has ended, at the latest after [`PATIENCE`].
fn ends(pid: i32) -> bool {
    let process = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let patience = Timespec::try_from(PATIENCE).unwrap();
    let mut event = [PollFd::new(&process, PollFlags::IN)];
    poll(&mut event, Some(&patience)).unwrap() == 1
}

pub fn dropping_the_machine_kills_it() {
    let mut launched = launch();
    let pid = launched.machine().pid();

    drop(launched.machine.take());

    assert!(ends(pid));
}

pub fn the_supervisors_death_ends_the_machine() {
    let share = Share::new();
    let mut supervisor = Command::new(std::env::current_exe().unwrap())
        .arg("--supervise")
        .arg(share.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(supervisor.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let pid: i32 = line.trim().parse().unwrap();
    let process = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();

    supervisor.kill().unwrap();
    supervisor.wait().unwrap();

    let patience = Timespec::try_from(PATIENCE).unwrap();
    let mut event = [PollFd::new(&process, PollFlags::IN)];
    assert_eq!(poll(&mut event, Some(&patience)).unwrap(), 1);
}

fn launch_error(binary: &str, spec: MachineSpec) -> LaunchError {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let launch = Machine::launch(Path::new(binary), spec);
    runtime.block_on(launch).unwrap_err()
}

fn empty_spec() -> MachineSpec {
    let null = || File::open("/dev/null").unwrap();
    MachineSpec::new(null(), null(), null())
}

pub fn a_missing_program_says_so() {
    let error = launch_error("/no/such/hull-vmm", empty_spec());

    assert_eq!(error.to_string(), "starting \"/no/such/hull-vmm\"");
}

pub fn a_program_that_just_ends_says_so() {
    let error = launch_error("/bin/false", empty_spec());

    let LaunchError::Launcher(status) = error else {
        panic!("{error:?}");
    };
    assert_eq!(status.code(), Some(1));
}

pub fn a_share_that_is_no_directory_says_so() {
    let (not_a_directory, _writer) = std::io::pipe().unwrap();
    let spec = empty_spec().share("hull", not_a_directory, false, CachePolicy::Auto);

    let error = launch_error(env!("CARGO_BIN_EXE_hull-vmm"), spec);

    let LaunchError::Ended(ExitReason::Failed(reason)) = error else {
        panic!("{error:?}");
    };
    assert!(reason.contains("copying the mounts of share 0"), "{reason}");
}

pub fn a_machine_that_cannot_be_made_says_so() {
    let error = launch_error(env!("CARGO_BIN_EXE_hull-vmm"), empty_spec());

    let LaunchError::Ended(ExitReason::Failed(reason)) = error else {
        panic!("{error:?}");
    };
    assert!(reason.starts_with("making the machine: "), "{reason}");
}

pub fn too_many_descriptors_are_refused() {
    let null = || File::open("/dev/null").unwrap();
    let spec = (0..MAX_DESCRIPTORS).fold(empty_spec(), |spec, _| spec.block("disk", null(), true));

    let error = launch_error(env!("CARGO_BIN_EXE_hull-vmm"), spec);

    let refused = matches!(
        error,
        LaunchError::Channel(ChannelError::TooManyDescriptors)
    );
    assert!(refused, "{error:?}");
}

/// All of it, of the real process while its guest boots.
pub fn hull_vmm_is_jailed() {
    let guest = PathBuf::from(std::env::var_os("HULL_GUEST_DIR").unwrap());
    let open = |name: &str| File::open(guest.join(name)).unwrap();
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let vmm = Path::new(env!("CARGO_BIN_EXE_hull-vmm"));
    let mut launched = launch_with(vmm, |console| {
        MachineSpec::new(kvm, open("vmlinux"), console)
            .initramfs(open("initramfs.cpio"))
            .cmdline("console=hvc0 panic=-1")
            .memory_mib(512)
            .vcpus(2)
            .vsock(3, vec![1])
    });
    let start = Instant::now();
    // The driver of the share is up: all of the threads are there.
    while !launched
        .threads()
        .iter()
        .any(|(name, _)| name.starts_with("fs-request"))
    {
        assert!(start.elapsed() < PATIENCE, "{}", launched.console());
        std::thread::sleep(Duration::from_millis(20));
    }

    assert_filters(&launched);
    assert_capabilities(&launched);
    assert_namespaces(&launched);
    assert_root(&launched);
    assert_memory(&launched);
    let expected = ["/", "/null", "anon_inode", "pipe", "socket"].map(String::from);
    let mut found = descriptors(&launched);
    // "anon_inode:[eventfd]", "anon_inode:kvm-vcpu:0" and so on; and what the guest has open of its share.
    found = found
        .into_iter()
        .map(|name| name.split(':').next().unwrap().to_owned())
        .collect();
    assert_eq!(found, BTreeSet::from(expected));
    drop(launched.machine.take());
}
