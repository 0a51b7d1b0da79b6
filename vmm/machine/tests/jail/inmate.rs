//! The jailed process: `hull-vmm` but for the machine. The supervisor's requests to
//! connect tell its threads what to try, by port.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use hull_machine::channel::Channel;
use hull_machine::control::{ConnectRefused, Event, ExitReason, Request};
use hull_machine::jail;
use hull_machine::steps::Started;
use hull_machine::threads::{self, ThreadClass};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, StatxFlags, Uid};

/// What a thread is to do.
#[derive(Debug, Clone, Copy)]
pub enum Deed {
    VcpuAnswers = 1,
    VcpuOpens,
    DeviceAnswers,
    DeviceOpens,
    FileServerMakesSocket,
    ControlOpens,
    DeviceMapsExecutable,
    DevicePanics,
    /// Makes the heap large, and small again.
    DeviceFreesMuch,
    /// Gives files in a directory of another owner to a third; refused if that fails.
    FileServerChowns,
    /// Refused unless `..` of `/proc/self/fd` is `/proc/self/fd` itself.
    FileServerClimbs,
}

impl Deed {
    const ALL: [Self; 11] = [
        Self::VcpuAnswers,
        Self::VcpuOpens,
        Self::DeviceAnswers,
        Self::DeviceOpens,
        Self::FileServerMakesSocket,
        Self::ControlOpens,
        Self::DeviceMapsExecutable,
        Self::DevicePanics,
        Self::DeviceFreesMuch,
        Self::FileServerChowns,
        Self::FileServerClimbs,
    ];
}

pub fn run() -> ExitCode {
    // SAFETY: the client passes the control socket as standard input, and nobody else uses it.
    let standard_input = unsafe { std::os::fd::BorrowedFd::borrow_raw(0) };
    let control = Channel::new(rustix::io::fcntl_dupfd_cloexec(standard_input, 3).unwrap());
    let control = Arc::new(control);
    tell_panics(Arc::clone(&control));
    let (request, descriptors) = control.receive::<Request>().unwrap().unwrap();
    let Request::Boot(config) = request else {
        panic!("{request:?}");
    };
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let roots = config
        .shares
        .iter()
        .map(|share| descriptors[usize::from(share.root.0)].take().unwrap())
        .collect();
    let kept: Vec<_> = descriptors.iter().flatten().map(AsFd::as_fd).collect();

    let shares = jail::enter(&control, roots, &kept).unwrap();
    let main_thread = threads::confine().unwrap();
    let proc_self_fd = shares.proc_self_fd;
    let vcpu = start(ThreadClass::Vcpu, "vcpu0", &control, None);
    let device = start(ThreadClass::Device, "device0", &control, None);
    let file_server = start(ThreadClass::FileSystem, "fs0", &control, Some(proc_self_fd));
    main_thread.confine().unwrap();
    control
        .send(&Event::Running(Started::default()), &[])
        .unwrap();

    while let Some((request, _)) = control.receive::<Request>().unwrap() {
        match request {
            Request::Stop => {
                control
                    .send(&Event::Ended(ExitReason::Stopped), &[])
                    .unwrap();
                break;
            }
            Request::Connect { id, port } => {
                let deed = Deed::ALL[usize::try_from(port).unwrap() - 1];
                let thread = match deed {
                    Deed::VcpuAnswers | Deed::VcpuOpens => &vcpu,
                    Deed::DeviceAnswers
                    | Deed::DeviceOpens
                    | Deed::DeviceMapsExecutable
                    | Deed::DevicePanics
                    | Deed::DeviceFreesMuch => &device,
                    Deed::ControlOpens => {
                        open();
                        continue;
                    }
                    _ => &file_server,
                };
                thread.send((id, deed)).unwrap();
            }
            Request::Boot(_)
            | Request::PlugNet { .. }
            | Request::InsertDisk { .. }
            | Request::EjectDisk { .. }
            | Request::ResizeMemory { .. }
            | Request::AskMemory { .. }
            | Request::Pause { .. }
            | Request::Snapshot { .. }
            | Request::Resume { .. } => panic!("not for an inmate"),
        }
    }
    ExitCode::SUCCESS
}

fn tell_panics(control: Arc<Channel>) {
    std::panic::set_hook(Box::new(move |panic| {
        let _ = control.send(&Event::Ended(ExitReason::Failed(panic.to_string())), &[]);
        // SAFETY: it ends the process without running anything of it.
        unsafe { libc::_exit(101) }
    }));
}

fn start(
    class: ThreadClass,
    name: &str,
    control: &Arc<Channel>,
    proc_self_fd: Option<OwnedFd>,
) -> Sender<(u64, Deed)> {
    let (sender, deeds) = mpsc::channel();
    let control = Arc::clone(control);
    threads::spawn(class, name, move || {
        for (id, deed) in deeds {
            let done = perform(deed, proc_self_fd.as_ref());
            let result = done.then_some(()).ok_or(ConnectRefused::Reset);
            control.send(&Event::Connected { id, result }, &[]).unwrap();
        }
    })
    .unwrap();
    sender
}

fn perform(deed: Deed, proc_self_fd: Option<&OwnedFd>) -> bool {
    match deed {
        Deed::VcpuAnswers | Deed::DeviceAnswers => true,
        Deed::VcpuOpens | Deed::DeviceOpens | Deed::ControlOpens => open(),
        Deed::FileServerMakesSocket => std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
        Deed::DeviceMapsExecutable => {
            let (prot, flags) = (libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new anonymous mapping touches no memory that is there.
            let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) };
            mapped != libc::MAP_FAILED
        }
        Deed::DevicePanics => panic!("as asked"),
        Deed::DeviceFreesMuch => {
            // Each below what the allocator maps on its own.
            let much: Vec<Vec<u8>> = (0..50).map(|_| vec![1; 100_000]).collect();
            much.iter().all(|part| part[99_999] == 1)
        }
        Deed::FileServerChowns => {
            let file = "/shares/0/private/file";
            std::fs::write(file, "x").is_ok() && give_away(file).is_ok()
        }
        Deed::FileServerClimbs => {
            let own = proc_self_fd.unwrap();
            let up = |path: &str| {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let up = rustix::fs::openat(own, path, flags, Mode::empty()).unwrap();
                std::fs::File::from(up).metadata().unwrap().ino()
            };
            // A descriptor is still opened through it.
            let root = rustix::fs::openat(CWD, "/", OFlags::PATH, Mode::empty()).unwrap();
            let through = format!("{}/shares", root.as_raw_fd());
            let reaches = rustix::fs::statx(own, &through, AtFlags::empty(), StatxFlags::INO);
            let direct = rustix::fs::statx(CWD, "/shares", AtFlags::empty(), StatxFlags::INO);
            up(".") == up("..") && reaches.unwrap().stx_ino == direct.unwrap().stx_ino
        }
    }
}

fn give_away(file: &str) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(70_000), Gid::from_raw(80_000));
    rustix::fs::chownat(CWD, file, Some(uid), Some(gid), AtFlags::empty())
}

fn open() -> bool {
    std::fs::File::open("/").is_ok()
}
