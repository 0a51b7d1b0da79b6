//! Rules for what a Pod says of names, addresses and ports.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ContainerPort, Pod, PodDNSConfig, PodSpec};

use super::super::names;
use super::super::problem::{FieldPath, Problems};
use super::super::qualified_hostname;
use super::{form, one_of, within};

/// Kubernetes' bounds on `dnsConfig`.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCHES_LENGTH: usize = 2048;
/// The kernel's (uname(2)).
const MAX_KERNEL_HOSTNAME: usize = 64;

pub fn check(pod: &Pod, spec: &PodSpec, path: &FieldPath, problems: &mut Problems) {
    if spec.host_network == Some(true) {
        problems.add(
            path.field("hostNetwork"),
            "a pod is a machine of its own and can't be in the host's network; hostPort makes its ports the host's",
        );
    }
    hostname(pod, spec, path, problems);
    for (index, alias) in spec.host_aliases.iter().flatten().enumerate() {
        let at = path.field("hostAliases").index(index);
        address(&alias.ip, at.field("ip"), problems);
        for (index, hostname) in alias.hostnames.iter().flatten().enumerate() {
            form(
                problems,
                at.field("hostnames").index(index),
                hostname,
                names::SUBDOMAIN,
            );
        }
    }
    dns(spec, path, problems);
    let mut taken = Vec::new();
    let lists = [
        (
            "initContainers",
            spec.init_containers.as_deref().unwrap_or_default(),
        ),
        ("containers", &spec.containers),
    ];
    for (list, containers) in lists {
        for (index, container) in containers.iter().enumerate() {
            let at = path.field(list).index(index).field("ports");
            host_ports(container, &mut taken, &at, problems);
        }
    }
}

fn hostname(pod: &Pod, spec: &PodSpec, path: &FieldPath, problems: &mut Problems) {
    if let Some(hostname) = &spec.hostname {
        form(problems, path.field("hostname"), hostname, names::LABEL);
    }
    if let Some(subdomain) = spec.subdomain.as_deref().filter(|s| !s.is_empty()) {
        form(problems, path.field("subdomain"), subdomain, names::LABEL);
    }
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    if spec.set_hostname_as_fqdn == Some(true)
        && let Some(qualified) = qualified_hostname(name, namespace, spec)
        && qualified.len() > MAX_KERNEL_HOSTNAME
    {
        problems.add(
            path.field("setHostnameAsFQDN"),
            format!("the hostname would be {qualified}, longer than {MAX_KERNEL_HOSTNAME}"),
        );
    }
}

fn dns(spec: &PodSpec, path: &FieldPath, problems: &mut Problems) {
    one_of(
        problems,
        path.field("dnsPolicy"),
        spec.dns_policy.as_deref(),
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    );
    let servers = spec
        .dns_config
        .as_ref()
        .and_then(|c| c.nameservers.as_ref());
    if spec.dns_policy.as_deref() == Some("None") && servers.is_none_or(Vec::is_empty) {
        problems.add(
            path.field("dnsPolicy"),
            "needs at least one of dnsConfig.nameservers",
        );
    }
    if let Some(config) = &spec.dns_config {
        dns_config(config, &path.field("dnsConfig"), problems);
    }
}

fn dns_config(config: &PodDNSConfig, path: &FieldPath, problems: &mut Problems) {
    let servers = config.nameservers.as_deref().unwrap_or_default();
    let at = path.field("nameservers");
    if servers.len() > MAX_NAMESERVERS {
        problems.add(at.clone(), format!("must be at most {MAX_NAMESERVERS}"));
    }
    for (index, server) in servers.iter().enumerate() {
        address(server, at.index(index), problems);
    }
    let searches = config.searches.as_deref().unwrap_or_default();
    let at = path.field("searches");
    let length: usize = searches.iter().map(|search| search.len() + 1).sum();
    if searches.len() > MAX_SEARCHES || length > MAX_SEARCHES_LENGTH {
        problems.add(
            at.clone(),
            format!(
                "must be at most {MAX_SEARCHES}, and {MAX_SEARCHES_LENGTH} characters together"
            ),
        );
    }
    for (index, search) in searches.iter().enumerate() {
        // The root, and names that say that they begin there.
        let name = search.strip_suffix('.').unwrap_or(search);
        if search != "." {
            form(problems, at.index(index), name, names::SUBDOMAIN);
        }
    }
    for (index, option) in config.options.iter().flatten().enumerate() {
        let at = path.field("options").index(index);
        let word = |text: &str| text.bytes().all(|c| c.is_ascii_graphic());
        match option.name.as_deref() {
            None | Some("") => problems.add(at.field("name"), "is missing"),
            Some(name) if !word(name) || name.contains(':') => {
                problems.add(at.field("name"), "must be a word without ':'");
            }
            Some(_) => {}
        }
        if option.value.as_deref().is_some_and(|value| !word(value)) {
            problems.add(at.field("value"), "must be a word");
        }
    }
}

/// Kubernetes' rule: a port of the host is a Pod's once for each address and protocol. Whether another
/// Pod has it is found out when it is started.
fn host_ports<'a>(
    container: &'a Container,
    taken: &mut Vec<(&'a str, i32, &'a str)>,
    path: &FieldPath,
    problems: &mut Problems,
) {
    for (index, port) in container.ports.iter().flatten().enumerate() {
        let at = path.index(index);
        let ContainerPort {
            host_ip, host_port, ..
        } = port;
        let ip = host_ip.as_deref().unwrap_or_default();
        if !ip.is_empty() {
            address(ip, at.field("hostIP"), problems);
        }
        let at = at.field("hostPort");
        within(problems, at.clone(), host_port.map(i64::from), 0..=65535);
        let Some(number) = host_port.filter(|port| *port != 0) else {
            continue;
        };
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        if protocol == "SCTP" {
            problems.add(at.clone(), "not supported yet for SCTP; only TCP or UDP");
        }
        let key = (ip, number, protocol);
        if taken.contains(&key) {
            problems.add(at, "another port of the Pod has this port of the host");
        }
        taken.push(key);
    }
}

fn address(text: &str, path: FieldPath, problems: &mut Problems) {
    if text.parse::<IpAddr>().is_err() {
        problems.add(path, "must be an IP address");
    }
}
