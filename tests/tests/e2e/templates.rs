//! Pods whose machines begin with a template, and what they don't have in common for that.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, SystemTime};

use hull_tests::host::kill_9;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::Pod;
use hull_tests::{eventually, scaled};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::time::{ClockId, clock_gettime, clock_settime};

const SECOND: Duration = Duration::from_secs(1);
/// For a template to be made, beside others.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of one of the guest's.
const PAGE: usize = 4096;

fn manifest(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  volumes:
  - name: data
    emptyDir: {{}}
  containers:
  - name: main
    image: busybox
    command: [sleep, infinity]
    volumeMounts: [{{name: data, mountPath: /data}}]
"
    )
}

/// The id of the template that a pod's machine began with.
fn template(pod: &Pod<'_>) -> Option<String> {
    let inspected = pod.inspect();
    inspected["status"]["template"].as_str().map(str::to_owned)
}

fn current(hull: &Hull) -> Vec<String> {
    let all = hull.json(["template", "ls"]);
    let items = all["items"].as_array().cloned().unwrap_or_default();
    items
        .iter()
        .filter(|template| template["current"] == true)
        .map(|template| template["id"].as_str().expect("an id").to_owned())
        .collect()
}

fn create(hull: &Hull) -> String {
    hull.ok(["template", "create"]).trim().to_owned()
}

fn directory(hull: &Hull, id: &str) -> PathBuf {
    hull.data_dir().join("templates").join(id)
}

fn says(hull: &Hull, pod: &str, script: &str) -> String {
    let said = hull.ok(["exec", pod, "--", "sh", "-c", script]);
    said.trim().to_owned()
}

#[test]
fn the_first_pod_has_a_template_made_for_the_second() {
    let hull = Hull::new().with_templates();
    let first = Pod::start(&hull, "first", &manifest("first"));
    assert_eq!(template(&first), None);
    let made = eventually("a template is made", LIMIT, || current(&hull).pop());

    let second = Pod::start(&hull, "second", &manifest("second"));

    assert_eq!(template(&second), Some(made.clone()));
    // It has all that a pod has.
    assert_eq!(
        says(&hull, "second", "echo x > /data/x; cat /data/x; hostname"),
        "x\nsecond"
    );
    let address = second.addresses()[0].to_string();
    assert_eq!(says(&hull, "second", "hostname -i"), address);
    let ping = format!("ping -c 1 -w 20 {address} > /dev/null && echo reached");
    assert_eq!(says(&hull, "first", &ping), "reached");
    assert_eq!(
        says(&hull, "second", "nproc"),
        says(&hull, "first", "nproc")
    );
    let _ = hull.ok(["pause", "second"]);
    let _ = hull.ok(["resume", "second"]);
    assert_eq!(says(&hull, "second", "cat /data/x"), "x");
    // The first goes on when the template is gone, and so does the second.
    assert_eq!(hull.ok(["template", "rm", &made]).trim(), made);
    assert_eq!(says(&hull, "second", "cat /data/x"), "x");
    assert!(current(&hull).is_empty());
}

#[test]
fn clones_have_nothing_of_their_own_in_common() {
    let hull = Hull::new().with_templates();
    let id = create(&hull);
    let names = ["one", "two", "three"];
    let pods: Vec<_> = names
        .iter()
        .map(|name| Pod::start(&hull, name, &manifest(name)))
        .collect();
    let mut seen = BTreeSet::new();
    for (pod, name) in pods.iter().zip(names) {
        assert_eq!(template(pod), Some(id.clone()));
        for script in [
            "cat /proc/sys/kernel/random/boot_id",
            "cat /proc/sys/kernel/random/uuid",
            "head -c 32 /dev/urandom | xxd -p",
            "head -c 32 /dev/random | xxd -p",
            "cat /sys/class/net/eth0/address",
            "hostname -i",
            "hostname",
        ] {
            let said = says(&hull, name, script);
            assert!(seen.insert(said.clone()), "{name}: {script}: {said}");
        }
    }
    // What one writes into its memory no other finds in its own: /dev/shm is memory of the guest.
    let _ = says(
        &hull,
        "one",
        "yes a-secret-of-one | head -c 4194304 > /dev/shm/secret",
    );
    let found = says(&hull, "two", "ls /dev/shm | wc -l");
    assert_eq!(found, "0");
}

#[test]
fn a_clones_clock_is_right_however_long_its_template_lay() {
    let hull = Hull::new().with_templates();
    let id = create(&hull);
    // Nobody's machine is put ahead: elsewhere than in the lab it lay for a moment.
    let _tomorrow = std::env::var_os("HULL_LAB").map(|_| Tomorrow::set());
    let pod = Pod::start(&hull, "late", &manifest("late"));
    assert_eq!(template(&pod), Some(id));

    let guest: u64 = says(&hull, "late", "date +%s").parse().expect("seconds");
    let host = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let host = host.expect("after 1970").as_secs();

    assert!(
        host.abs_diff(guest) <= scaled(2 * SECOND).as_secs(),
        "{host} {guest}"
    );
}

/// How many of a kernel's numbers for the same connections are as good as equal, of sequences and of timestamps.
fn alike(one: &str, other: &str) -> [usize; 2] {
    /// Numbers that so much time of the measurement's lies between: 2 s, in 64 ns, and in ms.
    const NEAR: [u32; 2] = [31_250_000, 2000];
    let numbers = |text: &str| -> Vec<u32> {
        let words = text.split_whitespace();
        words.map(|word| word.parse().expect("a number")).collect()
    };
    let (one, other) = (numbers(one), numbers(other));
    assert_eq!((one.len(), other.len()), (8, 8));
    let mut alike = [0; 2];
    for (place, (one, other)) in one.into_iter().zip(other).enumerate() {
        let apart = one.wrapping_sub(other).min(other.wrapping_sub(one));
        alike[place % 2] += usize::from(apart < NEAR[place % 2]);
    }
    alike
}

#[test]
fn clones_number_their_connections_each_in_its_own_way() {
    let hull = Hull::new().with_templates();
    let id = create(&hull);
    let tools = hull.work_dir().join("tools");
    fs::create_dir(&tools).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_syn"), tools.join("syn")).unwrap();
    let manifest = |name: &str| {
        let mounts = "{name: data, mountPath: /data}, {name: tools, mountPath: /tools}";
        manifest(name)
            .replace("{name: data, mountPath: /data}", mounts)
            .replace(
                "  containers:",
                &format!(
                    "  - name: tools\n    hostPath: {{path: {}}}\n  containers:",
                    tools.display()
                ),
            )
            .replace(
                "    volumeMounts",
                "    securityContext: {capabilities: {add: [NET_RAW]}}\n    volumeMounts",
            )
    };
    let pods = ["one", "two"].map(|name| Pod::start(&hull, name, &manifest(name)));
    assert!(pods.iter().all(|pod| template(pod) == Some(id.clone())));

    let one = says(&hull, "one", "exec /tools/syn");
    let again = says(&hull, "one", "exec /tools/syn");
    let two = says(&hull, "two", "exec /tools/syn");

    // So the measure is right, and one that is alike by chance is no surprise.
    assert_eq!(alike(&one, &again), [4, 4], "{one}, {again}");
    let alike = alike(&one, &two);
    assert!(alike.iter().all(|count| *count < 2), "{one}, {two}");
}

/// The host's clock, ahead by a day until it is dropped.
struct Tomorrow;

const DAY: i64 = 24 * 60 * 60;

impl Tomorrow {
    fn set() -> Self {
        move_clock(DAY);
        Self
    }
}

impl Drop for Tomorrow {
    fn drop(&mut self) {
        move_clock(-DAY);
    }
}

fn move_clock(seconds: i64) {
    let mut now = clock_gettime(ClockId::Realtime);
    now.tv_sec += seconds;
    clock_settime(ClockId::Realtime, now).expect("setting the lab's clock");
}

#[test]
fn a_template_that_is_no_good_is_passed_over_and_made_anew() {
    let hull = Hull::new().with_templates();
    for damage in ["truncated", "deleted", "written", "description"] {
        let id = create(&hull);
        let directory = directory(&hull, &id);
        let (state, memory) = (directory.join("state"), directory.join("memory"));
        match damage {
            "truncated" => {
                let file = fs::File::options().write(true).open(&memory).unwrap();
                file.set_len(1 << 20).unwrap();
            }
            "deleted" => fs::remove_file(&state).unwrap(),
            "written" => {
                let mut bytes = fs::read(&state).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&state, bytes).unwrap();
            }
            _ => fs::write(directory.join("template.json"), "{}").unwrap(),
        }
        assert!(current(&hull).is_empty(), "{damage}");

        let pod = Pod::start(&hull, "web", &manifest("web"));

        assert_eq!(template(&pod), None, "{damage}");
        let again = eventually("it is made again", LIMIT, || current(&hull).pop());
        assert_eq!(again, id);
        drop(pod);
        let _ = hull.ok(["template", "rm", "--all"]);
    }
}

/// Has a template's description be of its memory file as that is now.
fn make_known(directory: &Path) {
    let place = directory.join("template.json");
    let text = fs::read(&place).expect("a description");
    let mut description: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let memory = fs::metadata(directory.join("memory")).expect("a memory file");
    let nanoseconds = |seconds, rest| seconds * 1_000_000_000 + rest;
    description["memory"]["modified"] = nanoseconds(memory.mtime(), memory.mtime_nsec()).into();
    description["memory"]["changed"] = nanoseconds(memory.ctime(), memory.ctime_nsec()).into();
    fs::write(place, description.to_string()).expect("it can be written");
}

/// The pages of all programs in the guest's first file system, as they lie in its memory.
fn program_pages() -> BTreeSet<Vec<u8>> {
    let image = std::env::var_os("HULL_GUEST_DIR").expect("HULL_GUEST_DIR");
    let archive = fs::read(Path::new(&image).join("initramfs.cpio")).expect("an initramfs");
    let magic = b"\x7fELF\x02\x01\x01";
    let starts = (0..archive.len()).filter(|start| archive[*start..].starts_with(magic));
    let pages = starts.flat_map(|start| archive[start..].chunks_exact(PAGE));
    let pages = pages.filter(|page| page.iter().any(|byte| *byte != 0));
    pages.map(<[u8]>::to_vec).collect()
}

/// Has a template's clones never answer, wherever they go on.
fn make_endless(directory: &Path) {
    /// Instructions: one that does nothing, and one that jumps to itself.
    const NOTHING: u8 = 0x90;
    const FOREVER: [u8; 2] = [0xEB, 0xFE];
    let mut options = fs::File::options();
    let memory = directory.join("memory");
    let file = options.read(true).write(true).open(memory).unwrap();
    let programs = program_pages();
    let mut forever = vec![NOTHING; PAGE - FOREVER.len()];
    forever.extend(FOREVER);
    let (mut page, mut found) = (vec![0; PAGE], 0);
    let mut at = 0;
    while file.read_exact_at(&mut page, at).is_ok() {
        if programs.contains(&page) {
            file.write_all_at(&forever, at).unwrap();
            found += 1;
        }
        at += PAGE as u64;
    }
    assert!(found > 0, "no page of a program is in memory");
    make_known(directory);
}

/// `hull run -d` of a pod whose agent has 40 s to answer.
fn run_impatiently(hull: &Hull, name: &str) -> Child {
    let manifest = hull.manifest("web.yaml", &manifest(name));
    let mut run = hull.command(["run", "-d"]);
    run.env("HULL_AGENT_TIMEOUT", "40").arg(manifest);
    run.spawn().expect("hull is on PATH")
}

#[test]
fn a_clone_that_does_not_answer_gives_way_to_a_machine_that_boots() {
    for damage in ["ends", "hangs"] {
        let hull = Hull::new().with_templates();
        let id = create(&hull);
        let directory = directory(&hull, &id);
        if damage == "ends" {
            let memory = directory.join("memory");
            let file = fs::File::options().write(true).open(memory).unwrap();
            let size = file.metadata().unwrap().len();
            file.set_len(0).unwrap();
            file.set_len(size).unwrap();
            make_known(&directory);
        } else {
            make_endless(&directory);
        }
        assert_eq!(current(&hull), [id.as_str()], "{damage}");

        let run = run_impatiently(&hull, "web");
        assert_success(&run.wait_with_output().unwrap(), damage);
        let pod = Pod::running(&hull, "web");

        assert_eq!(template(&pod), None, "{damage}");
        let events = hull.ok(["events", "web"]);
        let why = match damage {
            "ends" => "the machine ended",
            _ => "was not ready after 40 s",
        };
        let told = |line: &str| line.contains("TemplateRemoved") && line.contains(why);
        assert!(events.lines().any(told), "{damage}: {events}");
        // It has all that a pod has, of what the clone would have had.
        let address = pod.addresses()[0].to_string();
        assert_eq!(says(&hull, "web", "hostname -i"), address);
        let volume = "echo x > /data/x; cat /data/x";
        assert_eq!(says(&hull, "web", volume), "x");
        // The next might be as good: none is made for now.
        assert_eq!(failure(&hull)["count"], 1, "{damage}");
        assert!(current(&hull).is_empty(), "{damage}");
    }
}

#[test]
fn a_clone_that_is_killed_says_nothing_of_its_template() {
    let hull = Hull::new().with_templates();
    let id = create(&hull);
    make_endless(&directory(&hull, &id));
    let run = run_impatiently(&hull, "web");
    let pod = Pod::running(&hull, "web");
    let clone = eventually("there is a clone", LIMIT, || {
        let inspected = hull.run(["inspect", "web"]).stdout;
        let inspected: serde_json::Value = serde_json::from_slice(&inspected).ok()?;
        let status = inspected.get(0).unwrap_or(&inspected)["status"].clone();
        let pid = status["template"].as_str().and(status["vmmPid"].as_i64())?;
        i32::try_from(pid).ok()
    });

    // As by a host that is out of memory.
    kill_9(clone);

    assert_success(&run.wait_with_output().unwrap(), "hull run -d");
    assert_eq!(template(&pod), None);
    let events = hull.ok(["events", "web"]);
    let told = |line: &str| line.contains("TemplatePassedOver") && line.contains("signal 9");
    assert!(events.lines().any(told), "{events}");
    assert_eq!(current(&hull), [id]);
    assert!(failure(&hull).is_null());
}

/// What `hull template ls` says of the only template that failed.
fn failure(hull: &Hull) -> serde_json::Value {
    let all = hull.json(["template", "ls"]);
    let items = all["items"].as_array().cloned().unwrap_or_default();
    let mut failed = items.iter().map(|item| item["failure"].clone());
    failed
        .find(|failure| !failure.is_null())
        .unwrap_or_default()
}

#[test]
fn a_template_that_cannot_be_made_is_not_tried_with_every_pod() {
    let hull = Hull::new().with_templates();
    let place = hull.data_dir().join("templates");
    fs::DirBuilder::new().mode(0o700).create(&place).unwrap();
    // Too small for one, and for all that is told of it large enough.
    let room = Room::new(&place, "4m");
    let first = Pod::start(&hull, "first", &manifest("first"));
    eventually("it has failed", LIMIT, || {
        (!failure(&hull).is_null()).then_some(())
    });
    drop(first);

    let second = Pod::start(&hull, "second", &manifest("second"));
    std::thread::sleep(scaled(SECOND));

    assert_eq!(template(&second), None);
    let making = |entry: fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b".new");
    let mut left = fs::read_dir(&place).unwrap();
    assert!(!left.any(|entry| making(entry.unwrap())));
    assert_eq!(failure(&hull)["count"], 1);
    let why = failure(&hull)["why"].to_string();
    assert!(why.contains("No space left on device"), "{why}");
    let checked = hull.run(["check"]);
    let checked = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.contains("No space left on device"), "{checked}");
    // Who asks for one has it tried.
    let refused = hull.run(["template", "create"]);
    assert!(!refused.status.success());
    assert_eq!(failure(&hull)["count"], 2);
    room.grow("400m");
    let id = create(&hull);
    assert!(failure(&hull).is_null());
    let third = Pod::start(&hull, "third", &manifest("third"));
    assert_eq!(template(&third), Some(id));
}

/// A file system in memory, mounted until it is dropped.
struct Room(PathBuf);

impl Room {
    fn new(place: &Path, size: &str) -> Self {
        let options = CString::new(format!("size={size},mode=0700")).expect("no NUL");
        let flags = MountFlags::empty();
        mount("room", place, "tmpfs", flags, Some(&*options)).expect("mounting as root");
        Self(place.to_owned())
    }

    fn grow(&self, size: &str) {
        let flags = MountFlags::empty();
        mount_remount(&self.0, flags, format!("size={size}")).expect("mounting as root");
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn who_wants_no_templates_has_none() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "web", &manifest("web"));
    assert_eq!(template(&pod), None);

    let refused = hull.run(["template", "create"]);

    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("HULL_TEMPLATES"));
    assert!(!hull.data_dir().join("templates").join(".new").exists());
    assert!(hull.ok(["template", "ls", "--quiet"]).is_empty());
}

#[test]
fn a_pod_of_another_size_has_another_template() {
    let hull = Hull::new().with_templates();
    let id = create(&hull);
    let small = manifest("small").replace(
        "    volumeMounts",
        "    resources: {limits: {memory: 200Mi, cpu: 500m}}\n    volumeMounts",
    );
    let file = hull.manifest("small.yaml", &small);

    let other = hull.ok(["template".as_ref(), "create".as_ref(), file.as_os_str()]);
    let pod = Pod::start(&hull, "small", &small);

    assert_eq!(template(&pod).as_deref(), Some(other.trim()));
    assert_ne!(other.trim(), id);
    assert_eq!(says(&hull, "small", "nproc"), "1");
}

#[test]
fn many_clones_start_at_once() {
    /// As many as the lab, which has one processor, starts in a minute.
    const DEFAULT: usize = 12;
    let count = std::env::var("HULL_TEST_CLONES").map_or(DEFAULT, |text| {
        text.parse().expect("HULL_TEST_CLONES is a number")
    });
    let hull = Hull::new().with_templates();
    let id = create(&hull);
    let started: Vec<_> = (0..count)
        .map(|number| {
            let name = format!("pod-{number}");
            let file = hull.manifest(&format!("{name}.yaml"), &manifest(&name));
            let run = hull.command(["run", "-d"]).arg(file).spawn();
            (name, run.expect("hull is on PATH"))
        })
        .collect();
    let mut boots = BTreeSet::new();
    for (name, run) in started {
        assert_success(&run.wait_with_output().unwrap(), &name);
        let pod = Pod::running(&hull, &name);
        let events = || hull.ok(["events", &name]);
        assert_eq!(template(&pod), Some(id.clone()), "{}", events());
        let boot = says(&hull, &name, "cat /proc/sys/kernel/random/boot_id");
        assert!(boots.insert(boot), "{name}");
        std::mem::forget(pod);
    }
    // However long they took.
    assert_eq!(current(&hull), [id]);
    let _ = hull.ok(["rm", "--force", "--all"]);
}
