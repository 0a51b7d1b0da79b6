//! A pod that runs for one test.

use std::process::{Command, Output};
use std::time::Duration;

use crate::hull::{Hull, assert_success};
use crate::{eventually, scaled};

/// A detached pod; removed at the end of its test.
#[derive(Debug)]
pub struct Pod<'a> {
    hull: &'a Hull,
    name: String,
}

impl<'a> Pod<'a> {
    /// `hull run -d` of a manifest whose pod has this name.
    ///
    /// # Panics
    /// When the pod doesn't start.
    #[must_use]
    pub fn start(hull: &'a Hull, name: &str, manifest: &str) -> Self {
        Self::start_with(hull, name, manifest, &[])
    }

    /// The same with more arguments.
    ///
    /// # Panics
    /// When the pod doesn't start.
    #[must_use]
    pub fn start_with(hull: &'a Hull, name: &str, manifest: &str, args: &[&str]) -> Self {
        let path = hull.manifest(&format!("{name}.yaml"), manifest);
        let output = hull
            .command(["run", "-d"])
            .args(args)
            .arg(path)
            .output()
            .expect("hull is on PATH");
        assert_success(&output, &format!("hull run -d {name}"));
        Self {
            hull,
            name: name.into(),
        }
    }

    /// One that runs already, to be removed as well.
    #[must_use]
    pub fn running(hull: &'a Hull, name: &str) -> Self {
        Self {
            hull,
            name: name.into(),
        }
    }

    /// What `hull inspect` tells.
    #[must_use]
    pub fn inspect(&self) -> serde_json::Value {
        let all = self.hull.json(["inspect", &self.name]);
        match all {
            serde_json::Value::Array(mut pods) => pods.remove(0),
            pod => pod,
        }
    }

    /// The phase that `hull inspect` tells.
    #[must_use]
    pub fn phase(&self) -> String {
        text(&self.inspect()["status"]["phase"])
    }

    /// Waits for a phase.
    pub fn wait_phase(&self, phase: &str, limit: Duration) {
        eventually(&format!("pod {} is {phase}", self.name), limit, || {
            (self.phase() == phase).then_some(())
        });
    }

    /// A process id that `hull inspect` tells: `supervisorPid` or `vmmPid`.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn pid(&self, which: &str) -> i32 {
        self.inspect()["status"][which]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or_else(|| panic!("{which} in {}", self.inspect()))
    }

    /// The pod's addresses, as `hull inspect` tells them.
    ///
    /// # Panics
    /// When there is one that isn't.
    #[must_use]
    pub fn addresses(&self) -> Vec<std::net::IpAddr> {
        let inspected = self.inspect();
        let addresses = inspected["status"]["podIPs"]
            .as_array()
            .into_iter()
            .flatten();
        addresses
            .map(|address| text(&address["ip"]).parse().expect("an address"))
            .collect()
    }

    /// The status of one container.
    ///
    /// # Panics
    /// When the pod has no such container.
    #[must_use]
    pub fn container(&self, name: &str) -> serde_json::Value {
        let pod = self.inspect();
        ["containerStatuses", "ephemeralContainerStatuses"]
            .iter()
            .filter_map(|list| pod["status"][list].as_array())
            .flatten()
            .find(|status| status["name"] == name)
            .unwrap_or_else(|| panic!("container {name} in {pod}"))
            .clone()
    }

    /// `hull exec POD -c CONTAINER -- sh -c SCRIPT`, not started yet.
    #[must_use]
    pub fn exec_command(&self, container: &str, script: &str) -> Command {
        self.hull.command([
            "exec", &self.name, "-c", container, "--", "sh", "-c", script,
        ])
    }

    /// Runs a script in a container to its end.
    ///
    /// # Panics
    /// When `hull` can't be run.
    #[must_use]
    pub fn exec(&self, container: &str, script: &str) -> Output {
        self.exec_command(container, script)
            .output()
            .expect("hull is on PATH")
    }

    /// Runs a script in a container, which must succeed, and returns its output.
    #[must_use]
    pub fn sh(&self, container: &str, script: &str) -> String {
        let output = self.exec(container, script);
        assert_success(&output, &format!("in {}/{container}: {script}", self.name));
        String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned()
    }

    /// Log lines of a container.
    #[must_use]
    pub fn logs(&self, container: &str) -> String {
        self.hull.ok(["logs", &self.name, "-c", container])
    }

    /// Waits until a container has printed `line`.
    pub fn wait_log(&self, container: &str, line: &str) {
        eventually(
            &format!("{}/{container} prints {line:?}", self.name),
            Duration::from_secs(10),
            || {
                self.logs(container)
                    .lines()
                    .any(|l| l == line)
                    .then_some(())
            },
        );
    }

    /// `hull stop`, which must succeed within the grace period and some more.
    pub fn stop(&self) {
        let _ = self.hull.ok(["stop", "-t", "1", &self.name]);
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.hull.run(["inspect", &self.name]);
            eprintln!("{}", String::from_utf8_lossy(&logs.stdout));
        }
        let _ = self.hull.run(["rm", "--force", &self.name]);
    }
}

fn text(value: &serde_json::Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A pod of `sleep` containers, each with what is given as its further fields.
#[must_use]
pub fn sleepers(name: &str, containers: &[(&str, &str)], rest: &str) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\nspec:\n  restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n{rest}  containers:\n"
    );
    for (container, fields) in containers {
        text.push_str(&format!(
            "  - name: {container}\n    image: busybox\n    args: [sleep, \"100000\"]\n{fields}"
        ));
    }
    text
}

/// The longest that a pod may take to end after its machine died.
#[must_use]
pub fn death() -> Duration {
    scaled(Duration::from_secs(1))
}
