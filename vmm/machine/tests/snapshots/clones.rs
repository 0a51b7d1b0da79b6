//! Clones run, each for itself.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use rustix::fs::fallocate;

use super::Test;
use super::host::{Clone, Spec, Template, files};

pub const TESTS: &[Test] = &[
    ("a_clone_goes_on_where_the_template_was", goes_on),
    ("clones_see_nothing_of_each_other", apart),
    (
        "a_snapshot_can_be_taken_of_a_clone_which_then_goes_on",
        again,
    ),
    ("a_disk_comes_into_a_clones_slot", disk),
    ("a_clone_needs_no_file_once_it_runs", without_files),
    ("memory_is_added_to_a_clone", memory),
    ("processors_that_never_ran_need_not_and_can", processors),
    ("what_a_clone_frees_goes_back_to_the_host", freed),
];

fn goes_on(template: &Template) {
    template.runtime.block_on(async {
        let began = Instant::now();
        let clone = template.clone("one").await;
        let count = clone.number("count").await;
        println!("answered after {} ms", began.elapsed().as_millis());
        let now = clone.number("now").await;

        let since = count.checked_sub(template.count).unwrap();
        assert!(since < 1000, "{since}");
        let since = now.checked_sub(template.now).unwrap();
        assert!(since < 30_000_000_000, "{since}");
        clone.ask("say hello").await;
        clone.says("hello").await;
        clone.says("the first connection has ended").await;
        assert_eq!(clone.ask("mount").await, "");
        assert_eq!(clone.ask("read /rw/name").await, "one");
        assert_eq!(clone.ask("random").await, "16");
        assert_eq!(clone.ask("pattern").await, "7 true");
        drop(clone.ask_for("end").await);
        assert_eq!(
            clone.machine.wait().await.to_string(),
            "the guest powered off"
        );
    });
}

fn apart(template: &Template) {
    template.runtime.block_on(async {
        let (one, other) = tokio::join!(template.clone("one"), template.clone("other"));
        for (clone, name) in [(&one, "one"), (&other, "other")] {
            clone.ask("mount").await;
            assert_eq!(clone.ask("read /rw/name").await, name);
            clone.ask("write /rw/written by-the-guest").await;
            let written = fs::read_to_string(clone.share.path().join("written"));
            assert_eq!(written.unwrap(), "by-the-guest");
        }
        one.ask("fill 11").await;
        assert_eq!(other.ask("pattern").await, "7 true");
        other.ask("fill 12").await;

        assert_eq!(one.ask("pattern").await, "11 true");
        assert_eq!(template.clone("third").await.ask("pattern").await, "7 true");
    });
}

fn again(template: &Template) {
    let directory = tempfile::tempdir().unwrap();
    template.runtime.block_on(async {
        let clone = template.clone("one").await;
        clone.ask("fill 21").await;
        let mut open = clone.ask_for("wait").await;
        let snapshot = clone.machine.snapshot(files(directory.path(), true));
        snapshot.await.unwrap();
        let second = Clone::launch(Spec::restored(files(directory.path(), false), "two"));
        let second = second.await.unwrap();
        assert_eq!(second.ask("pattern").await, "21 true");
        second.ask("mount").await;
        assert_eq!(second.ask("read /rw/name").await, "two");
        drop(second);

        // The first goes on, with its connections, and can be put aside again.
        clone.machine.resume().await.unwrap();
        assert_eq!(clone.ask("pattern").await, "21 true");
        Clone::finish(&mut open).await;
        let before = clone.number("count").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(clone.number("count").await > before);
        clone.ask("mount").await;
        assert_eq!(clone.ask("read /rw/name").await, "one");
        let directory = tempfile::tempdir().unwrap();
        let snapshot = clone.machine.snapshot(files(directory.path(), true));
        snapshot.await.unwrap();
        clone.machine.resume().await.unwrap();
        assert_eq!(clone.ask("read /rw/name").await, "one");

        // The guest has mounted the share: what it knows of it is looked for in the next one.
        let third = Clone::launch(Spec::restored(files(directory.path(), false), "three"));
        let third = third.await.unwrap();
        assert_eq!(third.ask("read /rw/name").await, "three");
        third.ask("write /rw/written by-the-third").await;
        let written = fs::read_to_string(third.share.path().join("written"));
        assert_eq!(written.unwrap(), "by-the-third");
    });
}

fn disk(template: &Template) {
    template.runtime.block_on(async {
        let clone = template.clone("one").await;
        assert_eq!(clone.ask("read /sys/block/vda/size").await, "0");
        let disk = tempfile::tempfile().unwrap();
        fallocate(&disk, rustix::fs::FallocateFlags::empty(), 0, 1 << 20).unwrap();

        use std::os::fd::AsFd;
        clone
            .machine
            .insert_disk(0, disk.as_fd(), false)
            .await
            .unwrap();

        let began = Instant::now();
        while clone.ask("read /sys/block/vda/size").await != "2048" {
            assert!(began.elapsed() < Duration::from_secs(60));
        }
    });
}

/// Has a clone's added memory be so much, more than now, and waits until its guest has it.
async fn grow(clone: &Clone, mib: u64) {
    let total = async || {
        let text = clone.ask("read /proc/meminfo").await;
        let kibibytes = text.lines().next().unwrap().split_whitespace().nth(1);
        kibibytes.unwrap().parse::<u64>().unwrap() >> 10
    };
    let online = "/sys/devices/system/memory/auto_online_blocks";
    clone.ask(&format!("write {online} online")).await;
    let before = total().await - clone.machine.added_memory().await.unwrap().plugged_mib;
    let began = Instant::now();
    clone.machine.resize_memory(mib).await.unwrap();
    while total().await < before + mib {
        assert!(began.elapsed() < Duration::from_secs(60));
    }
    println!("{mib} MiB are added: {} ms", began.elapsed().as_millis());
}

fn memory(template: &Template) {
    template.runtime.block_on(async {
        let (one, other) = tokio::join!(template.clone("one"), template.clone("other"));
        grow(&one, 512).await;
        grow(&other, 128).await;

        // More than the template has.
        assert_eq!(one.number("use 320").await, 320 << 8);
        assert_eq!(one.ask("pattern").await, "7 true");
        one.ask("mount").await;
        assert_eq!(one.ask("read /rw/name").await, "one");
        let added = other.machine.added_memory().await.unwrap();
        assert_eq!((added.requested_mib, added.plugged_mib), (128, 128));

        // A snapshot can't have it, and the machine goes on.
        let directory = tempfile::tempdir().unwrap();
        let refused = one.machine.snapshot(files(directory.path(), true)).await;
        let refused = std::error::Error::source(&refused.unwrap_err())
            .unwrap()
            .to_string();
        assert!(refused.contains("512 MiB of memory"), "{refused}");
        one.machine.resume().await.unwrap();
        assert_eq!(one.number("use 320").await, 320 << 8);
        grow(&one, 1024).await;
    });
}

fn without_files(template: &Template) {
    let directory = tempfile::tempdir().unwrap();
    for name in ["state", "memory"] {
        let mut from = File::open(template.path(name)).unwrap();
        let mut to = File::create_new(directory.path().join(name)).unwrap();
        std::io::copy(&mut from, &mut to).unwrap();
    }
    template.runtime.block_on(async {
        let clone = Clone::launch(Spec::restored(files(directory.path(), false), "one"));
        let clone = clone.await.unwrap();

        drop(directory);

        assert_eq!(clone.ask("pattern").await, "7 true");
        clone.ask("mount").await;
        assert_eq!(clone.ask("read /rw/name").await, "one");
    });
}

fn processors(template: &Template) {
    template.runtime.block_on(async {
        let mut spec = template.spec("two");
        spec.machine = spec.machine.vcpus(2);
        let clone = Clone::launch(spec).await.unwrap();
        let online = "/sys/devices/system/cpu/online";
        assert_eq!(clone.ask(&format!("read {online}")).await, "0");

        clone
            .ask("write /sys/devices/system/cpu/cpu1/online 1")
            .await;

        assert_eq!(clone.ask(&format!("read {online}")).await, "0-1");
        // Now it runs, so that it is needed.
        let directory = tempfile::tempdir().unwrap();
        let snapshot = clone.machine.snapshot(files(directory.path(), true));
        snapshot.await.unwrap();
        let mut both = Spec::restored(files(directory.path(), false), "both");
        both.machine = both.machine.vcpus(2);
        let both = Clone::launch(both).await.unwrap();
        assert_eq!(both.ask(&format!("read {online}")).await, "0-1");
        let one = Spec::restored(files(directory.path(), false), "one");
        let refused = Clone::refused(one).await;
        assert!(
            refused.contains("processor 1 of the snapshot runs"),
            "{refused}"
        );
        let mut three = Spec::restored(files(directory.path(), false), "three");
        three.machine = three.machine.vcpus(3);
        let refused = Clone::refused(three).await;
        assert!(
            refused.contains("the snapshot has 2 processors"),
            "{refused}"
        );
    });
}

/// MiB of memory that is the machine's own, and no file's.
fn private(clone: &Clone) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", clone.machine.pid())).unwrap();
    let mut lines = text.lines();
    let line = lines.find(|line| line.starts_with("RssAnon:")).unwrap();
    let kibibytes = line.split_whitespace().nth(1).unwrap();
    kibibytes.parse::<u64>().unwrap() >> 10
}

fn freed(template: &Template) {
    /// MiB that the guest uses, and that may stay: pages are reported in blocks of 2 MiB, and one in which a page is
    /// still used stays whole.
    const USED: u64 = 96;
    const STAYS: u64 = 32;
    template.runtime.block_on(async {
        let (one, other) = tokio::join!(template.clone("one"), template.clone("other"));
        assert_eq!(other.ask("pattern").await, "7 true");
        let before = private(&one);
        // The second time in pages that have come back, and are the template's again.
        for _ in 0..2 {
            assert_eq!(one.number(&format!("use {USED}")).await, USED << 8);
            assert!(private(&one) >= before + STAYS, "{before}");

            // Linux reports pages two seconds after they were freed; emulated, that is longer.
            let began = Instant::now();
            while private(&one) > before + STAYS {
                assert!(began.elapsed() < Duration::from_secs(120), "{before}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        assert_eq!(one.ask("pattern").await, "7 true");
        assert_eq!(other.ask("pattern").await, "7 true");
        assert_eq!(template.clone("third").await.ask("pattern").await, "7 true");
    });
}
