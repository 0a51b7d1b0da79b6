//! A timeline as lines of text with bars, one below the other as time goes on.

use hull_pod::text::{cut, printable};
use hull_pod::timeline::Timeline;

/// Columns where there is no terminal.
pub const WIDE: u16 = 100;
/// Columns of the bars at least.
const BARS_MIN: usize = 10;
/// Of a name.
const NAME_MAX: usize = 40;
const EIGHTHS: [char; 8] = ['█', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// One line of it.
struct Line {
    stamp: &'static str,
    place: &'static str,
    name: String,
    at: u64,
    /// None: a moment.
    took: Option<u64>,
}

/// Draws it for a terminal that is so many `columns` wide.
pub fn draw(pod: &str, timeline: &Timeline, columns: usize) -> String {
    let lines = lines(timeline);
    let width = |text: fn(&Line) -> &str| {
        let widths = lines.iter().map(|line| text(line).chars().count());
        widths.max().unwrap_or(0)
    };
    let (places, names) = (width(|line| line.place), width(|line| &line.name));
    let labels = "T0  ".len() + places + 2 + names;
    // Two numbers of ten characters.
    let bars = columns.saturating_sub(labels + 22).max(BARS_MIN);
    let end = timeline.end().max(1);

    let mut text = format!(
        "{}   requested {:.3}\n",
        printable(pod.as_bytes()),
        timeline.requested
    );
    text.push_str(&format!("{:labels$}{:>10}{:>10}\n", "", "AT ms", "TOOK ms"));
    for line in &lines {
        let took = line.took.map(milliseconds).unwrap_or_default();
        let row = format!(
            "{:2}  {:places$}  {:names$}{:>10}{took:>10}  {}",
            line.stamp,
            line.place,
            line.name,
            milliseconds(line.at),
            bar(line, end, bars)
        );
        text.push_str(row.trim_end());
        text.push('\n');
    }
    let cpu = [
        ("supervisor", timeline.cpu.supervisor_micros),
        ("hull-vmm", timeline.cpu.vmm_micros),
    ];
    let used: Vec<String> = cpu
        .into_iter()
        .filter_map(|(name, used)| Some(format!("{name} {} ms", milliseconds(used?))))
        .collect();
    if !used.is_empty() {
        text.push_str(&format!("CPU time until T6: {}\n", used.join(", ")));
    }
    text
}

/// Stamps and steps as they came; a moment before what begins with it.
fn lines(timeline: &Timeline) -> Vec<Line> {
    let stamps = timeline.stamps.iter().map(|stamp| Line {
        stamp: stamp.stamp.name(),
        place: "",
        name: stamp.stamp.meaning().to_owned(),
        at: stamp.at_micros,
        took: None,
    });
    let steps = timeline.steps.iter().map(|step| Line {
        stamp: "",
        place: step.place.name(),
        name: printable(cut(&step.name, NAME_MAX).as_bytes()),
        at: step.at_micros,
        took: Some(step.took_micros),
    });
    let mut lines: Vec<Line> = stamps.chain(steps).collect();
    lines.sort_by_key(|line| line.at);
    lines
}

fn milliseconds(micros: u64) -> String {
    format!("{}.{}", micros / 1000, micros / 100 % 10)
}

/// At the line's place within `width` columns, which stand for all up to `end`.
fn bar(line: &Line, end: u64, width: usize) -> String {
    let eighths = |micros: u64| {
        let part = u128::from(micros) * width as u128 * 8 / u128::from(end);
        usize::try_from(part).unwrap_or(usize::MAX).min(width * 8)
    };
    let from = (eighths(line.at) / 8).min(width.saturating_sub(1));
    let mut bar = " ".repeat(from);
    let Some(took) = line.took else {
        bar.push('◆');
        return bar;
    };
    let to = eighths(line.at.saturating_add(took)).max(from * 8 + 1);
    let length = to - from * 8;
    bar.extend(std::iter::repeat_n('█', length / 8));
    if !length.is_multiple_of(8) {
        bar.push(EIGHTHS[length % 8]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use hull_pod::timeline::{CpuTime, Mark, Place, Stamp, Step};
    use jiff::Timestamp;

    use super::*;

    fn timeline() -> Timeline {
        let stamp = |stamp, at_micros| Stamp { stamp, at_micros };
        let step = |place, name: &str, at_micros, took_micros| Step {
            place,
            name: name.into(),
            at_micros,
            took_micros,
        };
        Timeline {
            requested: Timestamp::UNIX_EPOCH,
            stamps: vec![stamp(Mark::Request, 0), stamp(Mark::FirstRun, 50_000)],
            steps: vec![
                step(Place::Supervisor, "launch", 0, 50_000),
                step(Place::HullVmm, "jail", 25_000, 25_000),
                step(Place::Guest, "kernel", 50_000, 50_000),
            ],
            cpu: CpuTime {
                supervisor_micros: Some(12_340),
                vmm_micros: None,
            },
        }
    }

    #[test]
    fn bars_stand_where_and_as_long_as_things_took() {
        let drawn = draw("web", &timeline(), 70);

        assert_eq!(
            drawn,
            "\
web   requested 1970-01-01T00:00:00.000Z
                                  AT ms   TOOK ms
T0              request             0.0            ◆
    supervisor  launch              0.0      50.0  █████████▌
    hull-vmm    jail               25.0      25.0      █████▌
T1              first KVM_RUN      50.0                     ◆
    guest       kernel             50.0      50.0           ██████████
CPU time until T6: supervisor 12.3 ms
"
        );
    }

    #[test]
    fn nothing_in_a_file_breaks_the_terminal() {
        let mut odd = timeline();
        odd.steps[0].name = format!("\x1b[2J{}", "é".repeat(1000));
        odd.steps[1].at_micros = u64::MAX;
        odd.steps[1].took_micros = u64::MAX;

        for columns in [0, 1, 20, 80, 65_535] {
            let drawn = draw("\x1b]0;x", &odd, columns);
            assert!(!drawn.contains('\x1b'));
            // Numbers may be longer than their columns.
            let most = columns.max(100) + 20;
            assert!(drawn.lines().all(|line| line.chars().count() <= most));
        }
        odd.stamps.clear();
        odd.steps.clear();
        assert!(draw("none", &odd, 80).contains("none"));
    }
}
