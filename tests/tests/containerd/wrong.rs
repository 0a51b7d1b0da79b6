//! What goes wrong: containerd, shims and machines that are killed, and clients that go.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use hull_tests::containerd::{Containerd, HULL};
use hull_tests::hull::assert_success;
use hull_tests::{eventually, host, scaled};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::sandboxes::{member, sandbox};

/// For what is to follow at once: containerd itself takes its time, too.
const SOON: Duration = Duration::from_secs(3);
const LONG: Duration = Duration::from_secs(30);
const SLEEP: &[&str] = &["sleep", "1000"];

/// What containerd tells of tasks, from now on.
struct Events {
    lines: Receiver<String>,
    ctr: Child,
}

impl Events {
    fn of(containerd: &Containerd) -> Self {
        let mut ctr = containerd
            .ctr_command(&["events"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(ctr.stdout.take().unwrap());
        let (tell, lines) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        // Until it listens.
        thread::sleep(scaled(Duration::from_millis(200)));
        Self { lines, ctr }
    }

    /// Waits for the end of a process, and returns all that is said of it.
    fn exit_of(&self, id: &str, within: Duration) -> String {
        let begun = Instant::now();
        loop {
            let left = scaled(within).saturating_sub(begun.elapsed());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("no exit of {id} within {within:?}"));
            if line.contains("/tasks/exit") && line.contains(&format!("\"id\":\"{id}\"")) {
                return line;
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.ctr.kill();
        let _ = self.ctr.wait();
    }
}

/// `ctr` in CRI's namespace, which has the same images.
fn elsewhere(containerd: &Containerd, arguments: &[&str]) -> String {
    let mut ctr = Command::new("ctr");
    ctr.arg("--address").arg(containerd.socket());
    ctr.args(["--namespace", "k8s.io"]).args(arguments);
    let output = ctr.output().unwrap();
    assert_success(&output, &format!("ctr {arguments:?}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn detached(containerd: &Containerd, flags: &[&str], id: &str, program: &[&str]) {
    let flags = [&["-d"], flags].concat();
    assert_success(&containerd.run(&flags, id, program), "ctr run -d");
}

fn status(containerd: &Containerd, id: &str) -> Option<String> {
    let tasks = containerd.ok(&["task", "ls"]);
    let line = tasks.lines().find(|line| line.starts_with(id))?;
    line.split_whitespace().last().map(str::to_owned)
}

/// Deletes a task that has ended, and its container. Returns the task's status, which `ctr` warns of.
fn delete(containerd: &Containerd, id: &str) -> i32 {
    let deleted = containerd.ctr(&["task", "rm", id]);
    assert_success(&deleted, "ctr task rm");
    let _ = containerd.ok(&["container", "rm", id]);
    let said = String::from_utf8_lossy(&deleted.stderr).into_owned();
    let Some((_, status)) = said.split_once("non-zero exit code ") else {
        return 0;
    };
    let digits = status.split(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap().parse().unwrap()
}

fn kill(containerd: &Containerd, id: &str) {
    let begun = Instant::now();
    let _ = containerd.ok(&["task", "kill", "--signal", "SIGKILL", id]);
    let took = begun.elapsed();
    assert!(took < scaled(SOON), "{took:?}");
}

fn exec(containerd: &Containerd, id: &str, program: &[&str]) -> String {
    let arguments = [&["task", "exec", "--exec-id", "probe", id], program].concat();
    containerd.ok(&arguments)
}

fn children_of(pid: impl std::fmt::Display) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children"));
    let all: Vec<_> = threads.flatten().filter_map(|t| of(t).ok()).collect();
    let pids = all.iter().flat_map(|line| line.split_whitespace());
    pids.filter_map(|pid| pid.parse().ok()).collect()
}

/// The machine of a shim.
fn machine_of(shim: i32) -> i32 {
    let is_it = |pid: &i32| {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.starts_with("hull-vmm")
    };
    let machine = children_of(shim).into_iter().find(is_it);
    machine.unwrap_or_else(|| panic!("shim {shim} has no machine"))
}

#[test]
fn a_containerd_that_is_killed_finds_its_pods_again() {
    let mut containerd = Containerd::start();
    let data = containerd.work_dir();
    let bind = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        data.display()
    );
    detached(&containerd, &[], "stays", SLEEP);
    let script = "while [ ! -e /data/stop ]; do sleep 0.1; done; exit 5";
    detached(
        &containerd,
        &["--mount", &bind],
        "ends",
        &["sh", "-c", script],
    );

    containerd.kill9();
    std::fs::write(data.join("stop"), "").unwrap();
    thread::sleep(scaled(Duration::from_millis(300)));
    containerd.restart();

    assert_eq!(status(&containerd, "stays").as_deref(), Some("RUNNING"));
    assert_eq!(
        exec(&containerd, "stays", &["echo", "hello"]).trim(),
        "hello"
    );
    eventually("the end that nobody saw is known", LONG, || {
        (status(&containerd, "ends").as_deref() == Some("STOPPED")).then_some(())
    });
    assert_eq!(delete(&containerd, "ends"), 5);
    let events = Events::of(&containerd);
    kill(&containerd, "stays");
    assert!(events.exit_of("stays", LONG).contains(":137"));
    drop(events);
    assert_eq!(delete(&containerd, "stays"), 137);
    containerd.nothing_left();
}

#[test]
fn a_containerd_that_is_killed_while_it_creates_leaves_nothing() {
    let mut containerd = Containerd::start();
    for moment in [0, 50, 150, 300, 600] {
        let mut ctr = containerd
            .run_command(&["-d"], "torn", SLEEP)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(scaled(Duration::from_millis(moment)));

        containerd.kill9();
        // It waits for somebody who is gone.
        let _ = ctr.kill();
        let _ = ctr.wait();
        containerd.restart();

        // Whatever there is of it can be removed, and then there is nothing.
        eventually("it is removed", LONG, || {
            let _ = containerd.ctr(&["task", "rm", "--force", "torn"]);
            let tasks = containerd.ok(&["task", "ls", "-q"]);
            (!tasks.contains("torn")).then_some(())
        });
        let _ = containerd.ctr(&["container", "rm", "torn"]);
        let _ = containerd.ctr(&["snapshot", "rm", "torn"]);
        containerd.nothing_left();
    }
    let again = containerd.run(&["--rm"], "torn", &["true"]);
    assert_success(&again, "ctr run");
    containerd.nothing_left();
}

#[test]
fn a_shim_that_is_killed_leaves_nothing() {
    let containerd = Containerd::start();
    detached(&containerd, &[], "one", SLEEP);
    let shim = containerd.shim(containerd.name(), "one").unwrap();
    let machine = machine_of(shim);
    let events = Events::of(&containerd);

    host::kill_9(shim);

    assert!(events.exit_of("one", LONG).contains(":137"));
    drop(events);
    eventually("its machine ends", SOON, || {
        (!host::is_alive(machine)).then_some(())
    });
    let _ = containerd.ctr(&["task", "rm", "one"]);
    let _ = containerd.ok(&["container", "rm", "one"]);
    containerd.nothing_left();
    let again = containerd.run(&["--rm"], "one", &["true"]);
    assert_success(&again, "ctr run");
    containerd.nothing_left();
}

#[test]
fn a_machine_that_is_killed_ends_all_that_was_in_it() {
    let containerd = Containerd::start();
    sandbox(&containerd, "pod");
    member(&containerd, &["-d"], "pod", "one", SLEEP);
    member(&containerd, &["-d"], "pod", "two", SLEEP);
    let shim = containerd.shim(containerd.name(), "pod").unwrap();

    host::kill_9(machine_of(shim));

    let begun = Instant::now();
    for id in ["one", "two", "pod"] {
        // Their order is nobody's.
        eventually("it ends", Duration::from_secs(1), || {
            (status(&containerd, id).as_deref() == Some("STOPPED")).then_some(())
        });
        println!("{id}: {:?}", begun.elapsed());
    }
    for id in ["one", "two", "pod"] {
        assert_eq!(delete(&containerd, id), 137, "{id}");
    }
    eventually("no shim stays", SOON, || {
        (!host::is_alive(shim)).then_some(())
    });
    containerd.nothing_left();
}

#[test]
fn a_guest_kernel_that_panics_ends_its_pod() {
    let containerd = Containerd::start();
    detached(&containerd, &["--privileged"], "one", SLEEP);
    let events = Events::of(&containerd);

    let panic = "echo c >/proc/sysrq-trigger";
    let torn = containerd.ctr(&["task", "exec", "--exec-id", "e", "one", "sh", "-c", panic]);

    assert!(!torn.status.success());
    assert!(events.exit_of("one", LONG).contains(":137"));
    drop(events);
    assert_eq!(delete(&containerd, "one"), 137);
    containerd.nothing_left();
    let log = std::fs::read_to_string(containerd.log()).unwrap();
    assert!(log.contains("the guest kernel panicked"));
}

#[test]
fn nothing_that_hangs_holds_up_a_kill() {
    let containerd = Containerd::start();
    let script = "trap '' TERM; while :; do sleep 1; done";
    detached(&containerd, &[], "one", &["sh", "-c", script]);
    // A process whose output nobody reads.
    let mut stalled = containerd
        .ctr_command(&["task", "exec", "--exec-id", "stalled", "one", "yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = stalled.stdout.as_mut().unwrap().read(&mut [0; 1]).unwrap();
    // A stop that doesn't stop it.
    let _ = containerd.ok(&["task", "kill", "--signal", "SIGTERM", "one"]);
    let mut looks = Vec::new();
    for _ in 0..3 {
        let look = containerd
            .ctr_command(&["task", "ps", "one"])
            .stdout(Stdio::null())
            .spawn();
        looks.push(look.unwrap());
    }
    let events = Events::of(&containerd);

    kill(&containerd, "one");

    assert!(events.exit_of("one", LONG).contains(":137"));
    drop(events);
    for mut look in looks {
        look.wait().unwrap();
    }
    for client in children_of(stalled.id()) {
        host::kill_9(client);
    }
    stalled.wait().unwrap();
    let _ = containerd.ctr(&["task", "rm", "--exec-id", "stalled", "one"]);
    assert_eq!(delete(&containerd, "one"), 137);
    containerd.nothing_left();
}

#[test]
fn a_container_whose_reader_is_gone_can_be_killed() {
    let containerd = Containerd::start();
    let mut ctr = containerd
        .run_command(&[], "one", &["yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = ctr.stdout.as_mut().unwrap().read(&mut [0; 1]).unwrap();

    // `timeout`, and `ctr` beneath it.
    for client in children_of(ctr.id()) {
        host::kill_9(client);
    }
    drop(ctr.stdout.take());
    ctr.wait().unwrap();

    assert_eq!(status(&containerd, "one").as_deref(), Some("RUNNING"));
    let events = Events::of(&containerd);
    kill(&containerd, "one");
    assert!(events.exit_of("one", LONG).contains(":137"));
    drop(events);
    assert_eq!(delete(&containerd, "one"), 137);
    containerd.nothing_left();
}

#[test]
fn a_bundle_on_a_disk_that_is_full_fails_clearly() {
    let containerd = Containerd::start();
    let bundles = containerd.bundle(containerd.name(), "x");
    let bundles = bundles.parent().unwrap();
    std::fs::create_dir_all(bundles).unwrap();
    // From nothing at all to all but the last file.
    for pages in [2, 3, 4, 5, 6, 8] {
        small(bundles, pages);

        let output = containerd.run(&["--rm"], "full", &["true"]);

        let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
        println!("{pages} pages: {:?} {said}", output.status);
        if !output.status.success() {
            assert!(said.contains("no space left"), "{pages} pages: {said}");
        }
        let _ = containerd.ctr(&["task", "rm", "--force", "full"]);
        let _ = containerd.ctr(&["container", "rm", "full"]);
        eventually("the bundle goes", LONG, || {
            let mut entries = std::fs::read_dir(bundles).unwrap();
            entries.next().is_none().then_some(())
        });
        unmount(bundles, UnmountFlags::DETACH).unwrap();
    }
    containerd.nothing_left();
}

fn small(place: &Path, pages: usize) {
    let options = format!("size={}k", pages * 4);
    let options = std::ffi::CString::new(options).unwrap();
    mount(
        "small",
        place,
        "tmpfs",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .unwrap();
}

#[test]
fn containers_of_a_pod_may_be_made_all_at_once() {
    let containerd = Containerd::start();
    sandbox(&containerd, "pod");
    let ids = ["c1", "c2", "c3", "c4", "c5"];

    thread::scope(|scope| {
        for id in ids {
            let containerd = &containerd;
            scope.spawn(move || member(containerd, &["-d"], "pod", id, SLEEP));
        }
    });

    for id in ids {
        assert_eq!(status(&containerd, id).as_deref(), Some("RUNNING"));
        let _ = containerd.ok(&["task", "rm", "--force", id]);
        let _ = containerd.ok(&["container", "rm", id]);
    }
    let _ = containerd.ok(&["task", "rm", "--force", "pod"]);
    let _ = containerd.ok(&["container", "rm", "pod"]);
    containerd.nothing_left();
}

#[test]
fn of_two_starts_at_once_one_is_the_first() {
    let containerd = Containerd::start();
    let image = "docker.io/library/busybox:latest";
    let runtime = ["container", "create", "--runtime"];
    let what = [HULL, image, "one", "sleep", "1000"];
    let _ = containerd.ok(&[&runtime[..], &what[..]].concat());

    let start = || {
        containerd
            .ctr(&["task", "start", "-d", "one"])
            .status
            .success()
    };
    let started = thread::scope(|scope| {
        let two = [scope.spawn(start), scope.spawn(start)];
        two.map(|one| one.join().unwrap())
    });

    assert_eq!(started.iter().filter(|one| **one).count(), 1);
    assert_eq!(status(&containerd, "one").as_deref(), Some("RUNNING"));
    let _ = containerd.ok(&["task", "rm", "--force", "one"]);
    let _ = containerd.ok(&["container", "rm", "one"]);
    containerd.nothing_left();
}

#[test]
fn two_pods_of_one_name_in_two_namespaces_are_two() {
    let containerd = Containerd::start();
    detached(&containerd, &["--env", "PLACE=here"], "one", SLEEP);
    let image = "docker.io/library/busybox:latest";
    let there = [
        "run",
        "-d",
        "--env",
        "PLACE=there",
        "--runtime",
        HULL,
        image,
        "one",
    ];
    let _ = elsewhere(&containerd, &[&there[..], SLEEP].concat());
    let print = "echo $PLACE";
    let asked = ["task", "exec", "--exec-id", "e", "one", "sh", "-c", print];

    assert_eq!(elsewhere(&containerd, &asked), "there\n");
    assert_eq!(containerd.ok(&asked), "here\n");
    let _ = elsewhere(&containerd, &["task", "rm", "--force", "one"]);
    let _ = elsewhere(&containerd, &["container", "rm", "one"]);

    assert_eq!(containerd.ok(&asked), "here\n");
    let _ = containerd.ok(&["task", "rm", "--force", "one"]);
    let _ = containerd.ok(&["container", "rm", "one"]);
    containerd.nothing_left();
}
