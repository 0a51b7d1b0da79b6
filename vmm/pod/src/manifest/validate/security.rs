//! Rules for security contexts.

use std::collections::BTreeSet;
use std::str::FromStr;

use k8s_openapi::api::core::v1::{
    Capabilities, PodSecurityContext, SeccompProfile, SecurityContext, Sysctl,
};
use oci_spec::runtime::Capability;

use super::super::problem::{FieldPath, Problems};
use super::{one_of, within};

/// User and group ids, as Kubernetes bounds them.
const IDS: std::ops::RangeInclusive<i64> = 0..=i32::MAX as i64;

/// Sysctls that belong to the pod's own namespaces. The guest's kernel is the pod's alone, but all
/// others would change it for the agent, too, which has to go on when the containers misbehave.
const SYSCTL_PREFIXES: &[&str] = &["kernel.shm", "kernel.msg", "fs.mqueue.", "net."];
const SYSCTL_NAMES: &[&str] = &["kernel.sem"];
/// What the agent takes of them.
const MAX_SYSCTLS: usize = 256;
const MAX_SYSCTL_NAME: usize = 256;
const MAX_SYSCTL_VALUE: usize = 1024;

pub fn pod(context: &PodSecurityContext, path: &FieldPath, problems: &mut Problems) {
    within(problems, path.field("runAsUser"), context.run_as_user, IDS);
    within(
        problems,
        path.field("runAsGroup"),
        context.run_as_group,
        IDS,
    );
    within(problems, path.field("fsGroup"), context.fs_group, IDS);
    for (index, group) in context.supplemental_groups.iter().flatten().enumerate() {
        within(
            problems,
            path.field("supplementalGroups").index(index),
            Some(*group),
            IDS,
        );
    }
    seccomp(context.seccomp_profile.as_ref(), path, problems);
    non_root(context.run_as_non_root, context.run_as_user, path, problems);
    sysctls(
        context.sysctls.as_deref().unwrap_or_default(),
        &path.field("sysctls"),
        problems,
    );
}

fn sysctls(sysctls: &[Sysctl], path: &FieldPath, problems: &mut Problems) {
    if sysctls.len() > MAX_SYSCTLS {
        problems.add(path.clone(), format!("must be at most {MAX_SYSCTLS}"));
    }
    let mut names = BTreeSet::new();
    for (index, sysctl) in sysctls.iter().enumerate() {
        let at = path.index(index).field("name");
        let plain = sysctl.name.replace('/', ".");
        let clean = plain.len() <= MAX_SYSCTL_NAME
            && plain.split('.').all(|part| {
                !part.is_empty()
                    && part
                        .bytes()
                        .all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
            });
        let of_the_pod = SYSCTL_NAMES.contains(&plain.as_str())
            || SYSCTL_PREFIXES
                .iter()
                .any(|prefix| plain.starts_with(prefix));
        if !clean {
            problems.add(
                at,
                "must be a name of letters, digits, '_' and '-', in parts joined by '.'",
            );
        } else if !of_the_pod {
            problems.add(
                at,
                "belongs to no namespace of the pod; only kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.* and net.* do",
            );
        } else if !names.insert(plain) {
            problems.add(at, "is set twice");
        }
        if sysctl.value.len() > MAX_SYSCTL_VALUE {
            problems.add(
                path.index(index).field("value"),
                format!("must be at most {MAX_SYSCTL_VALUE} bytes"),
            );
        }
    }
}

pub fn container(context: &SecurityContext, path: &FieldPath, problems: &mut Problems) {
    within(problems, path.field("runAsUser"), context.run_as_user, IDS);
    within(
        problems,
        path.field("runAsGroup"),
        context.run_as_group,
        IDS,
    );
    seccomp(context.seccomp_profile.as_ref(), path, problems);
    non_root(context.run_as_non_root, context.run_as_user, path, problems);
    let Some(capabilities) = &context.capabilities else {
        return;
    };
    check_capabilities(capabilities, &path.field("capabilities"), problems);
    let adds_admin = capabilities
        .add
        .iter()
        .flatten()
        .any(|name| matches!(name.as_str(), "SYS_ADMIN" | "CAP_SYS_ADMIN"));
    if adds_admin && context.allow_privilege_escalation == Some(false) {
        problems.add(
            path.field("allowPrivilegeEscalation"),
            "can't be false for a container with the capability SYS_ADMIN",
        );
    }
}

fn check_capabilities(capabilities: &Capabilities, path: &FieldPath, problems: &mut Problems) {
    for (list, names) in [("add", &capabilities.add), ("drop", &capabilities.drop)] {
        for (index, name) in names.iter().flatten().enumerate() {
            let plain = name.strip_prefix("CAP_").unwrap_or(name);
            if plain != "ALL" && Capability::from_str(plain).is_err() {
                problems.add(
                    path.field(list).index(index),
                    "is not a capability; write them as NET_ADMIN, or ALL",
                );
            }
        }
    }
}

fn seccomp(profile: Option<&SeccompProfile>, path: &FieldPath, problems: &mut Problems) {
    let at = path.field("seccompProfile.type");
    match profile.map(|profile| profile.type_.as_str()) {
        Some("Localhost") => {
            problems.add(at, "not supported yet; only RuntimeDefault or Unconfined")
        }
        profile => one_of(
            problems,
            at,
            profile,
            &["RuntimeDefault", "Unconfined", "Localhost"],
        ),
    }
}

fn non_root(non_root: Option<bool>, user: Option<i64>, path: &FieldPath, problems: &mut Problems) {
    if non_root == Some(true) && user == Some(0) {
        problems.add(
            path.field("runAsUser"),
            "can't be 0 where runAsNonRoot is true",
        );
    }
}
