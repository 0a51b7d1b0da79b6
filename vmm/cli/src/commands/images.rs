//! `hull images`: the local image store.

use hull_pod::images::{ImageSummary, Store};
use serde_json::json;

use crate::Host;
use crate::failure::Failure;
use crate::output::{Format, age, print_table, print_value, row, size};
use crate::pods::list;

/// List images
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only ids
    #[arg(short, long, conflicts_with = "output")]
    quiet: bool,
    #[command(flatten)]
    output: crate::output::OutputArgs,
}

pub fn run(host: &Host, args: &Args) -> Result<(), Failure> {
    let _ = host.registry()?;
    let images = Store::open(host.directories.data())?.list()?;
    if args.quiet {
        let rows: Vec<_> = images.iter().map(|image| row([&image.id])).collect();
        return print_table(&rows);
    }
    match args.output.output {
        Some(format @ (Format::Json | Format::Yaml)) => {
            let items = images.iter().map(|image| json!(image)).collect();
            print_value(&list(items, true), format)
        }
        format => print_table(&table(&images, format == Some(Format::Wide))),
    }
}

fn table(images: &[ImageSummary], wide: bool) -> Vec<Vec<String>> {
    let mut header = row(["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"]);
    if wide {
        header.push("DIGEST".into());
    }
    let mut rows = vec![header];
    for image in images {
        let (repository, tag) = image
            .reference
            .as_deref()
            .map_or(("<none>", "<none>"), split);
        let created = image.created.as_deref().and_then(|text| text.parse().ok());
        let mut cells = vec![
            repository.to_owned(),
            tag.to_owned(),
            short(&image.id),
            created.map_or_else(|| "-".into(), |at| format!("{} ago", age(at))),
            size(image.size),
        ];
        if wide {
            cells.push(image.digest.clone());
        }
        rows.push(cells);
    }
    rows
}

/// The tag is behind the last colon, unless that is a port's.
fn split(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') && !repository.contains('@') => {
            (repository, tag)
        }
        _ => (reference, "<none>"),
    }
}

fn short(id: &str) -> String {
    id.trim_start_matches("sha256:").chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_told_from_ports() {
        assert_eq!(
            split("docker.io/library/busybox:latest"),
            ("docker.io/library/busybox", "latest")
        );
        assert_eq!(split("host:5000/image"), ("host:5000/image", "<none>"));
    }
}
