//! The local image store.

use hull_tests::hull::Hull;

#[test]
fn images_are_loaded_listed_and_removed() {
    let hull = Hull::without_images();
    let archive = hull_tests::hull::image("busybox");

    let loaded = hull.ok(["load".as_ref(), archive.as_os_str()]);
    let again = hull.ok(["load".as_ref(), archive.as_os_str()]);
    let listed = hull.ok(["images"]);
    let removed = hull.ok(["rmi", "busybox"]);
    let after = hull.ok(["images"]);

    assert!(
        loaded.contains("docker.io/library/busybox:latest"),
        "{loaded}"
    );
    assert_eq!(loaded, again);
    assert!(listed.contains("busybox"), "{listed}");
    assert!(removed.contains("busybox"), "{removed}");
    assert!(!after.contains("busybox"), "{after}");
    let layers = std::fs::read_dir(hull.data_dir().join("images/layers/sha256"))
        .map(Iterator::count)
        .unwrap_or(0);
    assert_eq!(layers, 0, "layers of a removed image are removed");
}

#[test]
fn what_is_not_an_image_is_refused() {
    let hull = Hull::without_images();
    let path = hull.manifest("not-an-image.tar", "this is not a tar archive");

    let output = hull.run(["load".as_ref(), path.as_os_str()]);

    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("not-an-image.tar"), "{stderr}");
    assert!(!hull.ok(["images"]).contains("not-an-image"));
}
