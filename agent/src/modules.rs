//! Kernel modules: those of the machine's devices are loaded at the start, the others of the
//! image when the kernel asks for them.
//!
//! The kernel asks by starting the program that the sysctl kernel.modprobe names, as
//! `modprobe -q -- ALIAS`, in the agent's root and with all rights. Containers cause that (a
//! socket of a family, a rule of a netfilter table), so what can be loaded is what the image's
//! table lists, and nothing else.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount};

use crate::error::{Doing, Result};

/// Loaded at the start, and the list of them, in order.
const AT_START: &str = "/modules";
/// Loaded on demand, in the initramfs, and in the agent's root.
const ON_DEMAND: &str = "/modules-on-demand";
/// In that directory: an alias a line, and the files to load for it, in order.
const TABLE: &str = "aliases";
/// Where the kernel finds this program. Its name tells the role.
const HELPER: &str = "/modprobe";
/// What an own process is called for [`main`].
pub const HELPER_NAME: &str = "modprobe";

/// Largest list or table, in bytes.
const MAX_LIST: u64 = 256 * 1024;
/// The kernel's MODULE_NAME_LEN.
const MAX_ALIAS: usize = 64;

/// Loads the modules that the list names, in its order.
pub fn load_at_start() -> Result<()> {
    let directory = Path::new(AT_START);
    // Without one the kernel has everything built in.
    let Some(list) = read(&directory.join("load"))? else {
        return Ok(());
    };
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        // A device that this machine does not have; what needs it will say so.
        if let Err(error) = load(&directory.join(name)) {
            eprintln!("hull-agent: {error}");
        }
    }
    // Their memory is the guest's again.
    fs::remove_dir_all(directory).doing(|| format!("removing {}", directory.display()))
}

/// Keeps the modules for later below `root`, which is about to become the root.
pub fn keep_on_demand(root: &str) -> Result<()> {
    if !Path::new(ON_DEMAND).join(TABLE).exists() {
        return Ok(());
    }
    let kept = format!("{root}{ON_DEMAND}");
    let doing = || format!("mounting {kept}");
    fs::create_dir(&kept).doing(doing)?;
    mount_bind(ON_DEMAND, &kept).doing(doing)?;
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    mount_remount(&kept, flags, c"").doing(doing)?;
    mount_change(&kept, MountPropagationFlags::PRIVATE).doing(doing)
}

/// Tells the kernel to ask this program. The calling process is process 1, in its final root.
pub fn serve_requests() -> Result<()> {
    if !Path::new(ON_DEMAND).exists() {
        return Ok(());
    }
    std::os::unix::fs::symlink("/proc/1/exe", HELPER).doing(|| format!("making {HELPER}"))?;
    fs::write("/proc/sys/kernel/modprobe", HELPER).doing(|| "setting sysctl kernel.modprobe".into())
}

/// Loads what legacy iptables needs and never makes the kernel ask for: it calls a modprobe of
/// its own, which a container has not. Tables, matches and targets the kernel asks for itself.
pub fn load_for_iptables() {
    for alias in ["ip_tables", "ip6_tables"] {
        if let Err(error) = load_for(alias, Path::new(ON_DEMAND)) {
            tracing::warn!("{error}");
        }
    }
}

/// Answers one request of the kernel.
pub fn main() -> ExitCode {
    let loaded = match std::env::args().next_back() {
        Some(alias) => load_for(&alias, Path::new(ON_DEMAND)),
        None => Ok(false),
    };
    match loaded {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // The kernel gives us no standard error; this goes to the console.
            if let Ok(mut log) = File::options().write(true).open("/dev/kmsg") {
                let _ = log.write_all(format!("hull-agent: {error}\n").as_bytes());
            }
            ExitCode::FAILURE
        }
    }
}

/// Loads what the directory's table has for an alias. Returns whether it has it.
fn load_for(alias: &str, directory: &Path) -> Result<bool> {
    if alias.len() > MAX_ALIAS {
        return Ok(false);
    }
    let table = read(&directory.join(TABLE))?.unwrap_or_default();
    let files = files_for(alias, &table);
    for file in &files {
        load(&directory.join(file))?;
    }
    Ok(!files.is_empty())
}

/// The files that the table lists for an alias, in load order.
fn files_for<'a>(alias: &str, table: &'a str) -> Vec<&'a str> {
    // Module names may be written either way, and the kernel does.
    let alias = alias.replace('-', "_");
    table
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| *name == alias)
        .flat_map(|(_, files)| files.split(' '))
        .collect()
}

fn load(path: &Path) -> Result<()> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .doing(|| format!("opening {}", path.display()))?;
    match rustix::system::finit_module(file.as_fd(), c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error).doing(|| format!("loading module {}", path.display())),
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    let mut text = String::new();
    match File::open(path) {
        Ok(file) => {
            file.take(MAX_LIST)
                .read_to_string(&mut text)
                .doing(|| format!("reading {}", path.display()))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).doing(|| format!("opening {}", path.display())),
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIASES: &str = "nf_tables nfnetlink.ko nf_tables.ko\n\
        nfnetlink_subsys_10 nfnetlink.ko nf_tables.ko\n\
        nft_chain_2_nat nfnetlink.ko nf_tables.ko nft_chain_nat.ko\n\
        both first.ko\n\
        both second.ko\n";

    #[test]
    fn an_alias_names_its_files_in_load_order() {
        assert_eq!(
            files_for("nft-chain-2-nat", ALIASES),
            ["nfnetlink.ko", "nf_tables.ko", "nft_chain_nat.ko"]
        );
        assert_eq!(
            files_for("nf_tables", ALIASES),
            ["nfnetlink.ko", "nf_tables.ko"]
        );
        assert_eq!(files_for("both", ALIASES), ["first.ko", "second.ko"]);
    }

    #[test]
    fn what_is_not_in_the_table_names_no_file() {
        for alias in [
            "",
            "nf",
            "nf_tables nfnetlink.ko",
            "../x",
            "first.ko",
            "*",
            "\n",
        ] {
            assert!(files_for(alias, ALIASES).is_empty(), "{alias:?}");
        }
    }

    #[test]
    fn what_is_not_carried_is_not_loaded() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!load_for("nf_tables", directory.path()).unwrap());
        fs::write(directory.path().join(TABLE), ALIASES).unwrap();
        assert!(!load_for("floppy", directory.path()).unwrap());
        assert!(!load_for(&"x".repeat(65), directory.path()).unwrap());
        let missing = load_for("both", directory.path()).unwrap_err().to_string();
        assert!(missing.contains("first.ko"), "{missing}");
    }
}
