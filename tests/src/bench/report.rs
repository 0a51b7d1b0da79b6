//! All that was measured: printed as it comes, and written as JSON.

use std::path::Path;

use serde_json::{Value, json};

use super::build::Build;
use super::options::Options;
use super::series::Series;
use super::targets::{TARGETS, Verdict};

/// One measurement of several contenders.
#[derive(Debug)]
pub struct Table {
    title: String,
    unit: &'static str,
    rows: Vec<Series>,
}

impl Table {
    #[must_use]
    pub fn new(title: &str, unit: &'static str, rows: Vec<Series>) -> Self {
        Self {
            title: title.to_owned(),
            unit,
            rows,
        }
    }

    /// What ratios are to: the first that was measured. Amounts of memory are of different things.
    fn base(&self) -> Option<f64> {
        if matches!(self.unit, "KiB" | "MiB") {
            return None;
        }
        self.rows.iter().find_map(Series::median)
    }

    fn print(&self) {
        println!("\n{}", self.title);
        println!(
            "  {:58} {:>10} {:5} {:>6}   {:21} least .. greatest",
            "", "median", "", "ratio", "quartiles"
        );
        for row in &self.rows {
            let measured = (row.median(), row.quartiles(), row.spread());
            let (Some(median), Some((low, high)), Some((least, most))) = measured else {
                let why = row.absent.as_deref().unwrap_or("not measured");
                println!("  {:58} {why}", row.name);
                continue;
            };
            let ratio = self
                .base()
                .map_or(String::new(), |base| format!("{:.2}", median / base));
            println!(
                "  {:58} {median:10.3} {:5} {ratio:>6}   {:21} {least:.3} .. {most:.3}",
                row.name,
                self.unit,
                format!("{low:.3} .. {high:.3}"),
            );
        }
    }

    fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name,
                    "median": row.median(),
                    "ratio": row.median().zip(self.base()).map(|(median, base)| median / base),
                    "quartiles": row.quartiles(),
                    "spread": row.spread(),
                    "values": row.values,
                    "absent": row.absent,
                })
            })
            .collect();
        json!({"title": self.title, "unit": self.unit, "rows": rows})
    }
}

/// What a run has found.
#[derive(Debug)]
pub struct Report {
    head: Vec<(&'static str, String)>,
    tables: Vec<Table>,
    notes: Vec<String>,
}

impl Report {
    #[must_use]
    pub fn new(options: &Options, builds: &[Build]) -> Self {
        let first_line = |path: &str, prefix: &str| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(prefix));
            line.unwrap_or_default().to_owned()
        };
        let processor = first_line("/proc/cpuinfo", "model name");
        let processor = processor.split(": ").nth(1).unwrap_or_default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let guests: Vec<_> = builds
            .iter()
            .map(|build| build.guest.display().to_string())
            .collect();
        Self {
            head: vec![
                ("processors", format!("{processors} x {processor}")),
                ("kernel", first_line("/proc/version", "")),
                ("guest", guests.join(", ")),
                ("rounds", options.rounds().to_string()),
            ],
            tables: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Where it is measured.
    pub fn print_head(&self) {
        for (what, value) in &self.head {
            println!("{what:10} {value}");
        }
        println!("Ratios are to the first of each table.");
    }

    pub fn add(&mut self, table: Table) {
        table.print();
        self.tables.push(table);
    }

    pub fn note(&mut self, text: &str) {
        println!("\n{text}");
        self.notes.push(text.to_owned());
    }

    /// The median of what was measured under this title and name. None: it was not.
    #[must_use]
    pub fn median(&self, title: &str, name: &str) -> Option<f64> {
        let table = self.tables.iter().find(|table| table.title == title)?;
        let row = table.rows.iter().find(|row| row.name == name)?;
        row.median()
    }

    /// The table of targets.
    pub fn print_targets(&self) {
        println!("\nTargets");
        println!(
            "  {:60} {:>9} {:>9} {:>7} {:>7}   verdict",
            "", "ours", "peer", "ratio", "target"
        );
        for target in &TARGETS {
            let verdict = target.judge(self);
            println!("  {:60} {verdict}", target.what);
        }
    }

    /// # Panics
    /// When the file can't be written.
    pub fn write(&self, file: &Path) {
        let head: serde_json::Map<String, Value> = self
            .head
            .iter()
            .map(|(what, value)| ((*what).to_owned(), value.as_str().into()))
            .collect();
        let targets: Vec<Value> = TARGETS
            .iter()
            .map(|target| {
                let Verdict {
                    ours,
                    peer,
                    figure,
                    goal,
                    word,
                    ..
                } = target.judge(self);
                json!({
                    "what": target.what,
                    "ours": ours,
                    "peer": peer,
                    "figure": figure,
                    "target": goal,
                    "verdict": word,
                })
            })
            .collect();
        let tables: Vec<Value> = self.tables.iter().map(Table::json).collect();
        let all = json!({
            "machine": head,
            "tables": tables,
            "notes": self.notes,
            "targets": targets,
        });
        std::fs::write(file, format!("{all:#}\n"))
            .unwrap_or_else(|error| panic!("writing {}: {error}", file.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(tables: Vec<Table>) -> Report {
        Report {
            head: Vec::new(),
            tables,
            notes: Vec::new(),
        }
    }

    fn row(name: &str, value: f64) -> Series {
        let mut series = Series::new(name);
        series.add(value);
        series
    }

    #[test]
    fn targets_are_judged_by_what_was_measured() {
        use super::super::{boot, memory};
        let boots = vec![row(boot::QEMU, 10.0), row(boot::OURS, 5.0)];
        let idle = vec![row(memory::VMM, 4096.0), row(memory::SUPERVISOR, 9999.0)];
        let report = report(vec![
            Table::new(boot::TITLE, "s", boots),
            Table::new(memory::TITLE, "KiB", idle),
        ]);

        let words: Vec<_> = TARGETS
            .iter()
            .map(|target| target.judge(&report).word)
            .collect();

        let none = "not measured";
        let wanted = [
            none, "met", none, none, none, none, none, "met", "not met", none, none,
        ];
        assert_eq!(words, wanted);
    }

    #[test]
    fn what_is_written_has_all_that_was_measured() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("bench.json");
        let mut absent = Series::new("b");
        absent.absent = Some("not given".to_owned());
        let table = Table::new("title", "s", vec![row("a", 2.0), absent, row("c", 3.0)]);

        report(vec![table]).write(&file);

        let text = std::fs::read_to_string(&file).unwrap();
        let written: Value = serde_json::from_str(&text).unwrap();
        let rows = &written["tables"][0]["rows"];
        assert_eq!(rows[2]["ratio"], 1.5);
        assert_eq!(rows[1]["absent"], "not given");
        assert_eq!(written["targets"].as_array().unwrap().len(), TARGETS.len());
    }
}
