//! `hull ps`: the pods of this host.

use hull_pod::state::{ContainerStatus, Liveness, PodRecord, PodStatus};

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, age, print_table, print_value, row};
use crate::pods::{as_kubernetes, list, status_word};

/// List pods
#[derive(Debug, clap::Args)]
#[command(visible_alias = "pods")]
pub struct Args {
    /// Pods that have ended, too
    #[arg(short, long)]
    all: bool,
    /// Only ids
    #[arg(short, long, conflicts_with = "output")]
    quiet: bool,
    #[command(flatten)]
    output: crate::output::OutputArgs,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let mut pods = host.registry()?.list()?;
    pods.retain(|p| args.all || (p.liveness == Liveness::Alive && !p.status.phase.ended()));
    if args.quiet {
        let rows: Vec<_> = pods.iter().map(|p| row([p.status.id.as_str()])).collect();
        return print_table(&rows);
    }
    match args.output.output {
        Some(format @ (Format::Json | Format::Yaml)) => {
            let items = pods.iter().map(as_kubernetes).collect::<Result<_, _>>()?;
            print_value(&list(items, true), format)
        }
        format => print_table(&table(&pods, format == Some(Format::Wide))),
    }
}

fn table(pods: &[PodRecord], wide: bool) -> Vec<Vec<String>> {
    let mut header = row(["NAME", "READY", "STATUS", "RESTARTS", "AGE"]);
    if wide {
        header.extend(row([
            "IP",
            "NETWORKS",
            "PORTS",
            "ID",
            "SUPERVISOR",
            "VMM",
            "KERNEL",
            "IMAGES",
        ]));
    }
    let mut rows = vec![header];
    for pod in pods {
        let status = &pod.status;
        let counted: Vec<&ContainerStatus> = counted(status).collect();
        let ready = counted.iter().filter(|c| c.is_running()).count();
        let restarts: u32 = status.all_containers().map(|c| c.restart_count).sum();
        let mut cells = vec![
            status.name.clone(),
            format!("{ready}/{}", counted.len()),
            status_word(status),
            restarts.to_string(),
            age(status.created_at),
        ];
        if wide {
            let number = |n: Option<u32>| n.map_or_else(|| "-".into(), |n| n.to_string());
            let images: Vec<&str> = counted.iter().map(|c| c.image.as_str()).collect();
            cells.extend(network_cells(status));
            cells.extend([
                status.id.to_string(),
                number(status.supervisor_pid),
                number(status.vmm_pid),
                status.guest_kernel.clone().unwrap_or_else(|| "-".into()),
                images.join(","),
            ]);
        }
        rows.push(cells);
    }
    rows
}

/// The containers that are to run: those of the manifest, and of those that have joined the ones
/// that have not ended for good.
fn counted(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    let joined = status.joined.iter().filter(|c| !c.finished);
    status.containers.iter().chain(joined)
}

/// Addresses, networks and published ports.
fn network_cells(status: &PodStatus) -> [String; 3] {
    let shown = |texts: Vec<String>| match texts.as_slice() {
        [] => "-".to_owned(),
        texts => texts.join(","),
    };
    let addresses = status.pod_ips.iter().map(|ip| ip.ip.to_string()).collect();
    let Some(network) = &status.network else {
        return [shown(addresses), shown(vec![]), shown(vec![])];
    };
    let namespace = network
        .namespace
        .iter()
        .map(|path| format!("ns:{}", path.display()));
    let networks = network.names.iter().cloned().chain(namespace).collect();
    [
        shown(addresses),
        shown(networks),
        shown(network.ports.clone()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_pod::state::NetworkStatus;
    use serde_json::json;

    #[test]
    fn who_has_joined_counts_until_its_end() {
        let mut status: PodStatus = serde_json::from_value(json!({
            "id": "0123456789ab", "name": "web", "phase": "Running", "createdAt": "2026-01-01T00:00:00Z",
            "restartPolicy": "Always", "completed": false,
            "containerStatuses": [ContainerStatus::new("main", "busybox")],
            "ephemeralContainerStatuses": [ContainerStatus::new("shell", "busybox")],
        }))
        .unwrap();
        assert_eq!(counted(&status).count(), 2);

        status.joined[0].finished = true;
        assert_eq!(counted(&status).count(), 1);
    }

    #[test]
    fn networks_are_shown_where_there_are_any() {
        let mut status: PodStatus = serde_json::from_value(json!({
            "id": "0123456789ab", "name": "web", "phase": "Running", "createdAt": "2026-01-01T00:00:00Z",
            "restartPolicy": "Always", "completed": false, "containerStatuses": [],
        }))
        .unwrap();
        assert_eq!(network_cells(&status), ["-", "-", "-"]);

        status.set_addresses(&[[10, 83, 0, 2].into()]);
        status.network = Some(NetworkStatus {
            names: vec!["a".into(), "b".into()],
            namespace: None,
            ports: vec!["0.0.0.0:8080->80/tcp".into()],
        });
        assert_eq!(
            network_cells(&status),
            ["10.83.0.2", "a,b", "0.0.0.0:8080->80/tcp"]
        );
    }
}
