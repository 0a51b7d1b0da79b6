//! Tables for people, JSON and YAML for programs.

use std::io::{self, Write};

use clap::ValueEnum;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::failure::Failure;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Json,
    Yaml,
    /// The table, with more columns.
    Wide,
}

/// Where `-o` is all that a command has to say about its output.
#[derive(Debug, clap::Args)]
pub struct OutputArgs {
    /// Instead of a table
    #[arg(short, long, value_name = "FORMAT")]
    pub output: Option<Format>,
}

/// Prints as JSON or YAML.
pub fn print_value(value: &impl Serialize, format: Format) -> Result<(), Failure> {
    let text = match format {
        Format::Yaml => {
            serde_saphyr::to_string(value).map_err(|e| Failure::Format(e.to_string()))?
        }
        Format::Json | Format::Wide => {
            let mut text =
                serde_json::to_string_pretty(value).map_err(|e| Failure::Format(e.to_string()))?;
            text.push('\n');
            text
        }
    };
    print_text(&text)
}

/// Prints; a reader that has gone is no error worth a word.
pub fn print_text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Failure::io("printing", e))
}

/// Prints columns as wide as they need to be.
pub fn print_table(rows: &[Vec<String>]) -> Result<(), Failure> {
    print_text(&table(rows))
}

fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|n| {
            rows.iter()
                .filter_map(|row| row.get(n))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A row of a table.
pub fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.into_iter().map(str::to_owned).collect()
}

/// How long ago, as kubectl shows it: `12s`, `5m3s`, `3h12m`, `2d`.
pub fn age(since: Timestamp) -> String {
    short(Timestamp::now().duration_since(since))
}

fn short(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => format!("{minutes}m{}s", seconds % 60),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => format!("{hours}h{}m", minutes % 60),
        28_800..172_800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

/// Bytes as people say them.
pub fn size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut tenths = u128::from(bytes) * 10;
    let mut unit = 0;
    while tenths >= 10_000 && unit + 1 < units.len() {
        tenths /= 1000;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{}.{} {}", tenths / 10, tenths % 10, units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [row(["NAME", "STATUS"]), row(["a-long-name", "Running"])];

        assert_eq!(
            table(&rows),
            "NAME          STATUS\na-long-name   Running\n"
        );
    }

    #[test]
    fn ages_are_short() {
        let ages: Vec<String> = [5, 119, 185, 3600, 11_000, 100_000, 200_000]
            .into_iter()
            .map(|s| short(SignedDuration::from_secs(s)))
            .collect();

        assert_eq!(ages, ["5s", "119s", "3m5s", "60m", "3h3m", "27h", "2d"]);
    }

    #[test]
    fn sizes_are_round() {
        assert_eq!(size(999), "999 B");
        assert_eq!(size(1_250_000), "1.2 MB");
        assert_eq!(size(u64::MAX), "18446744.0 TB");
    }
}
