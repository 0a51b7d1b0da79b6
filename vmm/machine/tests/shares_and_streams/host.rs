//! The host: a machine with two shares and vsock, and what it finds.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hull_machine::client::{ConnectError, Machine, MachineSpec};
use hull_machine::config::CachePolicy;
use hull_machine::control::{ConnectRefused, ExitReason};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{initramfs, ports};

/// Generous: emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(600);
/// Data for each direction, in MiB; `HULL_TEST_STREAM_MIB` says otherwise.
const STREAM_MIB: u64 = 64;

/// Runs it for each kernel whose image is there, with those checks of files whose name has `filter` in it.
pub fn run(image: &Path, filter: &str) -> ExitCode {
    let stock = ["guest-6.12", "guest-6.1"].map(|name| image.with_file_name(name));
    let mut failed = false;
    for image in std::iter::once(image).chain(stock.iter().map(PathBuf::as_path)) {
        if image.join("vmlinux").exists() {
            println!("test {}", image.display());
            failed |= std::panic::catch_unwind(|| machine(image, filter)).is_err();
        }
    }
    println!("test result: {}", if failed { "FAILED" } else { "ok" });
    ExitCode::from(u8::from(failed))
}

fn machine(image: &Path, filter: &str) {
    let shares = tempfile::tempdir().unwrap();
    for name in ["rw", "ro"] {
        fs::create_dir(shares.path().join(name)).unwrap();
    }
    fs::write(shares.path().join("ro/file"), "from the host").unwrap();
    let root = |name: &str| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, shares.path().join(name), flags, Mode::empty()).unwrap()
    };
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let (console, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let kernel = File::open(image.join("vmlinux")).unwrap();
    let spec = MachineSpec::new(kvm, kernel, writer)
        .vcpus(2)
        .memory_mib(512)
        .cmdline(format!("console=hvc0 loglevel=4 panic=-1 files={filter}"))
        .initramfs(initramfs::with_init(
            image,
            &std::env::current_exe().unwrap(),
        ))
        .share("rw", root("rw"), false, CachePolicy::Auto)
        .share("ro", root("ro"), true, CachePolicy::Always)
        .vsock(3, vec![ports::READY]);
    let console = std::thread::spawn(move || {
        let mut console = File::from(console);
        let mut seen = Vec::new();
        let mut part = [0; 4096];
        while let Ok(count @ 1..) = std::io::Read::read(&mut console, &mut part) {
            print!("{}", String::from_utf8_lossy(&part[..count]));
            seen.extend_from_slice(&part[..count]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let reason = runtime.block_on(async {
        timeout(PATIENCE, drive(spec))
            .await
            .expect("the guest is too slow")
    });
    let console = console.join().unwrap();
    assert_eq!(reason, ExitReason::PowerOff);
    assert!(console.contains("guest: done"));
    assert!(!console.contains("FAILED"));
}

async fn drive(spec: MachineSpec) -> ExitReason {
    let vmm = Path::new(env!("CARGO_BIN_EXE_hull-vmm"));
    let (machine, mut connections) = Machine::launch(vmm, spec).await.unwrap();
    let early = machine.connect(ports::ECHO).await.unwrap_err();
    assert!(matches!(
        early,
        ConnectError::Refused {
            source: ConnectRefused::NoDriver,
            ..
        }
    ));

    let mut ready = connections.recv().await.unwrap();
    let mut report = String::new();
    ready.stream.read_to_string(&mut report).await.unwrap();
    println!("host: {report}");
    assert_eq!(
        (ready.port, report.as_str()),
        (ports::READY, "files: 0 failures; nobody: ConnectionReset")
    );

    let nobody = machine.connect(ports::NOBODY).await.unwrap_err();
    assert!(matches!(
        nobody,
        ConnectError::Refused {
            source: ConnectRefused::Reset,
            ..
        }
    ));
    half_closed(&machine).await;
    many(&machine).await;
    streams(&machine).await;
    drop(machine.connect(ports::END).await.unwrap());
    machine.wait().await
}

/// What is sent before one half is shut comes back after.
async fn half_closed(machine: &Machine) {
    let mut stream = machine.connect(ports::ECHO).await.unwrap();
    let data: Vec<u8> = (0..100_000_u32).map(|at| at.to_le_bytes()[1]).collect();
    stream.write_all(&data).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer == data);
}

async fn many(machine: &Machine) {
    let began = Instant::now();
    let mut open = Vec::new();
    for number in 0..200_u32 {
        let mut stream = machine.connect(ports::ECHO).await.unwrap();
        stream.write_all(&number.to_le_bytes()).await.unwrap();
        open.push(stream);
    }
    for (number, stream) in (0_u32..).zip(&mut open) {
        assert_eq!(stream.read_u32_le().await.unwrap(), number);
    }
    println!(
        "host: 200 connections at once: {} ms",
        began.elapsed().as_millis()
    );
}

async fn streams(machine: &Machine) {
    let mib = std::env::var("HULL_TEST_STREAM_MIB")
        .ok()
        .and_then(|mib| mib.parse().ok())
        .unwrap_or(STREAM_MIB);
    let bytes = mib << 20;

    let mut stream = machine.connect(ports::SINK).await.unwrap();
    let began = Instant::now();
    let part = vec![0xa5; 0x4_0000];
    for _ in 0..bytes / 0x4_0000 {
        stream.write_all(&part).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read_u64_le().await.unwrap(), bytes);
    report("to the guest", mib, began);

    let mut stream = machine.connect(ports::SOURCE).await.unwrap();
    let began = Instant::now();
    stream.write_all(&bytes.to_le_bytes()).await.unwrap();
    assert_eq!(drain(&mut stream).await, bytes);
    report("from the guest", mib, began);
}

async fn drain(stream: &mut UnixStream) -> u64 {
    let (mut part, mut total) = (vec![0; 0x4_0000], 0);
    loop {
        match stream.read(&mut part).await.unwrap() {
            0 => return total,
            count => total += count as u64,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a figure to be looked at")]
fn report(direction: &str, mib: u64, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "host: {mib} MiB {direction}: {seconds:.2} s, {:.1} MiB/s",
        mib as f64 / seconds
    );
}
