//! What a pod's beginning asks for, done ahead in a machine that becomes a template.
//!
//! A container is made as they all are, and removed. What that touches first is there for its clones then: the kernel's
//! caches, its code and this program's, the seccomp filter and the device program of most containers.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hull_protocol::agent::{CreateContainerRequest, PidNamespace};

use rustix::mount::{MountFlags, UnmountFlags, unmount};

use super::Pod;
use super::infra::mount_tmpfs;
use crate::container::cgroup::Cgroup;
use crate::error::{Doing, Error, Result};

/// Of the container, which is none of the pod's.
const NAME: &str = "rehearsal";
/// Beneath the share, which is not mounted yet.
const ROOT: &str = "rootfs/rehearsal";
/// See the protocol's GetReadyRequest.
const PROGRAM: &str = "program";

impl Pod {
    /// Makes infra's namespaces, and a container of this specification, if there is one, only to remove it.
    pub async fn rehearse(self: &Arc<Self>, spec: Vec<u8>) -> Result<()> {
        // The share isn't mounted, and isn't until this is over.
        if self.infra_claimed.swap(true, Ordering::AcqRel) {
            return Err(Error::State("the pod has begun".into()));
        }
        let rehearsed = async {
            self.get_ready().await?;
            if spec.is_empty() {
                return Ok(());
            }
            let stage = Stage::make(&self.run.join("share"))?;
            let request = CreateContainerRequest {
                container_id: NAME.into(),
                spec,
                rootfs: ROOT.into(),
                pid_namespace: PidNamespace::OWN.into(),
                ..Default::default()
            };
            let made = self.make_and_remove(request).await;
            made.and(stage.remove())
        }
        .await;
        self.infra_claimed.store(false, Ordering::Release);
        rehearsed
    }

    async fn make_and_remove(self: &Arc<Self>, request: CreateContainerRequest) -> Result<()> {
        let cgroup = Cgroup::create_beside(NAME)?;
        // Infra has no process yet: this one's namespaces are as good.
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let container = Arc::new(self.make_container(request, cgroup, own).await?);
        container.cgroup.kill()?;
        container.first.process.ended().await;
        self.clear_away(&container).await
    }
}

/// The container's root file system: in memory, where that of a container is.
struct Stage {
    root: PathBuf,
}

impl Stage {
    fn make(share: &Path) -> Result<Self> {
        let root = share.join(ROOT);
        let doing = || format!("making {}", root.display());
        fs::create_dir_all(&root).doing(doing)?;
        mount_tmpfs(&root, 1 << 20, 0o755, MountFlags::empty())?;
        let stage = Self { root };
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(stage.root.join(PROGRAM))
            .doing(|| format!("making {PROGRAM} in {}", stage.root.display()))?;
        Ok(stage)
    }

    fn remove(self) -> Result<()> {
        let removing = || format!("removing {}", self.root.display());
        // With its container it is gone already.
        let _ = unmount(&self.root, UnmountFlags::DETACH);
        fs::remove_dir(&self.root).doing(removing)?;
        // Empty but where a test has others.
        let _ = self.root.parent().map(fs::remove_dir);
        Ok(())
    }
}
