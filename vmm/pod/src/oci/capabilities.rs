//! The capabilities of a container.

use std::str::FromStr;

use k8s_openapi::api::core::v1::Container;
use oci_spec::OciSpecError;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, LinuxCapabilitiesBuilder};

/// What a container has when the manifest says nothing; the same as under containerd.
const DEFAULT: &[Capability] = &[
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// All that Linux has.
const ALL: &[Capability] = &[
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// The default ones, less those dropped, plus those added; ALL in either list comes
/// first, so that `drop: [ALL], add: [X]` leaves X.
pub fn of(container: &Container) -> Capabilities {
    let changes = container
        .security_context
        .as_ref()
        .and_then(|context| context.capabilities.as_ref());
    let names = |list: Option<&Vec<String>>| -> Vec<String> {
        let plain = |name: &String| name.strip_prefix("CAP_").unwrap_or(name).to_owned();
        list.into_iter().flatten().map(plain).collect()
    };
    let add = names(changes.and_then(|changes| changes.add.as_ref()));
    let drop = names(changes.and_then(|changes| changes.drop.as_ref()));
    let mut set: Capabilities = DEFAULT.iter().copied().collect();
    if add.iter().any(|name| name == "ALL") {
        set = ALL.iter().copied().collect();
    }
    if drop.iter().any(|name| name == "ALL") {
        set.clear();
    }
    // The manifest's check has refused other names.
    let known = |names: &[String]| -> Vec<Capability> {
        names
            .iter()
            .filter_map(|name| Capability::from_str(name).ok())
            .collect()
    };
    set.extend(known(&add));
    for capability in known(&drop) {
        set.remove(&capability);
    }
    set
}

/// Nothing is inheritable: it would come back to programs with file capabilities.
pub fn sets(capabilities: &Capabilities) -> Result<LinuxCapabilities, OciSpecError> {
    LinuxCapabilitiesBuilder::default()
        .bounding(capabilities.clone())
        .effective(capabilities.clone())
        .permitted(capabilities.clone())
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Capabilities as Changes, SecurityContext};

    use super::*;

    fn with(add: &[&str], drop: &[&str]) -> Capabilities {
        let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let capabilities = Some(Changes {
            add: list(add),
            drop: list(drop),
        });
        let security_context = Some(SecurityContext {
            capabilities,
            ..Default::default()
        });
        of(&Container {
            security_context,
            ..Default::default()
        })
    }

    #[test]
    fn what_is_added_and_dropped() {
        assert_eq!(of(&Container::default()).len(), 14);
        assert!(with(&["NET_ADMIN"], &[]).contains(&Capability::NetAdmin));
        assert!(!with(&[], &["CAP_MKNOD"]).contains(&Capability::Mknod));
        assert_eq!(
            with(&["NET_BIND_SERVICE"], &["ALL"]),
            [Capability::NetBindService].into()
        );
        assert_eq!(with(&["ALL"], &[]).len(), 41);
        assert_eq!(with(&["ALL"], &["SYS_ADMIN"]).len(), 40);
    }

    #[test]
    fn nothing_is_inheritable_or_ambient() {
        let sets = sets(&of(&Container::default())).unwrap();
        assert_eq!(sets.inheritable().as_ref().map(|set| set.len()), Some(0));
        assert_eq!(sets.ambient().as_ref().map(|set| set.len()), Some(0));
    }
}
