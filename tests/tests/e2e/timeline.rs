//! Each pod keeps how it started.

use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::Hull;
use hull_tests::pod::Pod;
use serde_json::Value;

const SPEAKS: &str = "apiVersion: v1
kind: Pod
metadata: {name: speaks}
spec:
  containers:
  - name: main
    image: busybox
    command: [sh, -c, 'echo hello; exec sleep 100000']
";

fn stamps(timeline: &Value) -> Vec<(String, u64)> {
    let stamps = timeline["stamps"].as_array().unwrap().iter();
    stamps
        .map(|stamp| {
            let name = stamp["stamp"].as_str().unwrap();
            (name.to_owned(), stamp["atMicros"].as_u64().unwrap())
        })
        .collect()
}

#[test]
fn a_pod_tells_how_it_started() {
    let hull = Hull::new();
    let _pod = Pod::start(&hull, "speaks", SPEAKS);
    eventually("the timeline is written", Duration::from_secs(20), || {
        let shown = hull.run(["timeline", "speaks"]);
        shown.status.success().then_some(())
    });

    let timeline = hull.json(["timeline", "speaks"]);
    let stamps = stamps(&timeline);
    let names: Vec<&str> = stamps.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["T0", "T1", "T2", "T3", "T4", "T5", "T6", "T7"]);
    assert!(
        stamps.is_sorted_by_key(|(_, at)| *at) && stamps[0].1 == 0 && stamps[1].1 > 0,
        "{stamps:?}"
    );
    let has = |place: &str, name: &str| {
        let steps = timeline["steps"].as_array().unwrap();
        let found = steps
            .iter()
            .find(|step| step["place"] == place && step["name"] == name);
        let found = found.unwrap_or_else(|| panic!("no {name} of {place} in {timeline}"));
        found["tookMicros"].as_u64().unwrap()
    };
    assert!(has("hull-vmm", "jail") > 0);
    assert!(has("guest", "kernel") > 0);
    assert!(has("supervisor", "mounts") > 0);
    assert!(timeline["cpu"]["supervisorMicros"].as_u64().unwrap() > 0);
    assert!(timeline["cpu"]["vmmMicros"].as_u64().unwrap() > 0);

    let drawn = hull.ok(["timeline", "speaks"]);
    assert!(
        drawn.contains("agent's first instruction") && drawn.contains('█'),
        "{drawn}"
    );
    let trace = hull.ok(["timeline", "speaks", "-o", "trace"]);
    let trace: Value = serde_json::from_str(&trace).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().len() > names.len());
}

#[test]
fn a_timeline_outlasts_its_pod_and_can_be_read_from_anywhere() {
    let hull = Hull::new();
    let manifest = hull.manifest(
        "speaks.yaml",
        &SPEAKS
            .replace("; exec sleep 100000", "")
            .replace("spec:\n", "spec:\n  restartPolicy: Never\n"),
    );
    let ended = hull.command(["run"]).arg(&manifest).output().unwrap();
    assert!(ended.status.success());
    let dir = hull.json(["inspect", "speaks"])["metadata"]["uid"]
        .as_str()
        .map(|id| hull.run_dir().join("pods").join(id))
        .unwrap();

    for path in [dir.clone(), dir.join("timeline.json")] {
        let shown = hull.json([std::ffi::OsStr::new("timeline"), path.as_os_str()]);
        assert_eq!(stamps(&shown).len(), 8);
    }
    let nowhere = hull.run([
        std::ffi::OsStr::new("timeline"),
        hull.work_dir().as_os_str(),
    ]);
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("has no timeline yet"));
}
