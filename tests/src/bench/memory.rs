//! What idle pods hold of the host's memory.

use std::time::Duration;

use super::build::Build;
use super::options::Options;
use super::report::{Report, Table};
use super::series::{Series, as_float};
use super::start::NO_TEMPLATES;
use crate::host;
use crate::hull::assert_success;
use crate::pod::{Pod, sleepers};

pub const TITLE: &str = "An idle pod with one container";
pub const MORE_TITLE: &str =
    "One more idle pod: its processes, and the guest memory that is its own";
pub const MANY_TITLE: &str = "Idle pods from one template, each answering exec";
pub const VMM: &str = "hull-vmm without guest RAM, PSS";
pub const SUPERVISOR: &str = "supervisor, PSS";
pub const MORE: &str = "from a template";
/// The row of as many pods as there are by default.
pub const MANY: &str = "100 pods: all processes and guests, PSS";
/// Until free pages have been given back.
const SETTLES: Duration = Duration::from_secs(4);
const MIB: f64 = 1024.0;

/// An idle pod.
fn start<'a>(build: &'a Build, template: bool, name: &str) -> Pod<'a> {
    let text = sleepers(name, &[("one", "")], "");
    let manifest = build.hull.manifest(&format!("{name}.yaml"), &text);
    let args = ["-d", "--network", "none"];
    let output = build.run(template, &args, &manifest).output();
    assert_success(&output.expect("hull is there"), "hull run -d");
    Pod::running(&build.hull, name)
}

/// The memory of a pod's `hull-vmm` and of its supervisor.
fn of(pod: &Pod<'_>) -> [host::Memory; 2] {
    ["vmmPid", "supervisorPid"].map(|which| host::memory(pod.pid(which)))
}

/// # Panics
/// When a pod doesn't run.
pub fn measure(options: &Options, builds: &[Build], report: &mut Report) {
    let mut alone = Vec::new();
    let mut more = Vec::new();
    for build in builds {
        let started = idle(options, build, false, &mut more, "cold");
        alone.extend(parts(build, &started));
        if !options.short {
            if build.templates {
                build.make_template(0, None);
                let _ = idle(options, build, true, &mut more, MORE);
            } else {
                let mut series = Series::new(build.name(MORE));
                series.absent = Some(NO_TEMPLATES.to_owned());
                more.push(series);
            }
        }
    }
    report.add(Table::new(TITLE, "KiB", alone));
    if !options.short {
        report.add(Table::new(MORE_TITLE, "MiB", more));
    }
}

/// Starts pods, and looks at all of them when they run.
fn idle(
    options: &Options,
    build: &Build,
    template: bool,
    more: &mut Vec<Series>,
    name: &str,
) -> Vec<[host::Memory; 2]> {
    let mut series = Series::new(build.name(name));
    let others = if options.short {
        0
    } else {
        options.rounds().min(8)
    };
    let pods: Vec<_> = (0..=others)
        .map(|n| start(build, template, &format!("idle-{n}")))
        .collect();
    std::thread::sleep(SETTLES);
    let found: Vec<_> = pods.iter().map(of).collect();
    // What the first has alone would be others' too; its PSS tells by then.
    for memory in found.iter().skip(1) {
        let kibibytes: u64 = memory
            .iter()
            .map(|memory| memory.own.proportional + memory.guest.private)
            .sum();
        series.add(as_float(kibibytes) / MIB);
    }
    more.push(series);
    found
}

type Look = fn(&[host::Memory; 2]) -> u64;

fn parts(build: &Build, pods: &[[host::Memory; 2]]) -> Vec<Series> {
    let parts: [(&str, Look); 9] = [
        (VMM, |[vmm, _]| vmm.own.proportional),
        ("  private", |[vmm, _]| vmm.own.private),
        ("  shared with other processes", |[vmm, _]| vmm.own.shared),
        (SUPERVISOR, |[_, supervisor]| supervisor.own.proportional),
        ("  private", |[_, supervisor]| supervisor.own.private),
        ("  shared with other processes", |[_, supervisor]| {
            supervisor.own.shared
        }),
        ("guest RAM touched, resident", |[vmm, _]| vmm.guest.resident),
        ("  private", |[vmm, _]| vmm.guest.private),
        ("  shared with other processes", |[vmm, _]| vmm.guest.shared),
    ];
    parts
        .into_iter()
        .map(|(name, part)| {
            let mut series = Series::new(build.name(name));
            for pod in pods {
                series.add(as_float(part(pod)));
            }
            series
        })
        .collect()
}

fn many_row(count: u16) -> String {
    format!("{count} pods: all processes and guests, PSS")
}

/// # Panics
/// When one of them doesn't start, or doesn't answer.
#[must_use]
pub fn many(build: &Build, count: u16) -> Table {
    let mut series = Series::new(build.name(&many_row(count)));
    if build.templates {
        build.make_template(0, None);
        let pods: Vec<_> = (0..count)
            .map(|n| start(build, true, &format!("many-{n}")))
            .collect();
        std::thread::sleep(SETTLES);
        for n in 0..count {
            let said = build
                .hull
                .ok(["exec", &format!("many-{n}"), "echo", "here"]);
            assert_eq!(said, "here\n");
        }
        let total: u64 = pods
            .iter()
            .flat_map(of)
            .map(|memory| memory.own.proportional + memory.guest.proportional)
            .sum();
        series.add(as_float(total) / MIB);
    } else {
        series.absent = Some(NO_TEMPLATES.to_owned());
    }
    Table::new(MANY_TITLE, "MiB", vec![series])
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn the_target_is_of_as_many_pods_as_there_are_by_default() {
        assert_eq!(many_row(Options::parse_from(["bench"]).pods), MANY);
    }
}
