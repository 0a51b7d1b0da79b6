//! From a command to the first output of a container: the same image and command, alone and several at once.

use std::process::Command;

use super::build::Build;
use super::options::Options;
use super::peers::{Bundle, installed, load_for_podman, podman};
use super::report::{Report, Table};
use super::series::{Contender, interleave, until_all_printed, until_printed};
use crate::containerd::Containerd;

pub const TITLE: &str = "Command to the container's first output";
pub const PODMAN: &str = "podman run, crun, no network";
pub const RUNC: &str = "runc run";
pub const CRUN: &str = "crun run";
pub const COLD: &str = "hull run, cold, no network";
pub const TEMPLATE: &str = "hull run, from a template, no network";
const TEMPLATE_NETWORK: &str = "hull run, from a template, a bridge";
pub const NO_TEMPLATES: &str = "this build has no templates";
const NOT_INSTALLED: &str = "not installed";
const IMAGE: &str = "docker.io/library/busybox:latest";
const HELLO: &str = "hello";
const AT_ONCE: [usize; 2] = [4, 16];

/// A pod that says hello.
fn manifest(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  containers:
  - {{name: main, image: busybox, command: [echo, {HELLO}]}}
"
    )
}

/// One of the ways to start a container.
#[derive(Clone, Copy)]
enum Way<'a> {
    Bundle(&'a Bundle, &'static str),
    Podman(&'static str),
    Hull(&'a Build, bool, &'static str),
}

impl Way<'_> {
    /// A start that no other start meets, by its number.
    fn command(self, number: usize) -> Command {
        match self {
            Self::Bundle(bundle, runtime) => bundle.run(runtime, &format!("{HELLO}-{number}")),
            Self::Podman(network) => podman(network),
            Self::Hull(build, template, network) => {
                let name = format!("{HELLO}-{number}");
                let manifest = build
                    .hull
                    .manifest(&format!("{name}.yaml"), &manifest(&name));
                build.run(template, &["--rm", "--network", network], &manifest)
            }
        }
    }
}

fn from_template<'a>(build: &'a Build, network: &'static str) -> Result<Way<'a>, &'static str> {
    if build.templates {
        build.make_template(u8::from(network != "none"), None);
        Ok(Way::Hull(build, true, network))
    } else {
        Err(NO_TEMPLATES)
    }
}

/// # Panics
/// When something doesn't start.
pub fn measure(options: &Options, builds: &[Build], report: &mut Report) {
    let bundles = [RUNC, CRUN].map(|name| {
        let runtime = if name == RUNC { "runc" } else { "crun" };
        let bundle = installed(runtime).then(|| Bundle::new(runtime));
        (name, runtime, bundle)
    });
    // It takes more than all else together.
    let podman = !options.short && installed("podman") && installed("crun");
    if podman {
        load_for_podman();
    }
    let mut ways: Vec<(String, Result<Way<'_>, &str>)> = Vec::new();
    let with_podman = |network| {
        if podman {
            Ok(Way::Podman(network))
        } else if options.short {
            Err("left out with --short")
        } else {
            Err(NOT_INSTALLED)
        }
    };
    ways.push((PODMAN.to_owned(), with_podman("none")));
    for (name, runtime, bundle) in &bundles {
        let way = bundle.as_ref().map(|bundle| Way::Bundle(bundle, runtime));
        ways.push(((*name).to_owned(), way.ok_or(NOT_INSTALLED)));
    }
    for build in builds {
        ways.push((build.name(COLD), Ok(Way::Hull(build, false, "none"))));
        ways.push((build.name(TEMPLATE), from_template(build, "none")));
    }
    let alone = ways.clone();
    if !options.short {
        ways.push((
            "podman run, crun, a bridge".to_owned(),
            with_podman("bridge"),
        ));
        for build in builds {
            let name = build.name("hull run, cold, a bridge");
            ways.push((name, Ok(Way::Hull(build, false, "hull"))));
            ways.push((build.name(TEMPLATE_NETWORK), from_template(build, "hull")));
        }
    }

    let containerd = (!options.short).then(Containerd::start);
    let mut contenders: Vec<Contender<'_>> = ways
        .into_iter()
        .map(|(name, way)| match way {
            Ok(way) => Contender::new(name, move |n| until_printed(&mut way.command(n), HELLO)),
            Err(why) => Contender::absent(name, why),
        })
        .collect();
    if let Some(containerd) = &containerd {
        contenders.push(Contender::new("ctr run, runc", |round| {
            let id = format!("{HELLO}-{round}");
            let args = [
                "run",
                "--rm",
                "--runtime",
                "io.containerd.runc.v2",
                IMAGE,
                &id,
            ];
            let mut command = containerd.ctr_command(&args);
            command.args(["echo", HELLO]);
            until_printed(&mut command, HELLO)
        }));
        contenders.push(Contender::new("exec of a static program alone", |_| {
            until_printed(Command::new("/bin/busybox").args(["echo", HELLO]), HELLO)
        }));
    }
    // Networks and templates are made at their first use.
    let rows = interleave(options.rounds(), !options.short, contenders);
    report.add(Table::new(TITLE, "s", rows));
    drop(containerd);
    if options.short {
        return;
    }

    for at_once in AT_ONCE {
        let contenders = alone
            .iter()
            .map(|(name, way)| match *way {
                Ok(way) => Contender::new(name, move |round| {
                    let first = 1000 + at_once * (round + 1);
                    let commands = (first..first + at_once).map(|n| way.command(n)).collect();
                    until_all_printed(commands, HELLO)
                }),
                Err(why) => Contender::absent(name, why),
            })
            .collect();
        let rows = interleave(options.long_rounds(), false, contenders);
        let title = format!("{at_once} at once, until the last has printed");
        report.add(Table::new(&title, "s", rows));
    }
}
