//! Process 1 of the guest.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::thread;

use rustix::mount::{MountFlags, mount};

use super::{files, ports, vsock};

/// Does all there is to do, and powers off.
pub fn run() -> ! {
    let result = std::panic::catch_unwind(serve);
    println!("guest: {}", if result.is_ok() { "done" } else { "FAILED" });
    let _ = std::io::stdout().flush();
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff).unwrap();
    unreachable!("the guest is off")
}

fn serve() {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, place, kind, MountFlags::empty(), None).unwrap();
    }
    load_modules();
    let console = File::options().write(true).open("/dev/hvc0").unwrap();
    rustix::stdio::dup2_stdout(&console).unwrap();
    rustix::stdio::dup2_stderr(&console).unwrap();
    for tag in ["rw", "ro"] {
        mount(
            tag,
            format!("/{tag}"),
            "virtiofs",
            MountFlags::empty(),
            None,
        )
        .unwrap();
    }
    println!("guest: up");
    // The kernel hands what it doesn't know to process 1.
    let filter = std::env::var("files").unwrap_or_default();
    let failures = files::check(&filter);

    let mut listeners = Vec::new();
    for (port, service) in [
        (ports::ECHO, echo as fn(File)),
        (ports::SINK, sink),
        (ports::SOURCE, source),
    ] {
        let listener = vsock::listen(port).unwrap();
        listeners.push(thread::spawn(move || {
            while let Ok(stream) = vsock::accept(&listener) {
                thread::spawn(move || service(stream));
            }
        }));
    }
    let end = vsock::listen(ports::END).unwrap();
    let refused = vsock::connect(ports::NOBODY).unwrap_err();
    let mut ready = vsock::connect(ports::READY).unwrap();
    let report = format!("files: {failures} failures; nobody: {:?}", refused.kind());
    ready.write_all(report.as_bytes()).unwrap();
    vsock::finish(&ready);
    drop(vsock::accept(&end).unwrap());
}

fn load_modules() {
    // Without a list the kernel has all built in.
    for module in fs::read_to_string("/modules/load")
        .unwrap_or_default()
        .lines()
    {
        let file = File::open(format!("/modules/{module}")).unwrap();
        rustix::system::finit_module(&file, &CString::default(), 0).unwrap();
    }
}

fn echo(mut stream: File) {
    let mut buffer = vec![0; 0x1_0000];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        stream.write_all(&buffer[..count]).unwrap();
    }
    vsock::finish(&stream);
}

fn sink(mut stream: File) {
    let (mut buffer, mut total) = (vec![0; 0x4_0000], 0_u64);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        total += count as u64;
    }
    stream.write_all(&total.to_le_bytes()).unwrap();
}

fn source(mut stream: File) {
    let mut number = [0; 8];
    stream.read_exact(&mut number).unwrap();
    let (buffer, mut left) = (vec![0x5a; 0x4_0000], u64::from_le_bytes(number));
    while left > 0 {
        let part = left.min(buffer.len() as u64);
        stream
            .write_all(&buffer[..usize::try_from(part).unwrap()])
            .unwrap();
        left -= part;
    }
}
