//! Containers: their output, their ends, their limits, and what they can't reach.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use ttrpc::Code;

use crate::world::{World, read_all, script, spec, with_mount};

crate::tests!(
    output_and_exit_code,
    waits_are_many_and_may_come_late,
    nothing_is_left_of_a_removed_container,
    stdin_is_passed_on_with_its_end,
    a_terminal_has_a_size_and_is_the_users,
    a_missing_program_is_said_and_nothing_is_left,
    signals_reach_the_first_process_or_all,
    the_memory_limit_is_told,
    namespaces_are_infras_but_for_pids_and_mounts,
    roots_are_apart_and_volumes_shared,
    read_only_mounts_refuse_writes,
    sub_paths_do_not_leave_their_volume,
    memory_volumes_are_bounded_and_shm_is_the_pods,
    users_are_looked_up,
    other_devices_are_refused,
    no_descriptor_leaks_into_a_container,
    a_slow_reader_stops_the_writer_and_gets_all,
    output_of_a_container_ends_with_its_processes,
    removal_does_not_cut_the_output,
    seccomp_filters_a_container_and_its_execs,
);

fn code(error: &ttrpc::Error) -> Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

async fn output_and_exit_code(world: World) {
    let (exit, out, err) = world
        .output("c1", &script("echo out; echo err >&2; exit 3"))
        .await;
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    assert_eq!((exit.exit_code, exit.signal), (3, 0));
    assert!(!exit.oom_killed);
    assert!(exit.exited_at_seconds > 0);
}

async fn waits_are_many_and_may_come_late(world: World) {
    let stdio = world.run("c2", &script("read line; exit 7"), false).await;
    let (early, other, ()) = tokio::join!(world.wait("c2", ""), world.wait("c2", ""), async {
        stdio.stdin.write_all(b"go\n").await.unwrap();
    });
    let late = world.wait("c2", "").await;
    assert_eq!([early.exit_code, other.exit_code, late.exit_code], [7; 3]);
    world.remove("c2").await.unwrap();
}

async fn nothing_is_left_of_a_removed_container(world: World) {
    let mounts = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count()
    };
    let before = mounts();
    world.output("c3", &spec(&["true"])).await;
    assert_eq!(mounts(), before);
    for path in [
        "/run/hull/containers/c3",
        "/run/hull/state/c3",
        "/sys/fs/cgroup/containers/c3",
    ] {
        assert!(!Path::new(path).exists(), "{path}");
    }
    // The name is free again.
    world.output("c3", &spec(&["true"])).await;
}

async fn stdin_is_passed_on_with_its_end(world: World) {
    let stdio = world.run("c4", &script("cat; echo end"), false).await;
    stdio.stdin.write_all(b"some text\n").await.unwrap();
    stdio.stdin.shutdown_write().unwrap();
    assert_eq!(read_all(&stdio.stdout).await, "some text\nend\n");
    world.wait("c4", "").await;
    world.remove("c4").await.unwrap();
}

async fn a_terminal_has_a_size_and_is_the_users(world: World) {
    let mut stdio = world.stdio(true).await;
    stdio.numbers.columns = 100;
    stdio.numbers.rows = 30;
    let mut spec = script("stty size; tty; stat -c %u \"$(tty)\"; read x; stty size; echo $TERM");
    spec["test-user"] = json!("web");
    world
        .create("c5", &spec, stdio.numbers.clone())
        .await
        .unwrap();
    world.start("c5").await.unwrap();
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while text.matches('\n').count() < 3 {
        let count = stdio.stdout.read(&mut buffer).await.unwrap();
        text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    assert_eq!(text, "30 100\r\n/dev/pts/0\r\n33\r\n");
    let resize = hull_protocol::agent::ResizeRequest {
        container_id: "c5".into(),
        columns: 40,
        rows: 12,
        ..Default::default()
    };
    world
        .client
        .resize(crate::world::limit(), &resize)
        .await
        .unwrap();
    stdio.stdin.write_all(b"x\n").await.unwrap();
    assert_eq!(read_all(&stdio.stdout).await, "x\r\n12 40\r\nxterm\r\n");
    world.wait("c5", "").await;
    world.remove("c5").await.unwrap();
}

async fn a_missing_program_is_said_and_nothing_is_left(world: World) {
    let stdio = world.stdio(false).await;
    let error = world
        .create("c6", &spec(&["/no/such"]), stdio.numbers.clone())
        .await
        .unwrap_err();
    assert_eq!(code(&error), Code::NOT_FOUND);
    assert!(error.to_string().contains("/no/such"), "{error}");
    let stdio = world.stdio(false).await;
    let error = world
        .create("c6", &spec(&["/etc/passwd"]), stdio.numbers.clone())
        .await
        .unwrap_err();
    assert_eq!(code(&error), Code::PERMISSION_DENIED);
    let bad = with_mount(
        spec(&["true"]),
        json!({"destination": "/d", "source": "share:volumes/none"}),
    );
    let stdio = world.stdio(false).await;
    let error = world
        .create("c6", &bad, stdio.numbers.clone())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("volumes/none"), "{error}");
    let (exit, ..) = world.output("c6", &spec(&["true"])).await;
    assert_eq!(exit.exit_code, 0);
}

async fn signals_reach_the_first_process_or_all(world: World) {
    let text = "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let stdio = world.run("c7", &script(text), false).await;
    stdio.stdout.read(&mut [0; 16]).await.unwrap();
    world.signal("c7", "", 15, false).await.unwrap();
    assert_eq!(read_all(&stdio.stdout).await, "term\n");
    assert_eq!(world.wait("c7", "").await.exit_code, 5);
    world.remove("c7").await.unwrap();

    let text = "sleep 1000 & sleep 1000 & echo ready; wait";
    let stdio = world.run("c7", &script(text), false).await;
    stdio.stdout.read(&mut [0; 16]).await.unwrap();
    world.signal("c7", "", 9, true).await.unwrap();
    let exit = world.wait("c7", "").await;
    assert_eq!((exit.exit_code, exit.signal), (137, 9));
    assert!(world.signal("c7", "", 0, false).await.is_err());
    assert!(world.signal("c7", "", 65, false).await.is_err());
    world.signal("c7", "", 15, false).await.unwrap();
    world.remove("c7").await.unwrap();
}

async fn the_memory_limit_is_told(world: World) {
    let mut spec = spec(&["tail", "/dev/zero"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    let (exit, ..) = world.output("c8", &spec).await;
    assert!(exit.oom_killed);
    assert_eq!(exit.signal, 9);
}

async fn namespaces_are_infras_but_for_pids_and_mounts(world: World) {
    let list = "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done; hostname; \
                echo $$; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
                ip addr show lo | grep -c 127.0.0.1";
    // The first lives meanwhile, or its namespaces' numbers could be the second's.
    let first = world
        .run(
            "c9",
            &script(&format!("{list}; echo end; cat > /dev/null")),
            false,
        )
        .await;
    let (_, two, _) = world.output("c9b", &script(list)).await;
    first.stdin.shutdown_write().unwrap();
    let one = read_all(&first.stdout).await.replace("end\n", "");
    world.wait("c9", "").await;
    world.remove("c9").await.unwrap();
    let one: Vec<&str> = one.lines().collect();
    let two: Vec<&str> = two.lines().collect();
    assert_eq!(one[..3], two[..3]);
    for namespace in 3..6 {
        assert_ne!(one[namespace], two[namespace]);
    }
    assert_eq!(one[6..], ["pod-1", "1", "0", "1"]);
    let infra = fs::read_link(format!("/proc/{}/ns/net", world.infra)).unwrap();
    assert_eq!(infra.to_str().unwrap(), one[0]);
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(own, infra);
}

async fn roots_are_apart_and_volumes_shared(world: World) {
    let volume = json!({"destination": "/data", "source": "share:volumes/data"});
    let write = with_mount(
        script("echo a > /only-here; echo b > /data/shared"),
        volume.clone(),
    );
    world.output("c10", &write).await;
    // The same root here: what is apart on the host is the host's to mount.
    let read = with_mount(
        script("cat /data/shared; ls /run/hull /proc/1/root/run/hull"),
        volume,
    );
    let (_, out, err) = world.output("c10b", &read).await;
    assert_eq!(out, "b\n");
    assert!(err.contains("No such file"), "{err}");
    let (_, out, _) = world.output("c10c", &script("ls /data")).await;
    assert_eq!(out, "");
    assert_eq!(
        fs::read_to_string(World::share().join("volumes/data/shared")).unwrap(),
        "b\n"
    );
}

async fn read_only_mounts_refuse_writes(world: World) {
    let mut spec = with_mount(
        script("touch /data/x; touch /y; mount -o remount,rw /data; touch /data/x"),
        json!({"destination": "/data", "source": "share:volumes/data", "options": ["ro"]}),
    );
    spec["root"]["readonly"] = json!(true);
    let (exit, _, err) = world.output("c11", &spec).await;
    assert_ne!(exit.exit_code, 0);
    assert_eq!(err.matches("Read-only file system").count(), 3, "{err}");
}

async fn sub_paths_do_not_leave_their_volume(world: World) {
    let data = World::share().join("volumes/data");
    let _ = std::os::unix::fs::symlink("/", data.join("out"));
    let stdio = world.stdio(false).await;
    let evil = with_mount(
        spec(&["ls", "/m"]),
        json!({"destination": "/m", "source": "share:volumes/data/out/etc"}),
    );
    let error = world
        .create("c12", &evil, stdio.numbers.clone())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("sub-path"), "{error}");
    let good = with_mount(
        script("touch /m/made"),
        json!({"destination": "/m", "source": "share:volumes/data/new/er"}),
    );
    world.output("c12", &good).await;
    assert!(data.join("new/er/made").exists());
}

async fn memory_volumes_are_bounded_and_shm_is_the_pods(world: World) {
    let spec = with_mount(
        script("echo x > /dev/shm/f; dd if=/dev/zero of=/m/big bs=64k count=100"),
        json!({"destination": "/m", "source": "memory:mem"}),
    );
    let (exit, _, err) = world.output("c13", &spec).await;
    assert_ne!(exit.exit_code, 0);
    assert!(err.contains("No space left"), "{err}");
    let (_, out, _) = world.output("c13b", &script("cat /dev/shm/f")).await;
    assert_eq!(out, "x\n");
}

async fn users_are_looked_up(world: World) {
    let mut spec = script("id -u; id -g; id -G; echo $HOME; echo ok > /dev/stdout");
    spec["test-user"] = json!("web");
    let (_, out, err) = world.output("c14", &spec).await;
    assert_eq!(
        (out.as_str(), err.as_str()),
        ("33\n34\n34 4\n/tmp\nok\n", "")
    );
    spec["test-user"] = json!("nobody");
    let stdio = world.stdio(false).await;
    let error = world
        .create("c14", &spec, stdio.numbers.clone())
        .await
        .unwrap_err();
    assert_eq!(code(&error), Code::INVALID_ARGUMENT);
}

/// CVE-2020-2023: a container made a node of the guest's disk.
async fn other_devices_are_refused(world: World) {
    let text = "mknod /tmp/disk b 254 0 && cat /tmp/disk; mknod /tmp/mem c 1 1 && cat /tmp/mem; \
                rm -f /tmp/disk /tmp/mem; head -c 4 /dev/zero | wc -c; echo > /dev/null && echo fine";
    let (_, out, err) = world.output("c15", &script(text)).await;
    assert_eq!(out, "4\nfine\n");
    assert_eq!(err.matches("Operation not permitted").count(), 2, "{err}");
}

/// CVE-2024-21626: a leaked descriptor led out of the container.
async fn no_descriptor_leaks_into_a_container(world: World) {
    let (_, out, _) = world
        .output("c17", &script("cd /proc/self/fd && echo *"))
        .await;
    assert_eq!(out, "0 1 2 3\n", "3 is the shell's own listing");
    let mut escape = spec(&["ls"]);
    escape["process"]["cwd"] = json!("/proc/self/fd/7");
    let stdio = world.stdio(false).await;
    assert!(
        world
            .create("c17", &escape, stdio.numbers.clone())
            .await
            .is_err()
    );
}

async fn a_slow_reader_stops_the_writer_and_gets_all(world: World) {
    const SIZE: usize = 64 << 20;
    let stdio = world
        .run("c18", &script("head -c 67108864 /dev/zero"), false)
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let resident: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|value| value.trim().trim_end_matches(" kB").parse().ok())
        .unwrap();
    assert!(resident < 64 * 1024, "{resident} kB resident");
    assert_eq!(read_all(&stdio.stdout).await.len(), SIZE);
    world.wait("c18", "").await;
    world.remove("c18").await.unwrap();
}

async fn output_of_a_container_ends_with_its_processes(world: World) {
    let (exit, out, _) = world.output("c19", &script("sleep 1000 & echo done")).await;
    assert_eq!((exit.exit_code, out.as_str()), (0, "done\n"));
}

async fn removal_does_not_cut_the_output(world: World) {
    // Fits into pipe and socket, so that the container ends while nobody reads.
    let stdio = world
        .run("c21", &script("head -c 150000 /dev/zero"), false)
        .await;
    world.wait("c21", "").await;
    world.remove("c21").await.unwrap();
    assert_eq!(read_all(&stdio.stdout).await.len(), 150_000);
}

async fn seccomp_filters_a_container_and_its_execs(world: World) {
    for privileges in [false, true] {
        let mut spec = script("mkdir /tmp/made; read x");
        spec["process"]["noNewPrivileges"] = json!(privileges);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
        });
        let stdio = world.run("c20", &spec, false).await;
        let mut buffer = [0; 256];
        let count = stdio
            .stderr
            .as_ref()
            .unwrap()
            .read(&mut buffer)
            .await
            .unwrap();
        let text = String::from_utf8_lossy(&buffer[..count]);
        assert!(text.contains("not supported"), "{text}");
        let (_, out, err) = world
            .exec(
                "c20",
                "e",
                &[
                    "sh",
                    "-c",
                    "mkdir /tmp/made; grep -E '^(Cap|Seccomp|NoNewPrivs)' /proc/self/status",
                ],
                |_| {},
            )
            .await;
        assert!(err.contains("not supported"), "{err}");
        let (_, first, _) = world
            .exec(
                "c20",
                "e",
                &["grep", "-E", "^(Cap|Seccomp|NoNewPrivs)", "/proc/1/status"],
                |_| {},
            )
            .await;
        assert_eq!(out, first);
        // Filtering, by one filter.
        assert!(
            first.contains("Seccomp:\t2\nSeccomp_filters:\t1\n"),
            "{first}"
        );
        // CAP_SYS_ADMIN, which is needed to load one.
        let bounding = first
            .lines()
            .find_map(|line| line.strip_prefix("CapBnd:\t"));
        let bounding = u64::from_str_radix(bounding.unwrap(), 16).unwrap();
        assert_eq!(bounding & 1 << 21, 0, "{first}");
        world.end("c20").await;
    }
}
