//! A container is made: its files, cgroup and first process.

use std::sync::Arc;

use hull_protocol::agent::{CreateContainerRequest, PidNamespace};
use oci_spec::runtime::Spec;

use super::attach::Attached;
use super::{Pod, blocking, write_json};
use crate::container::cgroup::Cgroup;
use crate::container::disk;
use crate::container::mounts::{self, Placed};
use crate::container::seccomp::Filter;
use crate::container::spec::{self, Source};
use crate::container::user::{self, User};
use crate::container::{Container, Places, Root, Running, Slot, check_name, reserve};
use crate::error::{Error, Result};
use crate::helper::{self, Confinement, Request};
use crate::modules;
use crate::stdio::{Size, Until};

const MAX_CONTAINERS: usize = 256;

impl Pod {
    /// Makes a container up to where its program would start.
    pub async fn create(self: &Arc<Self>, request: CreateContainerRequest) -> Result<u32> {
        let id = request.container_id.clone();
        check_name("container", &id)?;
        let infra = self.infra()?;
        if infra.process.has_ended() {
            return Err(Error::State("infra has ended".into()));
        }
        let infra_pid = infra.process.pid.as_raw_nonzero().get();
        reserve(
            &mut self.containers(),
            "container",
            &id,
            MAX_CONTAINERS,
            "containers",
        )?;
        let made = match Cgroup::create(&id) {
            Ok(cgroup) => self.make_container(request, cgroup, infra_pid).await,
            Err(error) => Err(error),
        };
        let mut containers = self.containers();
        let container = match made {
            Ok(container) => container,
            Err(error) => {
                containers.remove(&id);
                return Err(error);
            }
        };
        let pid = container.first.process.pid.as_raw_nonzero();
        containers.insert(id, Slot::Ready(Arc::new(container)));
        drop(containers);
        if infra.process.has_ended() {
            self.kill_containers();
        }
        Ok(pid.get().unsigned_abs())
    }

    /// Makes a container in its group, and in the namespaces that this process has for infra.
    pub(super) async fn make_container(
        self: &Arc<Self>,
        request: CreateContainerRequest,
        cgroup: Cgroup,
        infra_pid: i32,
    ) -> Result<Container> {
        let cgroup = Arc::new(cgroup);
        let id = &request.container_id;
        let places = Places {
            bundle: self.run.join("containers").join(id),
            state: self.run.join("state").join(id),
        };
        let made = async {
            let numbers = request.streams.clone().unwrap_or_default();
            let size = Size::new(numbers.columns, numbers.rows)?;
            let claimed = self.claim(&numbers).await?;
            let prepared = {
                let (pod, places, cgroup) = (Arc::clone(self), places.clone(), Arc::clone(&cgroup));
                let request = request.clone();
                blocking(move || pod.prepare(&request, &places, &cgroup, infra_pid)).await?
            };
            let create = |console| {
                Request::Create(Box::new(helper::Create {
                    id: id.clone(),
                    states: self.run.join("state"),
                    bundle: places.bundle.clone(),
                    console,
                    confinement: prepared.confinement.clone(),
                }))
            };
            let attached = Attached {
                claimed,
                terminal: numbers.tty,
                console: places.bundle.join("console"),
                user: &prepared.user,
                filter: prepared.filter.as_deref(),
                until: Until::Closed,
            };
            let (process, terminal, streams) = self.run_helper(attached, create).await?;
            if let Some(terminal) = &terminal {
                terminal.resize(size)?;
            }
            let first = Running::new(process, terminal, streams, Arc::clone(&cgroup), true);
            Ok((prepared, first))
        };
        match made.await {
            Ok((prepared, first)) => Ok(Container::new(
                places,
                cgroup,
                prepared.spec,
                prepared.filter,
                first,
                prepared.root,
            )),
            Err(error) => {
                for cleaned in [cgroup.remove().await, places.remove()] {
                    if let Err(also) = cleaned {
                        tracing::warn!("after a failed start: {also}");
                    }
                }
                Err(error)
            }
        }
    }

    /// A process whose PID namespace the container is to have. None: it gets one of its own.
    fn pids_of(&self, request: &CreateContainerRequest) -> Result<Option<i32>> {
        let wanted = request
            .pid_namespace
            .enum_value()
            .map_err(|number| Error::Invalid(format!("{number} is no PID namespace")))?;
        if wanted == PidNamespace::OWN {
            return Ok(None);
        }
        let infra = self.infra()?;
        let process = match wanted {
            PidNamespace::DEFAULT if infra.share_pids => infra.process.clone(),
            PidNamespace::DEFAULT | PidNamespace::OWN => return Ok(None),
            PidNamespace::INFRA if infra.share_pids => infra.process.clone(),
            PidNamespace::INFRA => {
                return Err(Error::State("infra holds no PID namespace".into()));
            }
            PidNamespace::CONTAINER => {
                let target = self.container(&request.pid_target)?;
                if target.first.has_ended() {
                    return Err(Error::State(format!(
                        "container {:?}, whose processes are to be seen, has ended",
                        request.pid_target
                    )));
                }
                target.first.process.clone()
            }
        };
        Ok(Some(process.pid.as_raw_nonzero().get()))
    }

    /// Everything on disk and in the cgroup that the container needs.
    fn prepare(
        &self,
        request: &CreateContainerRequest,
        places: &Places,
        cgroup: &Cgroup,
        infra_pid: i32,
    ) -> Result<Prepared> {
        let spec::Given {
            spec: given,
            seccomp,
        } = spec::parse(&request.spec)?;
        let filter = seccomp
            .map(|profile| self.filters.get(&profile))
            .transpose()?;
        places.make()?;
        let share = self.run.join("share");
        let from = match request.disk.as_ref() {
            Some(disk) => {
                let place = self.run.join("disks").join(&request.container_id);
                Root::Disk(disk::mount_at(disk, place)?)
            }
            None => Root::Share(request.rootfs.clone()),
        };
        let root = match &from {
            Root::Share(path) => mounts::open_shared(&share, path)?,
            Root::Disk(mounted) => mounts::open_directory(&mounted.place)?,
        };
        mounts::check_root(&root)?;
        let mut user = user::look_up(&root, &request.user, &request.additional_gids)?;
        if request.exact_groups {
            user.groups.clone_from(&request.additional_gids);
        }
        if let Some(process) = given.process() {
            mounts::make_directory(&root, process.cwd()).or_else(|error| {
                let read_only = given
                    .root()
                    .as_ref()
                    .and_then(|root| root.readonly())
                    .unwrap_or(false);
                if read_only { Ok(()) } else { Err(error) }
            })?;
        }
        let mut placed = vec![mounts::place(&root, places.bundle.join("rootfs"))?];
        let mut wanted = spec::mounts(&given)?;
        for (index, mount) in wanted.iter_mut().enumerate() {
            let fd = match spec::source(mount)? {
                Source::New => continue,
                Source::Share(path) => mounts::open_shared(&share, path)?,
                Source::Memory(path) => mounts::open_memory(&self.run.join("memory"), path)?,
                Source::Shm => mounts::open_directory(&self.run.join("shm"))?,
            };
            let place = mounts::place(fd, places.bundle.join(format!("mounts/{index}")))?;
            spec::bind(mount, &place.path);
            placed.push(place);
        }
        let spec = spec::complete(
            &given,
            spec::Guest {
                root: places.bundle.join("rootfs"),
                cgroup: &cgroup.name,
                infra_pid,
                pids_of: self.pids_of(request)?,
                user: &user,
                terminal: request.streams.tty,
                mounts: wanted,
            },
        )?;
        if spec::may_change_network(&spec) {
            modules::load_for_iptables();
        }
        let mut written = spec.clone();
        let confinement = match written.process_mut() {
            Some(process) => spec::confine(process, filter.as_deref()),
            None => Confinement::default(),
        };
        write_json(&places.bundle.join("config.json"), &written)?;
        let rules = spec
            .linux()
            .iter()
            .filter_map(|linux| linux.resources().as_ref())
            .filter_map(|resources| resources.devices().as_deref())
            .flatten()
            .cloned()
            .collect::<Vec<_>>();
        self.devices.attach(cgroup.open()?, &rules)?;
        Ok(Prepared {
            spec,
            filter,
            confinement,
            user,
            _placed: placed,
            root: from,
        })
    }
}

/// What comes out of [`Pod::prepare`].
struct Prepared {
    spec: Spec,
    filter: Option<Arc<Filter>>,
    confinement: Confinement,
    user: User,
    /// Held until the container has its own copies.
    _placed: Vec<Placed>,
    /// Unmounted after those.
    root: Root,
}
