//! Series of measurements, and their ratios to the first of them.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What one contender reached, round by round.
#[derive(Debug)]
pub struct Series {
    name: String,
    values: Vec<f64>,
}

impl Series {
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            values: Vec::new(),
        }
    }

    pub fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    /// # Panics
    /// When nothing was measured.
    #[must_use]
    pub fn median(&self) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    /// The least and the greatest.
    fn spread(&self) -> (f64, f64) {
        self.values
            .iter()
            .fold((f64::INFINITY, 0.0), |(least, greatest), value| {
                (value.min(least), value.max(greatest))
            })
    }
}

/// Prints each series, with its spread, and its ratio to the first.
pub fn print(title: &str, unit: &str, series: &[Series]) {
    let rounds = series.first().map_or(0, |first| first.values.len());
    println!("{title} (median of {rounds}, ratio to the first, least and greatest)");
    for one in series {
        let (least, greatest) = one.spread();
        println!(
            "  {:36} {:10.3} {unit:5} {:6.2}   {least:.3} .. {greatest:.3}",
            one.name,
            one.median(),
            one.median() / series[0].median(),
        );
    }
}

/// Seconds from the start of a command until it has printed `wanted`, which it must; then it is let end.
///
/// # Panics
/// When it can't be run or doesn't print that.
#[must_use]
pub fn until_printed(command: &mut Command, wanted: &str) -> f64 {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut printed = Vec::new();
    let mut chunk = [0; 4096];
    let time = loop {
        let read = stdout.read(&mut chunk).expect("a pipe");
        assert!(
            read > 0,
            "{command:?} printed {}",
            String::from_utf8_lossy(&printed)
        );
        printed.extend_from_slice(&chunk[..read]);
        if String::from_utf8_lossy(&printed).contains(wanted) {
            break start.elapsed().as_secs_f64();
        }
    };
    let mut rest = Vec::new();
    let _ = stdout.read_to_end(&mut rest);
    let _ = child.wait();
    time
}
