//! The builds of Hull that are measured: this one, and another to compare with.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::options::Options;
use crate::hull::{Hull, assert_success};

/// Whether pods come from templates: `tenant`, or `off`.
const TEMPLATES: &str = "HULL_TEMPLATES";

/// A build, with a host of its own.
#[derive(Debug)]
pub struct Build {
    /// Behind the names of what is measured of it. Empty: this one.
    label: String,
    pub hull: Hull,
    /// Where `boot-machine` is, and `hull-vmm` beside it.
    programs: PathBuf,
    pub guest: PathBuf,
    /// Whether it knows templates.
    pub templates: bool,
}

impl Build {
    /// This one is the first.
    #[must_use]
    pub fn all(options: &Options) -> Vec<Self> {
        let programs = std::env::current_exe().expect("/proc is mounted");
        let guest = std::env::var_os("HULL_GUEST_DIR").expect("HULL_GUEST_DIR");
        let mut builds = vec![Self::new(
            "",
            Hull::without_images(),
            programs.with_file_name(""),
            guest.into(),
        )];
        if let Some(tree) = &options.compare {
            let programs = tree.join("target/x86_64-unknown-linux-gnu/release");
            let guest = tree.join("target/guest");
            let hull = Hull::without_images()
                .with_programs(&programs)
                .with_guest(&guest);
            let label = tree.file_name().unwrap_or(tree.as_os_str());
            builds.push(Self::new(&label.to_string_lossy(), hull, programs, guest));
        }
        builds
    }

    fn new(label: &str, hull: Hull, programs: PathBuf, guest: PathBuf) -> Self {
        let hull = hull.load("busybox");
        Self {
            label: label.to_owned(),
            templates: hull.run(["template", "--help"]).status.success(),
            hull,
            programs,
            guest,
        }
    }

    /// A name for what is measured of it.
    #[must_use]
    pub fn name(&self, what: &str) -> String {
        match self.label.as_str() {
            "" => what.to_owned(),
            label => format!("{what} [{label}]"),
        }
    }

    /// `hull run` with these arguments: from a template, or cold.
    #[must_use]
    pub fn run(&self, template: bool, args: &[&str], manifest: &Path) -> Command {
        let mut all = vec![OsString::from("run")];
        all.extend(args.iter().map(OsString::from));
        all.push(manifest.into());
        let mut command = self.hull.command(all);
        command.env(TEMPLATES, if template { "tenant" } else { "off" });
        command
    }

    /// Makes the template that pods without limits and with so many interfaces begin with.
    ///
    /// # Panics
    /// When it can't be made.
    pub fn make_template(&self, interfaces: u8, configuration: Option<&Path>) {
        let interfaces = interfaces.to_string();
        let mut command = self
            .hull
            .command(["template", "create", "--interfaces", &interfaces]);
        command.env(TEMPLATES, "tenant");
        if let Some(configuration) = configuration {
            command.env("HULL_CONFIG", configuration);
        }
        let output = command.output().expect("hull is there");
        assert_success(&output, "hull template create");
    }

    /// A machine of its `hull-vmm` with this kernel and initramfs, its console on standard output.
    #[must_use]
    pub fn boot(&self, kernel: &Path, initramfs: &Path) -> Command {
        let mut command = Command::new(self.programs.join("boot-machine"));
        command.arg(kernel).arg(initramfs);
        command
    }
}
