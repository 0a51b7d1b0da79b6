//! `hull template`: machines put aside, with which pods begin.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use clap::Subcommand;
use hull_pod::manifest;
use hull_pod::oci;
use hull_pod::supervisor::{self, HostNetwork, Installation, MAX_SLOTS, Order, Recipe};
use hull_pod::templates::{Failure as FailedTemplate, Kind, Policy, Summary, Templates};
use serde_json::{Value, json};
use tracing_subscriber::filter::LevelFilter;

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, OutputArgs, age, print_table, print_value, row, size};
use crate::pods::{list, runtime};

/// Manage the machines with which pods begin
///
/// A template is a machine that has booted and waits for a pod. One is made after the first pod of its kind has started,
/// and again when Hull, the guest image or the host's kernel has changed.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(CreateArgs),
    Ls(LsArgs),
    Rm(RmArgs),
}

/// Make templates ahead of the first pod, and print their ids
///
/// For the pods of FILE, or for pods without limits; also where one could not be made lately, which pods wait after.
#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// A file of Pods in YAML or JSON, or - for standard input
    file: Option<PathBuf>,
    /// Of the pods' networks; a pod of containerd has four more than its namespace
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(..=16))]
    interfaces: u8,
    /// Places for root file systems on disks; a pod of containerd with such has 16, a lone container 1
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=i64::from(MAX_SLOTS)))]
    disk_slots: u8,
    /// Whose pods begin with it; of containerd: NAMESPACE, or NAMESPACE/KUBERNETES-NAMESPACE
    #[arg(long, value_name = "NAME", default_value = supervisor::TENANT)]
    tenant: String,
}

/// List templates, and those that failed
#[derive(Debug, clap::Args)]
#[command(visible_alias = "list")]
struct LsArgs {
    /// Only ids
    #[arg(short, long, conflicts_with = "output")]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove templates, and what is known of failed ones; pods that began with them go on
#[derive(Debug, clap::Args)]
#[command(visible_alias = "remove")]
struct RmArgs {
    #[arg(required_unless_present = "all", value_name = "TEMPLATE")]
    ids: Vec<String>,
    /// All there are
    #[arg(short, long, conflicts_with = "ids")]
    all: bool,
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    match args.command {
        Command::Create(args) => create(host, args),
        Command::Ls(args) => ls(&templates(host)?, &args),
        Command::Rm(args) => rm(&templates(host)?, args),
    }
}

/// Is the process that makes a template, which a supervisor has started.
pub fn make() -> Result<(), Failure> {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(LevelFilter::INFO)
        .with_writer(io::stderr)
        .init();
    Ok(supervisor::make_ordered()?)
}

fn templates(host: &Host) -> Result<Templates, Failure> {
    Ok(Templates::open(host.directories.data())?)
}

fn create(host: &Host, args: CreateArgs) -> Result<(), Failure> {
    let configuration = host.configuration()?;
    let Some(tenant) = Policy::of(&configuration)?.owner(&args.tenant) else {
        return Err(Failure::Input(
            "templates are off (templates in the configuration, or HULL_TEMPLATES): no pod would begin with one".into(),
        ));
    };
    let sizing = configuration.sizing;
    let sizes = match args.file {
        Some(file) => manifest::load(&file)?
            .iter()
            .map(|manifest| oci::machine_size(manifest, sizing))
            .collect(),
        None => vec![oci::machine_size_for(&[oci::Amounts::default()], sizing)],
    };
    let installation = Installation::find(&configuration)?;
    let templates = templates(host)?;
    // By id: pods of one size need one.
    let mut wanted = BTreeMap::new();
    for size in sizes {
        let recipe = Recipe {
            installation: installation.clone(),
            limits: host.limits(),
            size,
            disk_slots: args.disk_slots,
            nets: HostNetwork::devices_for(args.interfaces.into(), size.vcpus),
        };
        let kind = recipe.kind(tenant.clone())?;
        wanted.insert(kind.id(), (kind, recipe));
    }
    for (id, (kind, recipe)) in wanted {
        if !matches!(templates.find(&kind), Ok(Some(_))) {
            let order = Order {
                data: host.directories.data().to_owned(),
                tenant: tenant.clone(),
                recipe,
            };
            runtime()?.block_on(order.make())?;
        }
        println!("{id}");
    }
    Ok(())
}

fn ls(templates: &Templates, args: &LsArgs) -> Result<(), Failure> {
    let all = templates.list()?;
    if args.quiet {
        let rows: Vec<_> = all.iter().map(|template| row([&template.id])).collect();
        return print_table(&rows);
    }
    let failed = templates.failures()?;
    match args.output.output {
        Some(format @ (Format::Json | Format::Yaml)) => {
            let items = all.iter().map(|template| json!(template));
            let items = items.chain(failed.iter().map(failed_item)).collect();
            print_value(&list(items, true), format)
        }
        format => print_table(&table(&all, &failed, format == Some(Format::Wide))),
    }
}

/// As templates have it, with why there is none.
fn failed_item(failure: &FailedTemplate) -> Value {
    let mut item = json!(failure.kind);
    let more = json!({
        "id": failure.kind.id(),
        "current": false,
        "failure": {
            "why": failure.why,
            "failedAt": failure.failed_at,
            "count": failure.count,
            "waitsUntil": failure.until(),
        },
    });
    if let (Value::Object(item), Value::Object(more)) = (&mut item, more) {
        item.extend(more);
    }
    item
}

fn table(all: &[Summary], failed: &[FailedTemplate], wide: bool) -> Vec<Vec<String>> {
    let mut header = row(["ID", "TENANT", "CPUS", "MEMORY", "SIZE", "USED", "STATUS"]);
    if wide {
        header.extend(row(["INTERFACES", "DISK SLOTS", "AGE", "REASON"]));
    }
    let cells = |kind: &Kind, shown: [String; 3], of_wide: [String; 2]| {
        let mut cells = vec![
            kind.id(),
            kind.tenant.clone(),
            kind.vcpus.to_string(),
            format!("{}Mi", kind.memory_mib),
        ];
        cells.extend(shown);
        if wide {
            cells.extend([kind.interfaces.to_string(), kind.disk_slots.to_string()]);
            cells.extend(of_wide);
        }
        cells
    };
    let rows = all.iter().map(|template| {
        let status = if template.current {
            "Current"
        } else {
            "Outdated"
        };
        cells(
            &template.kind,
            [
                size(template.size),
                age(template.last_used_at),
                status.to_owned(),
            ],
            [age(template.created_at), String::new()],
        )
    });
    let failed = failed.iter().map(|failure| {
        cells(
            &failure.kind,
            ["-".into(), "-".into(), "Failed".into()],
            [age(failure.failed_at), failure.why.clone()],
        )
    });
    std::iter::once(header).chain(rows).chain(failed).collect()
}

fn rm(templates: &Templates, args: RmArgs) -> Result<(), Failure> {
    let ids = if args.all {
        let failed = templates.failures()?.into_iter().map(|f| f.kind.id());
        let all = templates.list()?.into_iter().map(|t| t.id);
        all.chain(failed).collect()
    } else {
        args.ids
    };
    for id in ids {
        templates.remove(&id)?;
        println!("{id}");
    }
    Ok(())
}
