//! Series of measurements, and their ratios to the first of them.

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
