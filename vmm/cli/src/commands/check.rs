//! `hull check`: whether this host can run pods, and what to do where it can't.

mod cost;

use std::fs;
use std::io::IsTerminal;
use std::path::Path;

use hull_pod::configuration::{Configuration, DEFAULT_PATH};
use hull_pod::networks::Netavark;
use hull_pod::supervisor::Installation;
use hull_pod::templates::Templates;
use hull_pod::text::chain;
use kvm_ioctls::Kvm;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2, statfs};
use serde::Serialize;

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, print_text, print_value};

/// The first kernel with all that is used: mount_setattr came last.
const KERNEL: (u32, u32) = (5, 12);
/// `f_type` of a cgroup v2 file system (statfs(2)).
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// Check whether this host is ready: each finding with its remedy
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    output: crate::output::OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Pods could start sooner, or take less.
    Hint,
    /// Pods run, but something is not as it should be.
    Warning,
    Failure,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            verdict: Verdict::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn bad(
        what: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            what,
            verdict,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn failure(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::bad(what, Verdict::Failure, found, remedy)
    }
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let mut findings = vec![
        processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        kvm(),
        kernel(),
        path_resolution(),
        user_namespaces(),
        overlay(),
        control_groups(),
        privileges(),
        configuration(host),
        installation(host),
        networks(host),
        directories(host),
        templates(host),
    ];
    findings.extend(cost::findings(Path::new("/")));
    match args.output.output {
        Some(format @ (Format::Json | Format::Yaml)) => print_value(&findings, format)?,
        _ => print_text(&text(&findings, std::io::stdout().is_terminal()))?,
    }
    if findings.iter().any(|f| f.verdict == Verdict::Failure) {
        return Err(Failure::Exit(1));
    }
    Ok(())
}

fn text(findings: &[Finding], coloured: bool) -> String {
    let mut text = String::new();
    for finding in findings {
        let (word, colour) = match finding.verdict {
            Verdict::Ok => ("ok", 32),
            Verdict::Hint => ("hint", 36),
            Verdict::Warning => ("warning", 33),
            Verdict::Failure => ("FAIL", 31),
        };
        let word = format!("{word:<8}");
        let word = if coloured {
            format!("\x1b[{colour}m{word}\x1b[0m")
        } else {
            word
        };
        text.push_str(&format!("{word} {:<18} {}\n", finding.what, finding.found));
        if let Some(remedy) = &finding.remedy {
            text.push_str(&format!("{:28}-> {remedy}\n", ""));
        }
    }
    text
}

/// A /dev/kvm that opens says nothing of the processor: KVM can be emulated, and is then so slow
/// that few things end in time.
fn processor(cpuinfo: &str) -> Finding {
    const WHAT: &str = "processor";
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|f| f == flag);
    if has("vmx") {
        return Finding::ok(WHAT, "Intel virtualisation (vmx)");
    }
    if has("svm") {
        return Finding::ok(WHAT, "AMD virtualisation (svm)");
    }
    let remedy = if has("hypervisor") {
        "this is a virtual machine itself: turn on nested virtualisation for it, or use a host that has it"
    } else {
        "turn virtualisation on in the firmware (VT-x, AMD-V or SVM)"
    };
    let found = if fs::exists("/dev/kvm").unwrap_or(false) {
        "neither vmx nor svm: KVM here is emulated without hardware virtualisation"
    } else {
        "neither vmx nor svm: no hardware virtualisation"
    };
    Finding::failure(WHAT, found, remedy)
}

fn kvm() -> Finding {
    const WHAT: &str = "/dev/kvm";
    let error = match Kvm::new() {
        Ok(kvm) => match kvm.create_vm() {
            Ok(_) => return Finding::ok(WHAT, "opens, and makes virtual machines"),
            Err(error) => {
                return Finding::failure(
                    WHAT,
                    format!("opens, but makes no virtual machine: {error}"),
                    "see dmesg for KVM's reason",
                );
            }
        },
        Err(error) => error,
    };
    let remedy = match error.errno() {
        rustix_errno::NOENT => "load the module: modprobe kvm_intel, or modprobe kvm_amd",
        rustix_errno::ACCES => "run hull as root",
        _ => "see dmesg for KVM's reason",
    };
    Finding::failure(WHAT, format!("can't be opened: {error}"), remedy)
}

/// The numbers of the two errors that have a remedy of their own.
mod rustix_errno {
    pub const NOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();
    pub const ACCES: i32 = rustix::io::Errno::ACCESS.raw_os_error();
}

fn kernel() -> Finding {
    const WHAT: &str = "kernel";
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    if version(&release).is_some_and(|v| v >= KERNEL) {
        return Finding::ok(WHAT, release);
    }
    let (major, minor) = KERNEL;
    Finding::failure(
        WHAT,
        format!("{release} is too old"),
        format!("Linux {major}.{minor} or later is needed"),
    )
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A container's seccomp filter may refuse what the kernel has.
fn path_resolution() -> Finding {
    const WHAT: &str = "openat2";
    let opened = openat2(
        CWD,
        "/",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    );
    match opened {
        Ok(_) => Finding::ok(WHAT, "there"),
        Err(error) => Finding::failure(
            WHAT,
            format!("refused: {error}"),
            "if hull runs in a container, allow it the system call",
        ),
    }
}

fn user_namespaces() -> Finding {
    const WHAT: &str = "user namespaces";
    let most = fs::read_to_string("/proc/sys/user/max_user_namespaces")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    match most {
        Some(0) => Finding::failure(WHAT, "turned off", "sysctl user.max_user_namespaces=10000"),
        Some(_) => Finding::ok(WHAT, "there"),
        None => Finding::failure(
            WHAT,
            "not in this kernel",
            "use a kernel with CONFIG_USER_NS",
        ),
    }
}

fn overlay() -> Finding {
    const WHAT: &str = "overlay";
    let known = fs::read_to_string("/proc/filesystems")
        .is_ok_and(|text| text.lines().any(|line| line.trim() == "nodev\toverlay"));
    if known {
        Finding::ok(WHAT, "there")
    } else {
        Finding::failure(WHAT, "not loaded", "modprobe overlay")
    }
}

fn control_groups() -> Finding {
    const WHAT: &str = "cgroup v2";
    let is_v2 = statfs("/sys/fs/cgroup").is_ok_and(|fs| fs.f_type == CGROUP2_MAGIC);
    if is_v2 {
        Finding::ok(WHAT, "at /sys/fs/cgroup")
    } else {
        Finding::bad(
            WHAT,
            Verdict::Warning,
            "not at /sys/fs/cgroup",
            "boot with systemd.unified_cgroup_hierarchy=1; what a pod costs the host is unlimited without it",
        )
    }
}

fn privileges() -> Finding {
    const WHAT: &str = "privileges";
    if rustix::process::geteuid().is_root() {
        Finding::ok(WHAT, "root")
    } else {
        Finding::failure(WHAT, "not root", "sudo hull")
    }
}

fn configuration(host: &Host) -> Finding {
    const WHAT: &str = "configuration";
    let named = host.configuration.as_deref();
    match Configuration::load(named) {
        Ok(_) => {
            let path = named.unwrap_or(Path::new(DEFAULT_PATH));
            let read = fs::exists(path).unwrap_or(true);
            let is = if read { "" } else { " is not there: defaults" };
            Finding::ok(WHAT, format!("{}{is}", path.display()))
        }
        Err(error) => Finding::failure(
            WHAT,
            chain(&error),
            "mend the file; no pod starts with it as it is",
        ),
    }
}

fn installation(host: &Host) -> Finding {
    const WHAT: &str = "installation";
    match Installation::find(&host.configuration().unwrap_or_default()) {
        Ok(found) => Finding::ok(
            WHAT,
            format!("{}, {}", found.vmm.display(), found.kernel.display()),
        ),
        Err(error) => Finding::failure(WHAT, error.to_string(), error.remedy()),
    }
}

fn networks(host: &Host) -> Finding {
    const WHAT: &str = "networks";
    match Netavark::find(&host.directories, host.limits().call) {
        Ok(_) => Finding::ok(WHAT, "netavark and aardvark-dns are there"),
        Err(error) => Finding::bad(
            WHAT,
            Verdict::Warning,
            chain(&error),
            "pods run all the same with --network none or ns:PATH",
        ),
    }
}

fn directories(host: &Host) -> Finding {
    const WHAT: &str = "directories";
    let directories = &host.directories;
    match directories.prepare() {
        Ok(()) => Finding::ok(
            WHAT,
            format!(
                "{}, {}",
                directories.run().display(),
                directories.data().display()
            ),
        ),
        Err(error) => Finding::failure(
            WHAT,
            chain(&error),
            "choose others with --run-dir and --data-dir, or mend these",
        ),
    }
}

/// Pods start without one, too, only later.
fn templates(host: &Host) -> Finding {
    const WHAT: &str = "templates";
    let remedy = "mend that, then: hull template create";
    match Templates::open(host.directories.data()).and_then(|all| all.failures()) {
        Ok(failed) => match failed.first() {
            None => Finding::ok(WHAT, "none has failed"),
            Some(failure) => {
                let (id, why) = (failure.kind.id(), &failure.why);
                let found = match failed.len() {
                    1 => format!("{id} failed: {why}"),
                    count => format!("{id} failed, and {} more: {why}", count - 1),
                };
                Finding::bad(WHAT, Verdict::Warning, found, remedy)
            }
        },
        Err(error) => Finding::bad(WHAT, Verdict::Warning, chain(&error), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_told_apart() {
        let finding = |flags: &str| processor(&format!("flags\t\t: fpu {flags}\n"));

        assert_eq!(finding("vmx").verdict, Verdict::Ok);
        assert_eq!(finding("svm").verdict, Verdict::Ok);
        let none = finding("hypervisor");
        assert_eq!(none.verdict, Verdict::Failure);
        assert!(none.remedy.unwrap().contains("nested"));
        assert!(finding("sse").remedy.unwrap().contains("firmware"));
    }

    #[test]
    fn kernel_versions_are_read() {
        assert_eq!(version("6.12.117+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(version("5.4.0-1"), Some((5, 4)));
        assert_eq!(version("odd"), None);
    }

    #[test]
    fn remedies_follow_their_findings() {
        let text = text(&[Finding::failure("x", "broken", "mend it")], false);

        assert!(text.starts_with("FAIL     x"));
        assert!(text.contains("-> mend it"));
    }
}
