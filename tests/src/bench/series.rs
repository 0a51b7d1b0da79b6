//! Series of measurements, taken in turns.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What one contender reached, round by round.
#[derive(Debug)]
pub struct Series {
    pub name: String,
    pub values: Vec<f64>,
    /// Why there are no values.
    pub absent: Option<String>,
}

impl Series {
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            values: Vec::new(),
            absent: None,
        }
    }

    pub fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    /// None: nothing was measured. Of an even number the mean of the two in the middle.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }

    /// The least and the greatest.
    #[must_use]
    pub fn spread(&self) -> Option<(f64, f64)> {
        Some((self.quantile(0.0)?, self.quantile(1.0)?))
    }

    /// A quarter of the values is below the first, and one above the second.
    #[must_use]
    pub fn quartiles(&self) -> Option<(f64, f64)> {
        Some((self.quantile(0.25)?, self.quantile(0.75)?))
    }

    /// By linear interpolation between neighbours.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a few values"
    )]
    fn quantile(&self, part: f64) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let place = part * last as f64;
        let below = sorted[place.floor() as usize];
        let above = sorted[place.ceil() as usize];
        Some(below + (above - below) * place.fract())
    }
}

/// KiB, MiB and the like.
#[expect(clippy::cast_precision_loss, reason = "far less than 2^52")]
#[must_use]
pub fn as_float(value: u64) -> f64 {
    value as f64
}

type Measure<'a> = Box<dyn FnMut(usize) -> f64 + 'a>;

/// Who is measured, if it can be.
pub struct Contender<'a> {
    name: String,
    measure: Result<Measure<'a>, String>,
}

impl std::fmt::Debug for Contender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contender")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<'a> Contender<'a> {
    /// `measure` is told the round, which is no other's.
    pub fn new(name: impl Into<String>, measure: impl FnMut(usize) -> f64 + 'a) -> Self {
        Self {
            name: name.into(),
            measure: Ok(Box::new(measure)),
        }
    }

    /// Only a line that says why.
    pub fn absent(name: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            measure: Err(why.into()),
        }
    }
}

/// Measures them in turns, each as often as there are rounds, and before that once to warm caches, if `warm`.
#[must_use]
pub fn interleave(rounds: usize, warm: bool, contenders: Vec<Contender<'_>>) -> Vec<Series> {
    let mut measures = Vec::new();
    let mut series: Vec<Series> = Vec::new();
    for contender in contenders {
        let mut one = Series::new(contender.name);
        measures.push(match contender.measure {
            Ok(measure) => Some(measure),
            Err(why) => {
                one.absent = Some(why);
                None
            }
        });
        series.push(one);
    }
    for round in 0..rounds + usize::from(warm) {
        for (measure, series) in measures.iter_mut().zip(&mut series) {
            let Some(measure) = measure else { continue };
            let value = measure(round);
            if round > 0 || !warm {
                series.add(value);
            }
        }
    }
    series
}

/// What becomes of a command that has printed what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It is waited for.
    End,
    Kill,
}

/// Seconds from the start of a command until it has printed `wanted`, which it must; then it is let end.
///
/// # Panics
/// When it can't be run or doesn't print that.
#[must_use]
pub fn until_printed(command: &mut Command, wanted: &str) -> f64 {
    until(command, wanted, Then::End)
}

/// The same for a command that may have to be killed.
///
/// # Panics
/// When it can't be run or doesn't print that.
#[must_use]
pub fn until(command: &mut Command, wanted: &str, then: Then) -> f64 {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut stderr = child.stderr.take().expect("a pipe");
    // A full pipe must not hold it up.
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    let mut printed = Vec::new();
    let mut chunk = [0; 4096];
    let time = loop {
        let read = stdout.read(&mut chunk).expect("a pipe");
        if read == 0 {
            panic!(
                "{command:?} printed {}\n{}",
                String::from_utf8_lossy(&printed),
                errors.join().unwrap_or_default()
            );
        }
        printed.extend_from_slice(&chunk[..read]);
        if String::from_utf8_lossy(&printed).contains(wanted) {
            break start.elapsed().as_secs_f64();
        }
    };
    if then == Then::Kill {
        let _ = child.kill();
    }
    let mut rest = Vec::new();
    let _ = stdout.read_to_end(&mut rest);
    let _ = child.wait();
    time
}

/// Seconds from the start of all these commands, at once, until the last of them has printed `wanted`.
///
/// # Panics
/// When one of them doesn't.
#[must_use]
pub fn until_all_printed(commands: Vec<Command>, wanted: &str) -> f64 {
    std::thread::scope(|scope| {
        let start = Instant::now();
        let running: Vec<_> = commands
            .into_iter()
            .map(|mut command| {
                scope.spawn(move || {
                    let begun = start.elapsed().as_secs_f64();
                    begun + until_printed(&mut command, wanted)
                })
            })
            .collect();
        let times = running
            .into_iter()
            .map(|one| one.join().expect("it prints"));
        times.fold(0.0, f64::max)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        let mut series = Series::new("x");
        assert_eq!(series.median(), None);
        for value in [4.0, 1.0, 3.0, 2.0] {
            series.add(value);
        }

        assert_eq!(series.median(), Some(2.5));
        assert_eq!(series.spread(), Some((1.0, 4.0)));
        assert_eq!(series.quartiles(), Some((1.75, 3.25)));
    }

    #[test]
    fn contenders_take_turns_and_the_first_round_only_warms() {
        let turns = std::cell::RefCell::new(Vec::new());
        let turn = &turns;
        let contender = |name: &'static str| {
            Contender::new(name, move |round| {
                turn.borrow_mut().push((name, round));
                if round == 0 { 100.0 } else { 1.0 }
            })
        };

        let series = interleave(
            2,
            true,
            vec![
                contender("a"),
                contender("b"),
                Contender::absent("c", "not given"),
            ],
        );

        let wanted = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)];
        assert_eq!(*turns.borrow(), wanted);
        assert_eq!(series[0].values, [1.0, 1.0]);
        assert_eq!(series[2].absent.as_deref(), Some("not given"));
    }

    #[test]
    fn a_command_is_timed_until_it_prints() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 0.2; echo ready; sleep 0.1"]);

        let time = until_printed(&mut command, "ready");

        assert!(time >= 0.2, "{time}");
    }

    #[test]
    #[should_panic(expected = "no such thing")]
    fn a_command_that_prints_something_else_fails() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such thing >&2"]);

        let _ = until_printed(&mut command, "ready");
    }
}
