//! Completes a container's OCI specification with what only the guest knows.
//!
//! What the supervisor may set is taken over; everything else is the agent's.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxBuilder, LinuxCapabilities, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, Mount, MountBuilder, Process, RootBuilder, Spec,
    SpecBuilder, UserBuilder,
};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::resources;
use super::seccomp::Filter;
use super::user::User;
use crate::error::{Error, Result};
use crate::helper::Confinement;

/// Largest specification, in bytes.
const MAX_SPEC: usize = 1024 * 1024;
/// Most mounts of a container.
const MAX_MOUNTS: usize = 512;
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// File systems that a container may mount anew.
const FILE_SYSTEMS: [&str; 7] = [
    "proc", "tmpfs", "devpts", "mqueue", "sysfs", "cgroup", "cgroup2",
];
const SHM: &str = "/dev/shm";

/// Where a mount comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// A path beneath the pod's share.
    Share(&'a str),
    /// A memory volume, and a path beneath it.
    Memory(&'a str),
    /// The pod's /dev/shm.
    Shm,
    /// A new file system.
    New,
}

/// What the guest adds to a specification.
#[derive(Debug)]
pub struct Guest<'a> {
    pub root: PathBuf,
    pub cgroup: &'a Path,
    pub infra_pid: i32,
    /// A process whose PID namespace the container gets. None: one of its own.
    pub pids_of: Option<i32>,
    pub user: &'a User,
    pub terminal: bool,
    pub mounts: Vec<Mount>,
}

/// A specification as the supervisor gives it.
#[derive(Debug)]
pub struct Given {
    /// Without a seccomp profile.
    pub spec: Spec,
    /// In JSON.
    pub seccomp: Option<String>,
}

/// Where in a specification the seccomp profile is, which mostly is the largest part and known already.
#[derive(Deserialize)]
struct Outline<'a> {
    #[serde(borrow, default)]
    linux: Option<LinuxOutline<'a>>,
}

#[derive(Deserialize)]
struct LinuxOutline<'a> {
    #[serde(borrow, default)]
    seccomp: Option<&'a RawValue>,
}

/// Reads a specification from the supervisor.
pub fn parse(bytes: &[u8]) -> Result<Given> {
    if bytes.len() > MAX_SPEC {
        return Err(Error::Invalid(format!(
            "the specification is larger than {MAX_SPEC} bytes"
        )));
    }
    let unreadable =
        |error: serde_json::Error| Error::Invalid(format!("reading the specification: {error}"));
    let outline: Outline<'_> = serde_json::from_slice(bytes).map_err(unreadable)?;
    let seccomp = outline
        .linux
        .and_then(|linux| linux.seccomp)
        .map(RawValue::get);
    let spec: Spec = match seccomp {
        None => serde_json::from_slice(bytes),
        Some(profile) => serde_json::from_slice(&without(bytes, profile)),
    }
    .map_err(unreadable)?;
    let mounts = spec.mounts().as_ref().map_or(0, Vec::len);
    if mounts > MAX_MOUNTS {
        return Err(Error::Invalid(format!(
            "the specification has more than {MAX_MOUNTS} mounts"
        )));
    }
    let args = spec
        .process()
        .as_ref()
        .and_then(|process| process.args().as_ref());
    if args.is_none_or(Vec::is_empty) {
        return Err(Error::Invalid("the specification has no arguments".into()));
    }
    Ok(Given {
        spec,
        seccomp: seccomp.map(str::to_owned),
    })
}

/// The same with null for a part of it.
fn without(bytes: &[u8], part: &str) -> Vec<u8> {
    let start = part.as_ptr().addr() - bytes.as_ptr().addr();
    let mut rest = bytes[..start].to_vec();
    rest.extend(b"null");
    rest.extend(&bytes[start + part.len()..]);
    rest
}

/// The container's mounts, with the pod's /dev/shm among them.
pub fn mounts(spec: &Spec) -> Result<Vec<Mount>> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if mounts
        .iter()
        .all(|mount| mount.destination() != Path::new(SHM))
    {
        let shm = MountBuilder::default()
            .destination(SHM)
            .typ("tmpfs")
            .source("shm")
            .options(vec!["nosuid".to_owned(), "nodev".into(), "noexec".into()])
            .build()
            .map_err(|error| Error::Invalid(error.to_string()))?;
        mounts.push(shm);
    }
    Ok(mounts)
}

/// Tells where a mount comes from.
pub fn source(mount: &Mount) -> Result<Source<'_>> {
    let destination = mount.destination();
    let refuse = |why: &str| {
        Err(Error::Invalid(format!(
            "mount {}: {why}",
            destination.display()
        )))
    };
    if !destination.is_absolute() {
        return refuse("its destination is not absolute");
    }
    let Some(text) = mount.source().as_ref().and_then(|path| path.to_str()) else {
        return refuse("it has no source");
    };
    if let Some(path) = text.strip_prefix("share:") {
        return Ok(Source::Share(path));
    }
    if let Some(path) = text.strip_prefix("memory:") {
        return Ok(Source::Memory(path));
    }
    let binds = mount
        .options()
        .iter()
        .flatten()
        .any(|option| option == "bind" || option == "rbind");
    let kind = mount.typ().as_deref().unwrap_or_default();
    if binds || !FILE_SYSTEMS.contains(&kind) {
        return refuse("only share:, memory: and new file systems can be mounted");
    }
    if destination == Path::new(SHM) && kind == "tmpfs" {
        return Ok(Source::Shm);
    }
    Ok(Source::New)
}

/// Turns a mount into a bind of `place`.
pub fn bind(mount: &mut Mount, place: &Path) {
    let mut options: Vec<String> = mount
        .options()
        .iter()
        .flatten()
        // A tmpfs's own, when the pod's /dev/shm takes its place.
        .filter(|option| !option.contains('='))
        .filter(|option| !matches!(option.as_str(), "bind" | "rbind"))
        .cloned()
        .collect();
    options.insert(0, "rbind".into());
    mount.set_options(Some(options));
    mount.set_typ(Some("bind".into()));
    mount.set_source(Some(place.to_owned()));
}

/// The whole specification.
pub fn complete(spec: &Spec, guest: Guest<'_>) -> Result<Spec> {
    let read_only = spec
        .root()
        .as_ref()
        .and_then(oci_spec::runtime::Root::readonly)
        .unwrap_or(false);
    let root = RootBuilder::default()
        .path(guest.root.clone())
        .readonly(read_only)
        .build()
        .map_err(invalid)?;
    let process = spec
        .process()
        .clone()
        .ok_or_else(|| Error::Invalid("the specification has no process".into()))?;
    let mut whole = SpecBuilder::default()
        .version("1.0.2")
        .root(root)
        .process(with_user(process, guest.user, guest.terminal)?)
        .mounts(guest.mounts.clone())
        .linux(linux(spec.linux().as_ref(), &guest)?)
        .build()
        .map_err(invalid)?;
    // Infra has the names; a builder's default would be set in its namespace.
    whole.set_hostname(None);
    whole.set_domainname(None);
    whole.set_hooks(None);
    Ok(whole)
}

/// Whether the container's processes may have CAP_NET_ADMIN.
pub fn may_change_network(spec: &Spec) -> bool {
    let capabilities = spec.process().as_ref().and_then(|process| {
        let capabilities = process.capabilities().as_ref()?;
        capabilities.bounding().as_ref()
    });
    capabilities.is_some_and(|bounding| bounding.contains(&Capability::NetAdmin))
}

/// The process of a container or an exec: its user, and an environment that has what
/// the runtime would otherwise guess from files of the container.
pub fn with_user(mut process: Process, user: &User, terminal: bool) -> Result<Process> {
    let oci = UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .additional_gids(user.groups.clone())
        .build()
        .map_err(invalid)?;
    process.set_user(oci);
    process.set_terminal(Some(terminal));
    process.set_console_size(None);
    // youki takes Some(false) for "set": it would load seccomp filters too late.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    let mut env = process.env().clone().unwrap_or_default();
    // Without HOME youki asks glibc, which may load libraries of the container.
    env.retain(|entry| entry != "HOME=");
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    if !env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.push(DEFAULT_PATH.into());
    }
    if terminal && !env.iter().any(|entry| entry.starts_with("TERM=")) {
        env.push("TERM=xterm".into());
    }
    process.set_env(Some(env));
    Ok(process)
}

/// Takes from a process what libcontainer is not to do for it, with this seccomp filter.
pub fn confine(process: &mut Process, filter: Option<&Filter>) -> Confinement {
    let mut capabilities = None;
    // Loading a filter needs CAP_SYS_ADMIN, or no_new_privileges.
    if filter.is_some() && process.no_new_privileges().is_none() {
        capabilities = process.capabilities().clone();
        process.set_capabilities(capabilities.clone().map(with_filter_loading));
    }
    Confinement {
        filter_flags: filter.map(|filter| filter.flags),
        capabilities,
    }
}

/// Adds what loading a filter, and dropping this again, needs.
fn with_filter_loading(mut given: LinuxCapabilities) -> LinuxCapabilities {
    use Capability::{Setpcap, SysAdmin};
    let with = |set: &Option<Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend([SysAdmin, Setpcap]);
        Some(set)
    };
    given.set_bounding(with(given.bounding()));
    given.set_effective(with(given.effective()));
    given.set_permitted(with(given.permitted()));
    given
}

fn linux(given: Option<&Linux>, guest: &Guest<'_>) -> Result<Linux> {
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces(guest)?)
        .cgroups_path(guest.cgroup)
        .build()
        .map_err(invalid)?;
    let resources = given.and_then(|given| given.resources().clone());
    linux.set_resources(resources.map(resources::checked).transpose()?);
    linux.set_masked_paths(given.and_then(|given| given.masked_paths().clone()));
    linux.set_readonly_paths(given.and_then(|given| given.readonly_paths().clone()));
    linux.set_sysctl(given.and_then(|given| given.sysctl().clone()));
    Ok(linux)
}

fn namespaces(guest: &Guest<'_>) -> Result<Vec<LinuxNamespace>> {
    use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    let of = |pid: i32, kind, name: &str| {
        LinuxNamespaceBuilder::default()
            .typ(kind)
            .path(format!("/proc/{pid}/ns/{name}"))
            .build()
            .map_err(invalid)
    };
    let infra = |kind, name: &str| of(guest.infra_pid, kind, name);
    let new = |kind| {
        LinuxNamespaceBuilder::default()
            .typ(kind)
            .build()
            .map_err(invalid)
    };
    Ok(vec![
        infra(Network, "net")?,
        infra(Ipc, "ipc")?,
        infra(Uts, "uts")?,
        match guest.pids_of {
            Some(pid) => of(pid, Pid, "pid")?,
            None => new(Pid)?,
        },
        new(Mount)?,
        new(Cgroup)?,
    ])
}

fn invalid(error: oci_spec::OciSpecError) -> Error {
    Error::Invalid(format!("completing the specification: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        parse(json.as_bytes()).unwrap().spec
    }

    #[test]
    fn a_seccomp_profile_is_taken_out() {
        let json = |profile: &str| {
            format!(
                r#"{{"ociVersion":"1.0.2","process":{{"args":["a"],"cwd":"/","user":{{"uid":0,"gid":0}}}},
                    "linux":{{"maskedPaths":["/proc/kcore"],"seccomp":{profile},"readonlyPaths":["/proc/sys"]}}}}"#
            )
        };
        let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW", "syscalls": [] }"#;

        let given = parse(json(profile).as_bytes()).unwrap();

        assert_eq!(given.seccomp.as_deref(), Some(profile));
        let linux = given.spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none());
        assert_eq!(linux.masked_paths().as_ref().unwrap().len(), 1);
        assert_eq!(linux.readonly_paths().as_ref().unwrap().len(), 1);
        assert!(parse(json("null").as_bytes()).unwrap().seccomp.is_none());
        // Which of the two counts nobody knows.
        for twice in [r#"{},"seccomp":{}"#, r#"{}},"linux":{"seccomp":null"#] {
            assert!(parse(json(twice).as_bytes()).is_err(), "{twice}");
        }
    }

    fn user() -> User {
        User {
            uid: 33,
            gid: 34,
            groups: vec![4],
            home: "/srv".into(),
        }
    }

    const SMALL: &str = r#"{"ociVersion":"1.0.2","process":{"args":["a"],"cwd":"/",
        "user":{"uid":0,"gid":0},"env":["HOME="],"noNewPrivileges":false},
        "hostname":"h","mounts":[],"linux":{"namespaces":[{"type":"user"}],
        "cgroupsPath":"/x","maskedPaths":["/proc/kcore"]},
        "hooks":{"prestart":[{"path":"/bin/evil"}]}}"#;

    fn completed() -> Spec {
        complete(
            &spec(SMALL),
            Guest {
                root: "/run/r".into(),
                cgroup: Path::new("/containers/c"),
                infra_pid: 7,
                pids_of: None,
                user: &user(),
                terminal: true,
                mounts: Vec::new(),
            },
        )
        .unwrap()
    }

    #[test]
    fn only_what_the_supervisor_may_set_is_taken_over() {
        let spec = completed();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(
            linux.cgroups_path().as_deref(),
            Some(Path::new("/containers/c"))
        );
        assert_eq!(
            linux.masked_paths().as_deref(),
            Some(["/proc/kcore".to_owned()].as_slice())
        );
        assert!(linux.readonly_paths().is_none());
        assert!(linux.devices().is_none());
        assert!(spec.hooks().is_none());
        assert!(spec.hostname().is_none());
    }

    #[test]
    fn namespaces_are_infras_but_for_those_of_its_own() {
        let spec = completed();
        let joined: Vec<String> = spec
            .linux()
            .iter()
            .flat_map(|linux| linux.namespaces().iter().flatten())
            .filter_map(|namespace| namespace.path().as_ref())
            .map(|path| path.display().to_string())
            .collect();
        assert_eq!(
            joined,
            ["/proc/7/ns/net", "/proc/7/ns/ipc", "/proc/7/ns/uts"]
        );
    }

    #[test]
    fn the_process_has_its_user_and_an_environment() {
        let spec = completed();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.user().uid(), 33);
        assert_eq!(
            process.user().additional_gids().as_deref(),
            Some([4].as_slice())
        );
        assert_eq!(process.no_new_privileges(), None);
        let env = process.env().clone().unwrap();
        assert_eq!(env, ["HOME=/srv", DEFAULT_PATH, "TERM=xterm"]);
    }

    fn mount(json: &str) -> Mount {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn sources_are_the_shares_the_memorys_or_new() {
        let volume = mount(r#"{"destination":"/d","source":"share:volumes/v","options":["ro"]}"#);
        assert_eq!(source(&volume).unwrap(), Source::Share("volumes/v"));
        let proc = mount(r#"{"destination":"/proc","type":"proc","source":"proc"}"#);
        assert_eq!(source(&proc).unwrap(), Source::New);
        let shm = mount(r#"{"destination":"/dev/shm","type":"tmpfs","source":"shm"}"#);
        assert_eq!(source(&shm).unwrap(), Source::Shm);
        for json in [
            r#"{"destination":"/d","type":"bind","source":"/","options":["rbind"]}"#,
            r#"{"destination":"/d","type":"tmpfs","source":"/","options":["bind"]}"#,
            r#"{"destination":"/d","type":"virtiofs","source":"hull"}"#,
            r#"{"destination":"/d","type":"ext4","source":"/dev/vda"}"#,
            r#"{"destination":"d","type":"tmpfs","source":"tmpfs"}"#,
        ] {
            assert!(source(&mount(json)).is_err(), "{json}");
        }
    }

    #[test]
    fn a_bind_keeps_its_flags_and_loses_a_tmpfs_options() {
        let mut shm = mount(
            r#"{"destination":"/dev/shm","type":"tmpfs","source":"shm",
                "options":["nosuid","mode=1777","size=64m","ro"]}"#,
        );
        bind(&mut shm, Path::new("/run/x"));
        assert_eq!(
            shm.options().as_deref(),
            Some(["rbind".to_owned(), "nosuid".into(), "ro".into()].as_slice())
        );
        assert_eq!(shm.typ().as_deref(), Some("bind"));
    }

    #[test]
    fn net_admin_changes_the_network() {
        let with = |capability: &str| {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","process":{{"cwd":"/","user":{{"uid":0,"gid":0}},
                    "capabilities":{{"bounding":["{capability}"]}}}}}}"#
            );
            may_change_network(&serde_json::from_str(&json).unwrap())
        };
        assert!(with("CAP_NET_ADMIN"));
        assert!(!with("CAP_NET_RAW"));
    }

    #[test]
    fn specifications_are_bounded() {
        assert!(parse(&vec![b' '; MAX_SPEC + 1]).is_err());
        assert!(parse(b"{\"ociVersion\":\"1.0.2\"}").is_err());
    }
}
