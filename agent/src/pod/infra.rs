//! The pod's beginning: its namespaces, and what its containers share.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hull_protocol::agent::StartInfraRequest;
use rustix::mount::{MountFlags, mount};
use tokio::sync::watch;

use super::{Infra, Pod, blocking};
use crate::container::{Exit, cgroup, check_name};
use crate::error::{Doing, Error, Result};
use crate::helper::{Request, infra};

const MAX_MEMORY_VOLUMES: usize = 256;
const MAX_SYSCTLS: usize = 256;
const DEFAULT_SHM: u64 = 64 * 1024 * 1024;

impl Pod {
    /// Starts infra and mounts what the pod's containers share.
    pub async fn start_infra(self: &Arc<Self>, request: StartInfraRequest) -> Result<u32> {
        let (interface_sysctls, sysctls) = check_infra(&request)?
            .into_iter()
            .partition(|(name, _)| infra::sysctl_interface(name).is_some());
        if self.infra_claimed.swap(true, Ordering::AcqRel) {
            return Err(Error::State("infra was started before".into()));
        }
        let pod = Arc::clone(self);
        let hostname = request.hostname.clone();
        let share_pids = request.share_process_namespace;
        blocking(move || pod.mount_volumes(&request)).await?;
        let request = Request::Infra(infra::Infra {
            hostname,
            share_pids,
            sysctls,
            cgroup_procs: cgroup::infra_procs(),
        });
        let process = self.helpers.call(&request, Vec::new()).await?;
        let pid = process.pid.as_raw_nonzero().get().unsigned_abs();
        let (sender, exit) = watch::channel(None);
        let ending = process.clone();
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let ended = ending.ended().await;
            tracing::info!("infra ended with {}", ended.code);
            pod.kill_containers();
            sender.send_replace(Some(Exit {
                ended,
                oom_killed: false,
            }));
        });
        let infra = Infra {
            process,
            share_pids,
            interface_sysctls,
            exit,
        };
        // The claim above makes this the only call.
        let _ = self.infra.set(infra);
        Ok(pid)
    }

    fn mount_volumes(&self, request: &StartInfraRequest) -> Result<()> {
        if !request.share_tag.is_empty() {
            let share = self.run.join("share");
            mount(
                request.share_tag.as_str(),
                &share,
                "virtiofs",
                // Not nosuid: the containers' root file systems are in there.
                MountFlags::NODEV,
                None,
            )
            .doing(|| format!("mounting the share {:?}", request.share_tag))?;
        }
        for volume in &request.memory_volumes {
            let path = self.run.join("memory").join(&volume.name);
            fs::create_dir(&path).doing(|| format!("making {}", path.display()))?;
            mount_tmpfs(&path, volume.size_bytes, 0o777, MountFlags::empty())?;
        }
        let shm = match request.shm_bytes {
            0 => DEFAULT_SHM,
            bytes => bytes,
        };
        mount_tmpfs(&self.run.join("shm"), shm, 0o1777, MountFlags::NOEXEC)
    }
}

fn check_infra(request: &StartInfraRequest) -> Result<BTreeMap<String, String>> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if request.hostname.is_empty()
        || request.hostname.len() > 64
        || !request.hostname.bytes().all(plain)
    {
        return Err(Error::Invalid(
            "the hostname is not of [A-Za-z0-9.-]".into(),
        ));
    }
    if request.memory_volumes.len() > MAX_MEMORY_VOLUMES {
        return Err(Error::TooMany {
            what: "memory volumes",
            limit: MAX_MEMORY_VOLUMES,
        });
    }
    for volume in &request.memory_volumes {
        check_name("memory volume", &volume.name)?;
    }
    if request.sysctls.len() > MAX_SYSCTLS {
        return Err(Error::TooMany {
            what: "sysctls",
            limit: MAX_SYSCTLS,
        });
    }
    let mut sysctls = BTreeMap::new();
    for (name, value) in &request.sysctls {
        if infra::sysctl_path(name).is_none() || value.len() > 1024 {
            return Err(Error::Invalid(format!(
                "sysctl {:?} is not one of the pod's own namespaces",
                crate::error::shorten(name, 100)
            )));
        }
        sysctls.insert(name.clone(), value.clone());
    }
    Ok(sysctls)
}

pub(super) fn mount_tmpfs(path: &Path, size: u64, mode: u32, flags: MountFlags) -> Result<()> {
    let options = match size {
        0 => format!("mode={mode:o}"),
        size => format!("mode={mode:o},size={size}"),
    };
    let options = std::ffi::CString::new(options)
        .map_err(|_| Error::Invalid("a memory volume's options can't hold a zero byte".into()))?;
    mount(
        "tmpfs",
        path,
        "tmpfs",
        flags | MountFlags::NODEV | MountFlags::NOSUID,
        options.as_c_str(),
    )
    .doing(|| format!("mounting {}", path.display()))
}
