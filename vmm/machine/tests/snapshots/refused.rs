//! What is no snapshot of this host's is refused, with the reason.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Test;
use super::host::{Clone, MEMORY_MIB, REGION_MIB, Spec, Template, files};

pub const TESTS: &[Test] = &[
    ("a_damaged_state_is_refused", damaged),
    ("a_memory_file_that_is_not_whole_is_refused", short),
    ("a_machine_of_other_devices_is_refused", other_devices),
    (
        "a_machine_with_another_memory_device_is_refused",
        other_region,
    ),
    (
        "a_memory_file_that_is_truncated_ends_the_machine",
        truncated,
    ),
];

/// The template's files, copied, without holes being written.
fn copy(template: &Template) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["state", "memory"] {
        let mut from = File::open(template.path(name)).unwrap();
        let mut to = File::create_new(directory.path().join(name)).unwrap();
        std::io::copy(&mut from, &mut to).unwrap();
    }
    directory
}

fn open(directory: &Path, name: &str) -> File {
    OpenOptions::new()
        .write(true)
        .open(directory.join(name))
        .unwrap()
}

async fn refusal(directory: &Path) -> String {
    Clone::refused(Spec::restored(files(directory, false), "none")).await
}

fn damaged(template: &Template) {
    let directory = tempfile::tempdir().unwrap();
    let good = fs::read(template.path("state")).unwrap();
    fs::write(directory.path().join("memory"), "").unwrap();
    let state = directory.path().join("state");
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    let longer = [&good[..], &[0]].concat();
    template.runtime.block_on(async {
        for (bytes, reason) in [
            (Vec::new(), "is not the state of a machine"),
            (changed(0, b'X'), "is not the state of a machine"),
            (changed(8, 99), "has format 99"),
            (changed(12, 183), "another architecture (183)"),
            (good[..good.len() - 1].to_vec(), "is not whole"),
            (longer, "is not whole, or has something after its end"),
            (
                changed(good.len() / 2, good[good.len() / 2] ^ 1),
                "is damaged",
            ),
            (good.clone(), "has 0 bytes, not"),
        ] {
            fs::write(&state, bytes).unwrap();
            let refused = refusal(directory.path()).await;
            assert!(refused.contains(reason), "{refused}");
        }
    });
}

fn short(template: &Template) {
    let directory = copy(template);
    let whole = MEMORY_MIB << 20;
    template.runtime.block_on(async {
        for length in [whole - 1, whole + 1, whole / 2] {
            open(directory.path(), "memory").set_len(length).unwrap();
            let refused = refusal(directory.path()).await;
            assert!(
                refused.contains(&format!("has {length} bytes, not {whole}")),
                "{refused}"
            );
        }
    });
}

fn other_devices(template: &Template) {
    template.runtime.block_on(async {
        let mut more = template.spec("more");
        more.machine = more.machine.disk_slot("another");
        let refused = Clone::refused(more).await;
        assert!(
            refused.contains("the machine has 9 devices, not 8"),
            "{refused}"
        );
    });
}

fn other_region(template: &Template) {
    template.runtime.block_on(async {
        let mut other = template.spec("other");
        other.machine = other.machine.memory_device(2 * REGION_MIB);
        let refused = Clone::refused(other).await;
        assert!(refused.contains("has 4096 MiB of addresses"), "{refused}");
    });
}

fn truncated(template: &Template) {
    let directory = copy(template);
    template.runtime.block_on(async {
        let clone = Clone::launch(Spec::restored(files(directory.path(), false), "one"));
        let clone = clone.await.unwrap();
        assert_eq!(clone.ask("pattern").await, "7 true");

        let memory = open(directory.path(), "memory");
        memory.write_all_at(&[0], 0).unwrap();
        memory.set_len(0).unwrap();

        let reason = clone.machine.wait().await.to_string();
        assert!(reason.contains("the file of its memory"), "{reason}");
    });
}
