//! What of a host makes its pods start later, or take more memory, than they need to.

use std::fs;
use std::path::Path;

use super::{Finding, Verdict};

/// A supervisor's start copies all mounts of the namespace that it comes from: some microseconds for each.
const MANY_MOUNTS: usize = 2000;
/// All of a host's interfaces are behind one lock of the kernel's (RTNL), and many programs list them all.
const MANY_INTERFACES: usize = 1000;

/// Looks at the host whose root directory this is.
pub fn findings(root: &Path) -> Vec<Finding> {
    vec![
        large_pages(root),
        cgroup_changes(root),
        merging(root),
        transparent_huge_pages(root),
        mounts(root),
        interfaces(root),
    ]
}

fn hint(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding::bad(what, Verdict::Hint, found, remedy)
}

fn read(root: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(file)).ok()?;
    Some(text.trim().to_owned())
}

/// Where a processor has the fault (iTLB multihit), KVM splits the guest's large pages that hold code, and each machine's
/// start waits for a kernel thread to be made for it (Linux, admin-guide/hw-vuln/multihit.rst).
fn large_pages(root: &Path) -> Finding {
    const WHAT: &str = "nx_huge_pages";
    let setting = read(root, "sys/module/kvm/parameters/nx_huge_pages");
    let fault = read(root, "sys/devices/system/cpu/vulnerabilities/itlb_multihit");
    let has_fault = fault.is_some_and(|fault| !fault.starts_with("Not affected"));
    match setting.as_deref() {
        Some("Y") if has_fault => Finding::ok(WHAT, "on: the processor needs it"),
        Some("Y") => hint(
            WHAT,
            "on, and this processor doesn't need it: machines start later",
            "load kvm with nx_huge_pages=never (options kvm nx_huge_pages=never in /etc/modprobe.d)",
        ),
        _ => Finding::ok(WHAT, "off"),
    }
}

/// A process that changes its cgroup waits for an RCU grace period, unless the hierarchy favours such changes
/// (Linux, admin-guide/cgroup-v2.rst, `favordynmods`).
fn cgroup_changes(root: &Path) -> Finding {
    const WHAT: &str = "cgroup changes";
    let mounts = read(root, "proc/self/mounts").unwrap_or_default();
    let hierarchy = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then_some((place, options))
    });
    match hierarchy {
        None => Finding::ok(WHAT, "no cgroup v2"),
        Some((_, options)) if options.split(',').any(|option| option == "favordynmods") => {
            Finding::ok(WHAT, "favoured (favordynmods)")
        }
        Some((place, _)) => hint(
            WHAT,
            "each start of a pod under containerd waits for the kernel (no favordynmods)",
            format!("mount -o remount,favordynmods {place}, from Linux 6.0 on"),
        ),
    }
}

/// Merged pages tell one tenant what is in another's memory, by the time that a write takes.
fn merging(root: &Path) -> Finding {
    const WHAT: &str = "KSM";
    match read(root, "sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => Finding::bad(
            WHAT,
            Verdict::Warning,
            "on: where a service manager asks for it, pages of different pods are merged",
            "echo 2 > /sys/kernel/mm/ksm/run; Hull asks for no merging, clones share what they have in common anyway",
        ),
        _ => Finding::ok(WHAT, "off"),
    }
}

/// A machine that boots asks for its memory 2 MiB at a time, which is what makes it boot fast.
fn transparent_huge_pages(root: &Path) -> Finding {
    const WHAT: &str = "huge pages";
    let setting = read(root, "sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = setting
        .split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    match chosen {
        Some("never") => hint(
            WHAT,
            "never: machines take twice as long to boot",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: for those who ask for them, as hull-vmm does",
        ),
        Some(other) => Finding::ok(WHAT, other),
        None => Finding::ok(WHAT, "not in this kernel"),
    }
}

fn mounts(root: &Path) -> Finding {
    const WHAT: &str = "mounts";
    let count = read(root, "proc/self/mountinfo").map_or(0, |text| text.lines().count());
    if count < MANY_MOUNTS {
        return Finding::ok(WHAT, count.to_string());
    }
    hint(
        WHAT,
        format!("{count}: the start of a pod copies them all"),
        "see who mounts so much (findmnt); unmount what nobody uses",
    )
}

fn interfaces(root: &Path) -> Finding {
    const WHAT: &str = "interfaces";
    let count = fs::read_dir(root.join("sys/class/net")).map_or(0, Iterator::count);
    if count < MANY_INTERFACES {
        return Finding::ok(WHAT, count.to_string());
    }
    hint(
        WHAT,
        format!("{count}: one lock is for all of them, and each start of a pod takes it"),
        "see whose they are (ip -br link); remove those that are left over, or run fewer pods on this host",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn hints(files: &[(&str, &str)]) -> Vec<&'static str> {
        let root = host(files);
        findings(root.path())
            .iter()
            .filter(|finding| finding.verdict != Verdict::Ok)
            .map(|finding| finding.what)
            .collect()
    }

    const CGROUP: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate";

    #[test]
    fn a_host_in_order_has_no_hints() {
        let mounts = format!("{CGROUP},favordynmods 0 0\n");

        let found = hints(&[
            ("sys/module/kvm/parameters/nx_huge_pages", "never\n"),
            ("proc/self/mounts", &mounts),
            ("sys/kernel/mm/ksm/run", "0\n"),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always [madvise] never\n",
            ),
        ]);

        assert!(found.is_empty(), "{found:?}");
        assert!(hints(&[]).is_empty());
    }

    #[test]
    fn each_trap_is_found() {
        let mounts = format!("{CGROUP} 0 0\n");
        let many = "a mount\n".repeat(MANY_MOUNTS);

        let found = hints(&[
            ("sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "Not affected\n",
            ),
            ("proc/self/mounts", &mounts),
            ("sys/kernel/mm/ksm/run", "1\n"),
            (
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always madvise [never]\n",
            ),
            ("proc/self/mountinfo", &many),
        ]);

        assert_eq!(
            found,
            [
                "nx_huge_pages",
                "cgroup changes",
                "KSM",
                "huge pages",
                "mounts"
            ]
        );
    }

    #[test]
    fn a_processor_that_needs_it_keeps_small_pages() {
        let found = hints(&[
            ("sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "KVM: Mitigation: Split huge pages\n",
            ),
        ]);

        assert!(found.is_empty(), "{found:?}");
    }
}
