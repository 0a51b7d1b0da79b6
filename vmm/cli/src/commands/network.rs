//! `hull network`: the named networks that pods can be in.

use std::collections::BTreeMap;

use clap::Subcommand;
use hull_pod::networks::{Creation, Network, Networks};
use serde_json::{Value, json};

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, OutputArgs, age, print_table, print_value, row};
use crate::pods::list;

/// Manage the networks that pods can be in
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(CreateArgs),
    Ls(LsArgs),
    Inspect(InspectArgs),
    Rm(RmArgs),
}

/// Define a network, and print its name
///
/// Its bridge is made when the first pod comes, and goes with the last.
#[derive(Debug, clap::Args)]
struct CreateArgs {
    /// Of letters, digits, '_', '.' and '-'
    name: String,
    /// Addresses, as 10.1.2.0/24; at most one range for IPv4 and one for IPv6 [default: a free one of 10.83.0.0/16]
    #[arg(long = "subnet", value_name = "ADDRESS/PREFIX")]
    subnets: Vec<String>,
    /// The host's own address in the subnet of the same position [default: the first]
    #[arg(long = "gateway", value_name = "ADDRESS")]
    gateways: Vec<String>,
    /// IPv6 addresses as well, of a random local prefix if there is no --subnet for them
    #[arg(long)]
    ipv6: bool,
    /// No way out of the network
    #[arg(long)]
    internal: bool,
    /// Pods aren't found by their names
    #[arg(long)]
    disable_dns: bool,
    /// The largest packet, in bytes [default: the bridge's, 1500]
    #[arg(long, value_name = "N")]
    mtu: Option<u32>,
    /// How pods are connected
    #[arg(short, long, value_name = "DRIVER", default_value = "bridge", value_parser = ["bridge"])]
    driver: String,
    /// Set a label
    #[arg(short, long = "label", value_name = "NAME=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
}

/// List networks
#[derive(Debug, clap::Args)]
#[command(visible_alias = "list")]
struct LsArgs {
    /// Only names
    #[arg(short, long, conflicts_with = "output")]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Show all that is known of networks, and the pods in them
#[derive(Debug, clap::Args)]
struct InspectArgs {
    #[arg(required = true, value_name = "NETWORK")]
    networks: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove networks that no pod is in
#[derive(Debug, clap::Args)]
#[command(visible_alias = "remove")]
struct RmArgs {
    #[arg(required = true, value_name = "NETWORK")]
    networks: Vec<String>,
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    if name.is_empty() {
        return Err("not NAME=VALUE".to_owned());
    }
    Ok((name.to_owned(), value.to_owned()))
}

pub fn run(host: &Host, args: Args) -> Result<(), Failure> {
    let networks = Networks::open(&host.directories)?;
    match args.command {
        Command::Create(args) => create(&networks, args),
        Command::Ls(args) => ls(&networks, &args),
        Command::Inspect(args) => inspect(&networks, &args),
        Command::Rm(args) => rm(&networks, &args),
    }
}

fn create(networks: &Networks, args: CreateArgs) -> Result<(), Failure> {
    let network = networks.create(&Creation {
        name: args.name,
        subnets: args.subnets,
        gateways: args.gateways,
        ipv6: args.ipv6,
        internal: args.internal,
        disable_dns: args.disable_dns,
        mtu: args.mtu,
        labels: args.labels.into_iter().collect::<BTreeMap<_, _>>(),
    })?;
    println!("{}", network.name);
    Ok(())
}

fn ls(networks: &Networks, args: &LsArgs) -> Result<(), Failure> {
    let all = networks.list()?;
    if args.quiet {
        let rows: Vec<_> = all.iter().map(|network| row([&network.name])).collect();
        return print_table(&rows);
    }
    match args.output.output {
        Some(format @ (Format::Json | Format::Yaml)) => {
            let items = all
                .iter()
                .map(|network| shown(networks, network))
                .collect::<Result<_, _>>()?;
            print_value(&list(items, true), format)
        }
        format => {
            let rows = all
                .iter()
                .map(|network| {
                    let pods = networks.users(&network.name)?;
                    Ok(cells(network, &pods, format == Some(Format::Wide)))
                })
                .collect::<Result<Vec<_>, Failure>>()?;
            print_table(&table(rows, format == Some(Format::Wide)))
        }
    }
}

fn table(rows: Vec<Vec<String>>, wide: bool) -> Vec<Vec<String>> {
    let mut header = row(["NAME", "DRIVER", "SUBNETS", "PODS", "AGE"]);
    if wide {
        header.extend(row(["INTERFACE", "INTERNAL", "DNS", "MTU"]));
    }
    [vec![header], rows].concat()
}

fn cells(network: &Network, pods: &[String], wide: bool) -> Vec<String> {
    let subnets: Vec<String> = network
        .subnets
        .iter()
        .map(|subnet| subnet.subnet.to_string())
        .collect();
    let mut cells = vec![
        network.name.clone(),
        "bridge".to_owned(),
        subnets.join(","),
        pods.len().to_string(),
        age(network.created),
    ];
    if wide {
        cells.extend([
            network.network_interface.clone(),
            network.internal.to_string(),
            network.dns_enabled.to_string(),
            network
                .options
                .get("mtu")
                .map_or("-", String::as_str)
                .to_owned(),
        ]);
    }
    cells
}

fn inspect(networks: &Networks, args: &InspectArgs) -> Result<(), Failure> {
    let items = args
        .networks
        .iter()
        .map(|name| shown(networks, &networks.find(name)?))
        .collect::<Result<_, Failure>>()?;
    print_value(
        &list(items, false),
        args.output.output.unwrap_or(Format::Json),
    )
}

/// A definition as it is, with the pods that are in the network.
fn shown(networks: &Networks, network: &Network) -> Result<Value, Failure> {
    let mut value = json!(network);
    if let Some(fields) = value.as_object_mut() {
        fields.insert("pods".to_owned(), json!(networks.users(&network.name)?));
    }
    Ok(value)
}

fn rm(networks: &Networks, args: &RmArgs) -> Result<(), Failure> {
    for name in &args.networks {
        networks.remove(name)?;
        println!("{name}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_may_have_no_value() {
        assert_eq!(parse_label("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(parse_label("a"), Ok(("a".into(), String::new())));
        assert!(parse_label("=b").is_err());
    }
}
