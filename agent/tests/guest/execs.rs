//! Execs in a running container.

use std::fs;

use ttrpc::Code;

use crate::world::{World, read_all, spec};

crate::tests!(
    an_exec_has_output_exit_code_environment_and_directory,
    an_exec_may_have_another_user,
    an_exec_with_a_terminal,
    a_background_child_does_not_hold_an_exec,
    what_an_exec_wrote_before_its_end_arrives,
    failed_execs_are_told,
    execs_need_a_running_container,
    many_execs_leave_nothing,
    helpers_come_from_another_parent_when_one_is_killed,
);

async fn an_exec_has_output_exit_code_environment_and_directory(world: World) {
    world.sleeper("e1").await;
    let (exit, out, err) = world
        .exec(
            "e1",
            "x",
            &[
                "sh",
                "-c",
                "echo $COLOUR $SIZE; pwd; hostname; cat; echo e >&2; exit 9",
            ],
            |request| {
                request.env = vec!["COLOUR=blue".into(), "SIZE=big".into()];
                request.cwd = "/tmp".into();
            },
        )
        .await;
    assert_eq!(out, "blue big\n/tmp\npod-1\n");
    assert_eq!(err, "e\n");
    assert_eq!(exit.exit_code, 9);
    world.end("e1").await;
}

async fn an_exec_may_have_another_user(world: World) {
    world.sleeper("e2").await;
    let (_, out, err) = world
        .exec(
            "e2",
            "x",
            &[
                "sh",
                "-c",
                "id -u; id -G; echo $HOME; echo ok > /dev/stdout; grep CapEff /proc/self/status",
            ],
            |request| request.user = "web".into(),
        )
        .await;
    assert_eq!(err, "");
    assert_eq!(out, "33\n34 4\n/tmp\nok\nCapEff:\t0000000000000000\n");
    world.end("e2").await;
}

async fn an_exec_with_a_terminal(world: World) {
    world.sleeper("e3").await;
    let mut stdio = world.stdio(true).await;
    stdio.numbers.columns = 132;
    stdio.numbers.rows = 43;
    world
        .start_exec(
            "e3",
            "x",
            &["sh", "-c", "stty size; read x; echo got $x; exit 4"],
            &stdio,
            |_| {},
        )
        .await
        .unwrap();
    stdio.stdin.write_all(b"it\n").await.unwrap();
    let out = read_all(&stdio.stdout).await;
    assert!(out.contains("43 132\r\n"), "{out:?}");
    assert!(out.ends_with("got it\r\n"), "{out:?}");
    assert_eq!(world.wait("e3", "x").await.exit_code, 4);
    world.end("e3").await;
}

async fn a_background_child_does_not_hold_an_exec(world: World) {
    world.sleeper("e4").await;
    let chatty = "(while :; do echo noise; done) & echo done";
    let (exit, out, _) = world.exec("e4", "x", &["sh", "-c", chatty], |_| {}).await;
    assert_eq!(exit.exit_code, 0);
    assert!(out.contains("done\n"), "{} bytes", out.len());
    world.end("e4").await;
}

async fn what_an_exec_wrote_before_its_end_arrives(world: World) {
    world.sleeper("e5").await;
    for round in 0..10 {
        let (_, out, _) = world
            .exec(
                "e5",
                "x",
                &["sh", "-c", "head -c 50000 /dev/zero; echo end"],
                |_| {},
            )
            .await;
        assert_eq!(out.len(), 50004, "round {round}");
    }
    world.end("e5").await;
}

async fn failed_execs_are_told(world: World) {
    world.sleeper("e6").await;
    let code = async |args: &[&str], cwd: &str| {
        let stdio = world.stdio(false).await;
        let error = world
            .start_exec("e6", "x", args, &stdio, |request| request.cwd = cwd.into())
            .await
            .unwrap_err();
        match error {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("{other}"),
        }
    };
    assert_eq!(code(&["nonesuch"], "").await.0, Code::NOT_FOUND);
    assert_eq!(code(&["/etc"], "").await.0, Code::PERMISSION_DENIED);
    assert_eq!(code(&["true"], "relative").await.0, Code::INVALID_ARGUMENT);
    let (internal, message) = code(&["true"], "/none").await;
    assert_eq!(internal, Code::INTERNAL);
    assert!(message.contains("ENOENT"), "{message}");
    // Neither the name nor anything else is held.
    let (exit, ..) = world.exec("e6", "x", &["true"], |_| {}).await;
    assert_eq!(exit.exit_code, 0);
    world.end("e6").await;
}

async fn execs_need_a_running_container(world: World) {
    let stdio = world.stdio(false).await;
    world
        .create("e7", &spec(&["true"]), stdio.numbers.clone())
        .await
        .unwrap();
    let exec = world.stdio(false).await;
    assert!(
        world
            .start_exec("e7", "x", &["true"], &exec, |_| {})
            .await
            .is_err()
    );
    world.start("e7").await.unwrap();
    assert!(world.start("e7").await.is_err());
    world.wait("e7", "").await;
    let exec = world.stdio(false).await;
    assert!(
        world
            .start_exec("e7", "x", &["true"], &exec, |_| {})
            .await
            .is_err()
    );
    world.remove("e7").await.unwrap();
    assert!(world.remove("e7").await.is_err());
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn processes() -> usize {
    fs::read_dir("/proc")
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_str().unwrap().parse::<u32>().is_ok()
        })
        .count()
}

fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .count()
}

async fn many_execs_leave_nothing(world: World) {
    world.sleeper("e8").await;
    world.exec("e8", "warm", &["true"], |_| {}).await;
    let before = (open_descriptors(), processes(), mounts());
    for number in 0..200 {
        let id = format!("x{number}");
        let (exit, out, _) = world.exec("e8", &id, &["echo", "hi"], |_| {}).await;
        assert_eq!((exit.exit_code, out.as_str()), (0, "hi\n"));
    }
    let ids: Vec<String> = (0..10).map(|number| format!("y{number}")).collect();
    let mut at_once = tokio::task::JoinSet::new();
    for id in ids {
        let world = world.clone();
        at_once.spawn(async move {
            world.exec("e8", &id, &["echo", &id], |_| {}).await.1 == format!("{id}\n")
        });
    }
    assert!(at_once.join_all().await.into_iter().all(|right| right));
    // Closed ends are dropped by tasks of the runtime.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let after = (open_descriptors(), processes(), mounts());
    assert!(
        after.0 <= before.0 && after.1 <= before.1 && after.2 <= before.2,
        "descriptors, processes, mounts: {before:?}, then {after:?}"
    );
    assert_eq!(fs::read_dir("/run/hull/execs").unwrap().count(), 0);
    world.end("e8").await;
}

async fn helpers_come_from_another_parent_when_one_is_killed(world: World) {
    world.sleeper("c35").await;
    let is_parent = |entry: &std::path::Path| {
        fs::read(entry.join("cmdline")).is_ok_and(|line| line == b"helpers\0")
    };
    for round in 0..2 {
        for entry in fs::read_dir("/proc").unwrap() {
            let entry = entry.unwrap().path();
            if is_parent(&entry) {
                let pid = entry
                    .file_name()
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .parse()
                    .unwrap();
                let pid = rustix::process::Pid::from_raw(pid).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            }
        }
        // It may not have died yet: then this exec's helper dies, which is said.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let (exit, out, _) = world
            .exec("c35", &format!("e{round}"), &["echo", "yes"], |_| {})
            .await;
        assert_eq!((exit.exit_code, out.as_str()), (0, "yes\n"));
    }
    world.end("c35").await;
}
