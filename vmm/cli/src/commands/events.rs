//! `hull events`: what happened to pods.

use std::time::Duration;

use hull_pod::events::{EventType, PodEvent, read};
use hull_pod::state::{Liveness, PodRecord};
use serde_json::{Value, json};

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, print_table, print_text, print_value, row};
use crate::pods::list;

/// How often new events are looked for.
const INTERVAL: Duration = Duration::from_millis(250);

/// Show what happened to pods
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id [default: all pods]
    pod: Option<String>,
    /// Wait for more, until the pod has ended
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    output: crate::output::OutputArgs,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    if args.follow {
        return follow(host, args);
    }
    let mut events = Vec::new();
    for record in records(host, args)? {
        for event in read(&record.dir)? {
            events.push((record.status.name.clone(), event));
        }
    }
    events.sort_by_key(|(_, event)| event.time);
    match args.output.output {
        Some(format @ (Format::Json | Format::Yaml)) => {
            let items = events.iter().map(|(pod, event)| value(pod, event));
            print_value(&list(items.collect(), true), format)
        }
        _ => {
            let mut rows = vec![row(["TIME", "TYPE", "REASON", "OBJECT", "MESSAGE"])];
            rows.extend(events.iter().map(|(pod, event)| cells(pod, event)));
            print_table(&rows)
        }
    }
}

fn records(host: &Host, args: &Args) -> Result<Vec<PodRecord>, Failure> {
    let registry = host.registry()?;
    Ok(match &args.pod {
        Some(pod) => vec![registry.find(pod)?],
        None => registry.list()?,
    })
}

/// One line for each, as it comes.
fn follow(host: &Host, args: &Args) -> Result<(), Failure> {
    let mut printed = std::collections::HashMap::new();
    loop {
        let records = match records(host, args) {
            // The pod was there, and has been removed.
            Err(_) if !printed.is_empty() => return Ok(()),
            records => records?,
        };
        let alive = records.iter().any(|r| r.liveness == Liveness::Alive);
        for record in &records {
            let last = printed.entry(record.status.id.clone()).or_insert(None);
            for event in read(&record.dir)? {
                if last.is_some_and(|last| event.time <= last) {
                    continue;
                }
                *last = Some(event.time);
                print_text(&line(&record.status.name, &event, args.output.output)?)?;
            }
        }
        if args.pod.is_some() && !alive {
            return Ok(());
        }
        std::thread::sleep(INTERVAL);
    }
}

fn line(pod: &str, event: &PodEvent, format: Option<Format>) -> Result<String, Failure> {
    Ok(match format {
        Some(Format::Json) => format!("{}\n", value(pod, event)),
        Some(Format::Yaml) => {
            let text = serde_saphyr::to_string(&value(pod, event))
                .map_err(|e| Failure::Format(e.to_string()))?;
            format!("---\n{text}")
        }
        _ => format!("{}\n", cells(pod, event).join("   ")),
    })
}

fn value(pod: &str, event: &PodEvent) -> Value {
    json!({
        "kind": "Event",
        "time": event.time,
        "type": event.kind,
        "reason": event.reason,
        "pod": pod,
        "container": event.container,
        "message": event.message,
    })
}

fn cells(pod: &str, event: &PodEvent) -> Vec<String> {
    let object = match &event.container {
        Some(container) => format!("{pod}/{container}"),
        None => pod.to_owned(),
    };
    let kind = match event.kind {
        EventType::Normal => "Normal",
        EventType::Warning => "Warning",
    };
    vec![
        format!("{:.3}", event.time),
        kind.into(),
        event.reason.clone(),
        object,
        event.message.clone(),
    ]
}
