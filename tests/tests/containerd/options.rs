//! Runtime options: the file with the configuration that a handler names.

use hull_tests::containerd::Containerd;

#[test]
fn a_configuration_that_is_wrong_is_named_to_who_starts_the_pod() {
    let containerd = Containerd::start();
    let file = containerd.work_dir().join("hull.toml");
    let options = ["--runtime-config-path", &*file.to_string_lossy()];
    let started = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let output = containerd.run(&options, "never", &["true"]);
        let _ = containerd.ctr(&["containers", "delete", "never"]);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };

    let unknown = started("default_cpus = 4\n");
    let out_of_range = started("default_vcpus = 1000\n");

    for (said, words) in [
        (unknown, ["hull.toml", "default_cpus", "default_vcpus"]),
        (
            out_of_range,
            ["hull.toml", "default_vcpus = 1000", "1 to 64"],
        ),
    ] {
        for word in words {
            assert!(said.contains(word), "{said}");
        }
    }
    containerd.nothing_left();
}
