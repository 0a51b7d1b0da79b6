//! Pods of containerd whose machines begin with templates.

use std::fs;
use std::time::Duration;

use hull_tests::containerd::Containerd;
use hull_tests::eventually;
use hull_tests::hull::{Hull, assert_success};
use serde_json::Value;

/// For a template to be made, beside others.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_second_container_begins_with_a_template() {
    let hull = Hull::without_images();
    let data = hull.data_dir().to_string_lossy().into_owned();
    let environment = [("HULL_TEMPLATES", "tenant"), ("HULL_DATA_DIR", &data)];
    let containerd = Containerd::start_with(&environment);
    let begins = || {
        let log = fs::read_to_string(containerd.log()).unwrap();
        let lines = log.lines().filter(|line| line.contains("the guest is up"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let waits = ["sleep", "1000"];
    let first = containerd.run(&["--detach"], "first", &waits);
    assert_success(&first, "ctr run");
    let template: Value = eventually("a template is made", LIMIT, || {
        let mut all = hull.json(["template", "ls"]);
        all["items"].as_array_mut()?.pop()
    });
    assert_eq!(template["tenant"], containerd.name());
    assert_eq!(template["current"], true);

    let second = containerd.run(&["--detach"], "second", &waits);

    assert_success(&second, "ctr run");
    let id = template["id"].as_str().unwrap();
    let begun = eventually("both shims say how it went", LIMIT, || {
        Some(begins()).filter(|lines| lines.len() == 2)
    });
    assert!(!begun[0].contains(id), "{begun:?}");
    assert!(begun[1].contains(id), "{begun:?}");
    // It goes on without its template, and has what a container has.
    let _ = hull.ok(["template", "rm", id]);
    let said = containerd.ok(&["task", "exec", "--exec-id", "e", "second", "echo", "there"]);
    assert_eq!(said, "there\n");
    for id in ["first", "second"] {
        let _ = containerd.ok(&["task", "kill", "--signal", "SIGKILL", id]);
    }
    eventually("both have ended", LIMIT, || {
        let tasks = containerd.ok(&["task", "ls"]);
        (!tasks.contains("RUNNING")).then_some(())
    });
    for id in ["first", "second"] {
        let _ = containerd.ok(&["container", "rm", id]);
    }
    containerd.nothing_left();
}
