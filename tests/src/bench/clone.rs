//! Machines that go on from a template or a snapshot, of 256 MiB.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::boot::{distributions_kernel, initramfs};
use super::build::Build;
use super::firecracker::Snapshot;
use super::memory;
use super::options::Options;
use super::peers::given;
use super::report::{Report, Table};
use super::series::{Contender, interleave};
use super::start::NO_TEMPLATES;
use crate::eventually;
use crate::hull::assert_success;
use crate::pod::Pod;

pub const TITLE: &str = "A machine of 256 MiB that goes on, until it answers";
pub const FIRECRACKER: &str = "Firecracker, snapshot restored, to the guest's next output";
pub const OURS: &str = "Hull, clone launched, to the agent's answer";
const REQUEST: &str = "Hull, hull run of a clone, to the agent's answer";
const LINE: &str = "goes-on";

/// # Panics
/// When a machine doesn't go on.
pub fn measure(options: &Options, builds: &[Build], report: &mut Report) {
    let Some(own) = builds.first() else { return };
    let dir = own.hull.work_dir().join("snapshot");
    let firecracker = given("HULL_BENCH_FIRECRACKER").map(|program| {
        let init = format!("while :; do echo {LINE}; done");
        let initramfs = initramfs(&dir, &init);
        let kernel = distributions_kernel();
        Snapshot::take(&program, &dir, &kernel, &initramfs, LINE)
    });
    let mut contenders = vec![match &firecracker {
        Ok(snapshot) => Contender::new(FIRECRACKER, |_| snapshot.restore(LINE)),
        Err(why) => Contender::absent(FIRECRACKER, why),
    }];
    for build in builds {
        if build.templates {
            build.make_template(0, Some(&small(build)));
        }
        for (name, from_launch) in [(OURS, true), (REQUEST, false)] {
            let name = build.name(name);
            contenders.push(if build.templates {
                Contender::new(name, move |round| {
                    let pod = format!("clone-{round}-{from_launch}").to_lowercase();
                    answered(build, &pod, from_launch)
                })
            } else {
                Contender::absent(name, NO_TEMPLATES)
            });
        }
    }
    let rows = interleave(options.rounds(), true, contenders);
    report.add(Table::new(TITLE, "s", rows));
    if !options.short {
        report.add(memory::many(own, options.pods));
    }
}

/// A configuration of machines as large as the peers'.
fn small(build: &Build) -> PathBuf {
    build
        .hull
        .manifest("small.toml", "default_memory_mib = 256\n")
}

/// Seconds that a pod's timeline tells, to T4.
fn answered(build: &Build, name: &str, from_launch: bool) -> f64 {
    let text = format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: main, image: busybox, command: [sh, -c, 'echo hello; exec sleep 100000']}}
"
    );
    let manifest = build.hull.manifest(&format!("{name}.yaml"), &text);
    let output = build
        .run(true, &["-d", "--network", "none"], &manifest)
        .env("HULL_CONFIG", small(build))
        .output();
    assert_success(&output.expect("hull is there"), "hull run -d");
    let _pod = Pod::running(&build.hull, name);
    let timeline: Value = eventually("its timeline", Duration::from_secs(20), || {
        let output = build.hull.run(["timeline", name, "-o", "json"]);
        serde_json::from_slice(&output.stdout).ok()
    });
    let of = |list: &str, key: &str, name: &str| {
        let all = timeline[list].as_array().into_iter().flatten();
        let mut found = all.filter(|one| one[key] == name);
        let at = found.next().and_then(|one| one["atMicros"].as_f64());
        at.unwrap_or_else(|| panic!("no {name} in {timeline}"))
    };
    let begun = if from_launch {
        of("steps", "name", "launch")
    } else {
        0.0
    };
    (of("stamps", "stamp", "T4") - begun) / 1e6
}
