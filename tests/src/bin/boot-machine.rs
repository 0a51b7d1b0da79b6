//! Boots one kernel and initramfs under `hull-vmm`, its console on standard output. More arguments go to the kernel.

#![allow(clippy::expect_used, reason = "a benchmark reports by panicking")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use hull_machine::client::{Machine, MachineSpec};

fn main() {
    let mut args = std::env::args().skip(1);
    let mut open = |what: &str| {
        let path = args.next().unwrap_or_else(|| {
            panic!("usage: boot-machine KERNEL INITRAMFS [ARGUMENT...]: {what}")
        });
        File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let kernel = open("KERNEL");
    let initramfs = open("INITRAMFS");
    let cmdline = args.fold(
        "console=hvc0 quiet panic=-1 noreplace-smp".to_owned(),
        |line, more| line + " " + &more,
    );
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("/dev/kvm opens");
    let console = io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .expect("standard output is open");
    let vmm = std::env::current_exe()
        .expect("/proc is mounted")
        .with_file_name("hull-vmm");
    let spec = MachineSpec::new(kvm, kernel, console)
        .initramfs(initramfs)
        .cmdline(cmdline);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let reason = runtime.block_on(async {
        let (machine, _connections) = Machine::launch(&vmm, spec)
            .await
            .expect("the machine starts");
        machine.wait().await
    });
    eprintln!("{reason}");
}
