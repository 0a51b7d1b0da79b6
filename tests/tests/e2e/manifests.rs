//! Bad input: one clear message, exit code 2, nothing started, nothing left.

use hull_tests::host;
use hull_tests::hull::Hull;

/// A manifest with `spec` as its specification.
fn pod(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: bad}}\nspec:\n{spec}")
}

#[track_caller]
fn assert_refused(hull: &Hull, text: &str, mentions: &[&str]) {
    let path = hull.manifest("bad.yaml", text);

    let output = hull.run(["run".as_ref(), "-d".as_ref(), path.as_os_str()]);

    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    for mention in mentions.iter().chain(&["bad.yaml"]) {
        assert!(stderr.contains(mention), "{mention:?} in {stderr:?}");
    }
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert_eq!(host::pods_in(&hull.run_dir()), Vec::<String>::new());
    assert_eq!(host::processes_of(&hull.run_dir()), Vec::<String>::new());
}

#[test]
fn bad_manifests_are_refused() {
    let hull = Hull::new();
    let good = "  containers:\n  - {name: a, image: busybox}\n";
    let cases: &[(&str, String, &[&str])] = &[
        ("not YAML", "{[".into(), &[]),
        ("not an object", "just text".into(), &[]),
        ("empty", String::new(), &[]),
        (
            "not a Pod",
            "apiVersion: apps/v1\nkind: StatefulSet\nmetadata: {name: x}\n".into(),
            &["kind", "StatefulSet"],
        ),
        (
            "unknown field",
            pod(&format!("{good}  restartPolice: Never\n")),
            &["spec.restartPolice"],
        ),
        (
            "nested unknown field",
            pod("  containers:\n  - {name: a, image: busybox, comand: [x]}\n"),
            &["spec.containers[0].comand"],
        ),
        (
            "bad name",
            pod(good).replace("name: bad", "name: Bad_Name"),
            &["metadata.name", "Bad_Name"],
        ),
        (
            "long name",
            pod(good).replace("name: bad", &format!("name: {}", "x".repeat(300))),
            &["metadata.name"],
        ),
        (
            "no containers",
            pod("  containers: []\n"),
            &["spec.containers"],
        ),
        (
            "bad container name",
            pod("  containers:\n  - {name: 'a/b', image: busybox}\n"),
            &["spec.containers[0].name", "a/b"],
        ),
        (
            "duplicate container",
            pod("  containers:\n  - {name: a, image: busybox}\n  - {name: a, image: busybox}\n"),
            &["spec.containers[1].name", "\"a\""],
        ),
        (
            "undeclared volume",
            pod(
                "  containers:\n  - {name: a, image: busybox, volumeMounts: [{name: nope, mountPath: /x}]}\n",
            ),
            &["spec.containers[0].volumeMounts[0].name", "nope"],
        ),
        (
            "climbing subPath",
            pod(
                "  volumes: [{name: v, emptyDir: {}}]\n  containers:\n  - {name: a, image: busybox, volumeMounts: [{name: v, mountPath: /x, subPath: ../../etc}]}\n",
            ),
            &["spec.containers[0].volumeMounts[0].subPath"],
        ),
        (
            "missing image",
            pod("  containers:\n  - {name: a, image: no-such-image}\n"),
            &["spec.containers[0].image", "no-such-image", "hull load"],
        ),
        (
            "always pull",
            pod("  containers:\n  - {name: a, image: busybox, imagePullPolicy: Always}\n"),
            &["spec.containers[0].imagePullPolicy", "Always"],
        ),
        (
            "wrong hostPath type",
            pod(
                "  volumes: [{name: v, hostPath: {path: /etc/passwd, type: Directory}}]\n  containers:\n  - {name: a, image: busybox}\n",
            ),
            &["spec.volumes[0].hostPath", "/etc/passwd", "Directory"],
        ),
        (
            "missing hostPath",
            pod(
                "  volumes: [{name: v, hostPath: {path: /no/such/dir, type: Directory}}]\n  containers:\n  - {name: a, image: busybox}\n",
            ),
            &["spec.volumes[0].hostPath", "/no/such/dir"],
        ),
        (
            "bad policy",
            pod(&format!("{good}  restartPolicy: Sometimes\n")),
            &["spec.restartPolicy", "Sometimes"],
        ),
        (
            "bad quantity",
            pod(
                "  containers:\n  - {name: a, image: busybox, resources: {limits: {memory: lots}}}\n",
            ),
            &["spec.containers[0].resources.limits", "lots"],
        ),
    ];

    for (what, text, mentions) in cases {
        eprintln!("{what}");
        assert_refused(&hull, text, mentions);
    }
}

#[test]
fn a_missing_manifest_is_named() {
    let hull = Hull::without_images();

    let output = hull.run(["run", "/no/such/file.yaml"]);

    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/file.yaml"));
}
