//! What Hull is to reach, as ratios within one run or as amounts, and whether it does.

use std::fmt;

use super::report::Report;
use super::{boot, clone, memory, start};

/// Where a figure is: the title of its table, and its row.
type Place = (&'static str, &'static str);

#[derive(Debug)]
pub struct Target {
    pub what: &'static str,
    ours: Place,
    /// None: the figure itself is what counts.
    peer: Option<Place>,
    at_most: f64,
    /// What would be better still.
    stretch: f64,
    unit: &'static str,
    /// Units of the table in one of the target's.
    scale: f64,
}

const fn ratio(what: &'static str, ours: Place, peer: Place, at_most: f64, stretch: f64) -> Target {
    Target {
        what,
        ours,
        peer: Some(peer),
        at_most,
        stretch,
        unit: "s",
        scale: 1.0,
    }
}

const fn amount(what: &'static str, ours: Place, scale: f64, at_most: f64, stretch: f64) -> Target {
    Target {
        what,
        ours,
        peer: None,
        at_most,
        stretch,
        unit: "MiB",
        scale,
    }
}

pub const TARGETS: [Target; 11] = [
    ratio(
        "boot, exec of the VMM to init, of Firecracker's",
        (boot::TITLE, boot::OURS),
        (boot::TITLE, boot::FIRECRACKER),
        1.0,
        0.8,
    ),
    ratio(
        "boot, exec of the VMM to init, of QEMU microvm's",
        (boot::TITLE, boot::OURS),
        (boot::TITLE, boot::QEMU),
        0.6,
        0.6,
    ),
    ratio(
        "cold pod to first output, of podman run with crun",
        (start::TITLE, start::COLD),
        (start::TITLE, start::PODMAN),
        0.5,
        0.5,
    ),
    ratio(
        "cold pod to first output, of runc run (a stretch)",
        (start::TITLE, start::COLD),
        (start::TITLE, start::RUNC),
        1.5,
        1.5,
    ),
    ratio(
        "pod from a template to first output, of runc run",
        (start::TITLE, start::TEMPLATE),
        (start::TITLE, start::RUNC),
        1.0,
        1.0,
    ),
    ratio(
        "pod from a template to first output, of crun run (a stretch)",
        (start::TITLE, start::TEMPLATE),
        (start::TITLE, start::CRUN),
        1.0,
        1.0,
    ),
    ratio(
        "clone alone to the agent's answer, of Firecracker's restore",
        (clone::TITLE, clone::OURS),
        (clone::TITLE, clone::FIRECRACKER),
        0.7,
        0.4,
    ),
    amount(
        "hull-vmm without guest RAM, PSS",
        (memory::TITLE, memory::VMM),
        1024.0,
        5.0,
        3.0,
    ),
    amount(
        "supervisor, PSS",
        (memory::TITLE, memory::SUPERVISOR),
        1024.0,
        5.0,
        3.0,
    ),
    amount(
        "one more idle cloned pod, processes and own guest memory",
        (memory::MORE_TITLE, memory::MORE),
        1.0,
        12.0,
        8.0,
    ),
    amount(
        "100 idle cloned pods, each answering exec",
        (memory::MANY_TITLE, memory::MANY),
        1.0,
        2048.0,
        2048.0,
    ),
];

/// How a target and what was measured compare.
#[derive(Debug)]
pub struct Verdict {
    pub ours: Option<f64>,
    pub peer: Option<f64>,
    /// What is compared with the goal: a ratio or an amount.
    pub figure: Option<f64>,
    pub goal: f64,
    pub word: &'static str,
    unit: &'static str,
}

impl Target {
    #[must_use]
    pub fn judge(&self, report: &Report) -> Verdict {
        let median = |(title, name): Place| report.median(title, name);
        let ours = median(self.ours).map(|value| value / self.scale);
        let peer = self.peer.and_then(median);
        let figure = match self.peer {
            None => ours,
            Some(_) => ours.zip(peer).map(|(ours, peer)| ours / peer),
        };
        let word = match figure {
            None => "not measured",
            Some(figure) if figure <= self.stretch && self.stretch < self.at_most => {
                "met, and its stretch"
            }
            Some(figure) if figure <= self.at_most => "met",
            Some(_) => "not met",
        };
        Verdict {
            ours,
            peer,
            figure,
            goal: self.at_most,
            word,
            unit: self.unit,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.2}"));
        let ratio = if self.unit == "s" { self.figure } else { None };
        write!(
            f,
            "{:>9} {:>9} {:>7} {:>7}   {}",
            shown(self.ours),
            shown(self.peer),
            shown(ratio),
            format!("{:.1}", self.goal),
            self.word
        )
    }
}
