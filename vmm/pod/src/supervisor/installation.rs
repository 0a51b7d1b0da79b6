//! Where Hull's own files are: `hull-vmm`, and the guest's kernel and initramfs.
//!
//! Found by the environment of whoever starts Hull, by the configuration, and by where its executable lies; a manifest
//! has no say in it.

use std::env;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::configuration::Configuration;

/// The files that make a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installation {
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum InstallationError {
    #[error("{name} is not there (looked at {places}); {remedy}")]
    Missing {
        name: &'static str,
        places: String,
        remedy: &'static str,
    },
}

impl InstallationError {
    /// What the user can do.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        let Self::Missing { remedy, .. } = self;
        remedy
    }
}

impl Installation {
    /// # Errors
    /// When a file is missing; says where it was looked for.
    pub fn find(configuration: &Configuration) -> Result<Self, InstallationError> {
        let beside = env::current_exe()
            .ok()
            .and_then(|exe| Some(exe.parent()?.to_owned()));
        let vmm = Self::find_vmm(
            env::var_os("HULL_VMM").map(PathBuf::from),
            beside.as_deref(),
        )?;
        let (kernel, initramfs) = Self::find_guest(
            env::var_os("HULL_GUEST_DIR").map(PathBuf::from),
            configuration,
            beside.as_deref(),
        )?;
        Ok(Self {
            vmm,
            kernel,
            initramfs,
        })
    }

    fn find_vmm(
        named: Option<PathBuf>,
        beside: Option<&Path>,
    ) -> Result<PathBuf, InstallationError> {
        let candidates = match (named, beside) {
            (Some(named), _) => vec![named],
            (None, Some(beside)) => {
                vec![beside.join("hull-vmm"), beside.join("../libexec/hull-vmm")]
            }
            (None, None) => vec![PathBuf::from("/usr/libexec/hull-vmm")],
        };
        first("hull-vmm", candidates, "set HULL_VMM to its path")
    }

    /// A directory that the environment names is the only one looked at, and then a file that the configuration
    /// names.
    fn find_guest(
        named: Option<PathBuf>,
        configuration: &Configuration,
        beside: Option<&Path>,
    ) -> Result<(PathBuf, PathBuf), InstallationError> {
        const REMEDY: &str = "install Hull (scripts/install), make the guest image (guest-image/build), or set \
                              HULL_GUEST_DIR to its directory";
        let find = |name: &'static str, configured: &Option<PathBuf>| {
            let candidates = match (&named, configured) {
                (Some(directory), _) => vec![directory.join(name)],
                (None, Some(file)) => vec![file.clone()],
                (None, None) => beside
                    .map(|beside| beside.join("../share/hull"))
                    .into_iter()
                    .chain([PathBuf::from("/usr/share/hull")])
                    .map(|directory| directory.join(name))
                    .collect(),
            };
            first(name, candidates, REMEDY)
        };
        Ok((
            find("vmlinux", &configuration.kernel)?,
            find("initramfs.cpio", &configuration.initramfs)?,
        ))
    }
}

fn first(
    name: &'static str,
    candidates: Vec<PathBuf>,
    remedy: &'static str,
) -> Result<PathBuf, InstallationError> {
    let places: Vec<String> = candidates.iter().map(|p| p.display().to_string()).collect();
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| InstallationError::Missing {
            name,
            places: places.join(", "),
            remedy,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_directory_is_the_only_one() {
        let root = tempfile::tempdir().unwrap();
        let guest = root.path().join("../share/hull");

        let missing = Installation::find_guest(
            Some(root.path().into()),
            &Configuration::default(),
            Some(root.path()),
        );

        let message = missing.unwrap_err().to_string();
        assert!(message.contains(&root.path().display().to_string()));
        assert!(!message.contains(&guest.display().to_string()), "{message}");
    }

    #[test]
    fn the_guest_is_found_by_the_executable() {
        let root = tempfile::tempdir().unwrap();
        let (bin, share) = (root.path().join("bin"), root.path().join("share/hull"));
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir_all(&share).unwrap();
        std::fs::write(share.join("vmlinux"), "").unwrap();
        std::fs::write(share.join("initramfs.cpio"), "").unwrap();

        let configuration = Configuration {
            initramfs: Some(share.join("initramfs.cpio")),
            ..Configuration::default()
        };

        let (kernel, initramfs) =
            Installation::find_guest(None, &configuration, Some(&bin)).unwrap();

        assert_eq!(kernel, bin.join("../share/hull/vmlinux"));
        assert_eq!(Some(initramfs), configuration.initramfs);
    }
}
