//! One virtual machine, jailed.
//!
//! Started by a supervisor ([`hull_machine::client`]) with one end of a socket pair,
//! over which it gets its machine, and tells how that goes.

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use hull_machine::boot::kernel::{self, KernelError};
use hull_machine::channel::{Channel, ChannelError};
use hull_machine::config::MachineConfig;
use hull_machine::control::{Event, ExitReason, Request, SnapshotRefused};
use hull_machine::jail::{self, JailError};
use hull_machine::steps::Steps;
use hull_machine::threads::{self, ConfineError};
use hull_machine::vmm::{BuildError, Descriptors, Machine, StartError};
use hull_machine::warnings;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};

const USAGE: &str = "\
Runs one virtual machine for its supervisor. Not to be started by hand.

Usage: hull-vmm --control-fd N
       hull-vmm --unpack-kernel BZIMAGE ELF
       hull-vmm --version | --help

  --control-fd N    the supervisor's socket, an inherited descriptor: 0, or 3 and more
  --unpack-kernel   write the ELF image inside a kernel as distributions ship it
";

/// Status after a panic, as Rust's own.
const PANICKED: libc::c_int = 101;

/// Why the machine could not be made or could not go on.
#[derive(Debug, thiserror::Error)]
enum VmmError {
    #[error("the first message is not a machine")]
    NotBoot,
    #[error("the supervisor sent a second machine")]
    SecondBoot,
    #[error("a connection or a disk came without its descriptor")]
    NoDescriptor,
    #[error("the control channel")]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("confining threads")]
    Confine(#[from] ConfineError),
    #[error("making the machine")]
    Build(#[from] BuildError),
    #[error("starting the machine")]
    Start(#[from] StartError),
    #[error("waiting for the supervisor or the machine")]
    Poll(#[source] io::Error),
}

/// Why a kernel was not unpacked.
#[derive(Debug, thiserror::Error)]
enum UnpackError {
    #[error("reading {path:?}")]
    Read { path: PathBuf, source: io::Error },
    #[error("unpacking {path:?}")]
    Unpack { path: PathBuf, source: KernelError },
    #[error("writing {path:?}")]
    Write { path: PathBuf, source: io::Error },
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let arguments: Vec<Option<&str>> = arguments.iter().map(|a| a.to_str()).collect();
    match arguments.as_slice() {
        [Some("--version" | "-V")] => {
            println!("hull-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        [Some("--help" | "-h")] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        [Some("--control-fd"), Some(number)] => match number.parse().map(control) {
            Ok(Ok(control)) => run(&Arc::new(control)),
            Ok(Err(error)) => refuse(&format!("--control-fd {number}: {error}")),
            Err(error) => refuse(&format!("--control-fd {number:?}: {error}")),
        },
        [Some("--unpack-kernel"), Some(from), Some(to)] => match unpack_kernel(from, to) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("hull-vmm: {}", chain(&error));
                ExitCode::FAILURE
            }
        },
        _ => refuse("one option is needed; see --help"),
    }
}

fn unpack_kernel(from: &str, to: &str) -> Result<(), UnpackError> {
    let path = PathBuf::from(from);
    let image = match fs::read(&path) {
        Ok(image) => image,
        Err(source) => return Err(UnpackError::Read { path, source }),
    };
    let elf = kernel::unpack(&image).map_err(|source| UnpackError::Unpack { path, source })?;
    fs::write(to, elf).map_err(|source| UnpackError::Write {
        path: to.into(),
        source,
    })
}

fn refuse(why: &str) -> ExitCode {
    eprintln!("hull-vmm: {why}");
    ExitCode::from(2)
}

/// Takes over the inherited descriptor, under a number that is not standard input's.
fn control(number: RawFd) -> io::Result<Channel> {
    if !(number == 0 || number > 2) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: nothing else in this process has used the descriptor; were it not open,
    // the call below says so.
    let inherited = unsafe { BorrowedFd::borrow_raw(number) };
    let control = rustix::io::fcntl_dupfd_cloexec(inherited, 3)?;
    if number == 0 {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        rustix::stdio::dup2_stdin(&null)?;
    } else {
        // SAFETY: it was inherited, so it is ours, and nobody uses it from here on.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(Channel::new(control))
}

fn run(control: &Arc<Channel>) -> ExitCode {
    tell_panics(Arc::clone(control));
    let reason = match serve(control) {
        Ok(Some(reason)) => reason,
        // Nobody is there to be told.
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => ExitReason::Failed(chain(&error)),
    };
    match control.send(&Event::Ended(reason), &[]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A machine with a thread missing is none: a panic anywhere is the end, and its reason.
fn tell_panics(control: Arc<Channel>) {
    std::panic::set_hook(Box::new(move |panic| {
        let reason = ExitReason::Failed(format!("hull-vmm has a fault: {panic}"));
        // Whether it is heard or not, the process ends.
        let _ = control.try_send(&Event::Ended(reason), &[]);
        // SAFETY: `_exit` runs nothing of this process; other threads just stop.
        unsafe { libc::_exit(PANICKED) }
    }));
}

/// From the first message to the machine's end. `None`: the supervisor is gone.
fn serve(control: &Arc<Channel>) -> Result<Option<ExitReason>, VmmError> {
    let mut steps = Steps::begin();
    let Some((config, descriptors)) = boot(control)? else {
        return Ok(None);
    };
    steps.end("first message");
    let mut descriptors = Descriptors::new(descriptors);
    let roots: Vec<OwnedFd> = config
        .shares
        .iter()
        .map(|share| descriptors.take(share.root))
        .collect::<Result<_, _>>()?;

    let kept: Vec<_> = descriptors.remaining().collect();
    let shares = jail::enter(control, roots, &kept)?;
    drop(kept);
    steps.end("jail");
    // This is the process's first logger, so that it can't fail.
    let _ = warnings::send_to(Arc::clone(control));
    let main_thread = threads::confine()?;
    steps.end("system call filters");
    let mut machine = Machine::build(
        &config,
        descriptors,
        shares,
        tell_guest_connections(control),
        &mut steps,
    )?;
    main_thread.confine()?;
    control.send(&Event::Running(steps.started()), &[])?;
    machine.start()?;
    attend(control, machine)
}

fn boot(control: &Channel) -> Result<Option<(MachineConfig, Vec<OwnedFd>)>, VmmError> {
    match control.receive()? {
        None => Ok(None),
        Some((Request::Boot(config), descriptors)) => Ok(Some((config, descriptors))),
        Some(_) => Err(VmmError::NotBoot),
    }
}

fn tell_guest_connections(control: &Arc<Channel>) -> Box<dyn Fn(u32, UnixStream) + Send> {
    let control = Arc::clone(control);
    Box::new(move |port, stream| {
        // When the supervisor has no room, the stream is closed, which the guest sees.
        let _ = control.try_send(&Event::GuestConnection { port }, &[stream.as_fd()]);
    })
}

/// Does what the supervisor asks until the machine ends. `None`: the supervisor is gone.
fn attend(control: &Arc<Channel>, mut machine: Machine) -> Result<Option<ExitReason>, VmmError> {
    loop {
        let mut sources = [
            PollFd::new(control.as_ref(), PollFlags::IN),
            PollFd::from_borrowed_fd(machine.ended(), PollFlags::IN),
        ];
        match poll(&mut sources, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(VmmError::Poll(error.into())),
        }
        let [asked, ended] = sources.map(|source| !source.revents().is_empty());
        if ended {
            return Ok(Some(machine.wait()));
        }
        if !asked {
            continue;
        }
        match control.receive()? {
            None => return Ok(None),
            Some((Request::Boot(_), _)) => return Err(VmmError::SecondBoot),
            Some((Request::Stop, _)) => machine.stop(),
            Some((Request::Pause { id }, _)) => {
                machine.pause();
                control.send(&Event::Paused { id }, &[])?;
            }
            Some((Request::Resume { id }, _)) => {
                machine.resume();
                control.send(&Event::Resumed { id }, &[])?;
            }
            Some((Request::Snapshot { id }, mut descriptors)) => {
                let (Some(memory), Some(state)) = (descriptors.pop(), descriptors.pop()) else {
                    return Err(VmmError::NoDescriptor);
                };
                let result = machine
                    .snapshot(state, memory)
                    .map_err(|error| SnapshotRefused(chain(&error)));
                control.send(&Event::SnapshotTaken { id, result }, &[])?;
            }
            Some((Request::PlugNet { id, index, tap }, descriptors)) => {
                let result = machine.plug_net(index, &tap, descriptors);
                control.send(&Event::Plugged { id, result }, &[])?;
            }
            Some((
                Request::InsertDisk {
                    id,
                    index,
                    read_only,
                },
                mut descriptors,
            )) => {
                let disk = descriptors.pop().ok_or(VmmError::NoDescriptor)?;
                let result = machine.insert_disk(index, disk, read_only);
                control.send(&Event::DiskChanged { id, result }, &[])?;
            }
            Some((Request::ResizeMemory { id, requested_mib }, _)) => {
                let result = machine.resize_memory(requested_mib);
                control.send(&Event::AddedMemory { id, result }, &[])?;
            }
            Some((Request::AskMemory { id }, _)) => {
                let result = machine.added_memory();
                control.send(&Event::AddedMemory { id, result }, &[])?;
            }
            Some((Request::EjectDisk { id, index }, _)) => {
                let result = machine.eject_disk(index);
                control.send(&Event::DiskChanged { id, result }, &[])?;
            }
            Some((Request::Connect { id, port }, mut descriptors)) => {
                let stream = descriptors.pop().ok_or(VmmError::NoDescriptor)?;
                let control = Arc::clone(control);
                let connected = Box::new(move |result| {
                    // The supervisor waits for it; when it doesn't, it is gone, and so is this process.
                    let _ = control.send(&Event::Connected { id, result }, &[]);
                });
                machine.connect(port, UnixStream::from(stream), connected);
            }
        }
    }
}

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
