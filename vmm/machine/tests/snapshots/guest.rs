//! Process 1 of the guest: counts, and does what it is told, a command for each connection.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};

use super::{COMMANDS, READY, vsock};

static COUNT: AtomicU64 = AtomicU64::new(0);
static PATTERN: Mutex<Vec<u8>> = Mutex::new(Vec::new());
const PATTERN_SIZE: usize = 8 << 20;

/// Runs until it is told to power off.
pub fn run() -> ! {
    if let Err(panic) = std::panic::catch_unwind(serve) {
        drop(panic);
        println!("guest: FAILED");
    }
    let _ = std::io::stdout().flush();
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff).unwrap();
    unreachable!("the guest is off")
}

fn serve() {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, place, kind, MountFlags::empty(), None).unwrap();
    }
    // Without a list the kernel has all built in.
    for module in fs::read_to_string("/modules/load")
        .unwrap_or_default()
        .lines()
    {
        let file = File::open(format!("/modules/{module}")).unwrap();
        rustix::system::finit_module(&file, &CString::default(), 0).unwrap();
    }
    let console = File::options().write(true).open("/dev/hvc0").unwrap();
    rustix::stdio::dup2_stdout(&console).unwrap();
    rustix::stdio::dup2_stderr(&console).unwrap();
    thread::spawn(|| {
        loop {
            COUNT.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(10));
        }
    });
    let listener = vsock::listen(COMMANDS).unwrap();
    // It stays open over all snapshots, and ends in each clone.
    let ready = vsock::connect(READY).unwrap();
    thread::spawn(move || {
        let ended = BufReader::new(ready).read_line(&mut String::new());
        println!("guest: the first connection has ended: {ended:?}");
    });
    loop {
        let stream = vsock::accept(&listener).unwrap();
        thread::spawn(move || answer(stream));
    }
}

fn answer(mut stream: File) {
    let mut line = String::new();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    lines.read_line(&mut line).unwrap();
    if line.trim() == "wait" {
        line.clear();
        // In a clone it ends.
        if lines.read_line(&mut line).is_ok() {
            write!(stream, "{line}").unwrap();
        }
        return;
    }
    let answer = std::panic::catch_unwind(|| command(line.trim()));
    let answer = answer.unwrap_or_else(|_| "FAILED".to_owned());
    writeln!(stream, "{answer}").unwrap();
    vsock::finish(&stream);
}

fn command(line: &str) -> String {
    let (command, argument) = line.split_once(' ').unwrap_or((line, ""));
    match command {
        "count" => COUNT.load(Ordering::Relaxed).to_string(),
        // Boot time counts pauses of the machine's, too, if it knows of them.
        "now" => {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            (now.tv_sec * 1_000_000_000 + now.tv_nsec).to_string()
        }
        "clock" => read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "say" => {
            println!("{argument}");
            String::new()
        }
        "mount" => {
            fs::create_dir_all("/rw").unwrap();
            mount("hull", "/rw", "virtiofs", MountFlags::empty(), None).unwrap();
            String::new()
        }
        "read" => read(argument),
        "write" => {
            let (path, content) = argument.split_once(' ').unwrap();
            fs::write(path, content).unwrap();
            String::new()
        }
        "fill" => {
            *PATTERN.lock().unwrap() = vec![argument.parse().unwrap(); PATTERN_SIZE];
            String::new()
        }
        // Writes to every page of so many MiB, and counts those that have what was written.
        "use" => {
            let mut memory = vec![0_u64; argument.parse::<usize>().unwrap() << 17];
            for (number, word) in (1_u64..).zip(memory.iter_mut().step_by(512)) {
                *word = number;
            }
            let good = (1_u64..).zip(memory.iter().step_by(512));
            good.filter(|(number, word)| number == *word)
                .count()
                .to_string()
        }
        "pattern" => {
            let pattern = PATTERN.lock().unwrap();
            let first = pattern[0];
            let same = pattern.iter().all(|byte| *byte == first);
            format!("{first} {same}")
        }
        "random" => {
            let mut bytes = [0; 16];
            let read = File::open("/dev/hwrng").unwrap().read(&mut bytes).unwrap();
            read.to_string()
        }
        "end" => rustix::system::reboot(rustix::system::RebootCommand::PowerOff)
            .unwrap_err()
            .to_string(),
        _ => format!("unknown: {line}"),
    }
}

fn read(path: &str) -> String {
    match fs::read_to_string(path) {
        Ok(content) => content.trim().to_owned(),
        Err(error) => error.to_string(),
    }
}
