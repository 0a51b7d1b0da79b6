//! What containers use and may use, containers that stand still, and whose processes they see.

use std::fs;
use std::time::Duration;

use hull_protocol::agent::{
    CreateContainerRequest, FreezeRequest, PidNamespace, StatsRequest, StatsResponse, ThawRequest,
    UpdateRequest, WaitOomRequest,
};
use serde_json::json;

use crate::world::{World, limit, read_all, script, spec};

crate::tests!(
    a_container_is_counted_and_all_together,
    a_container_stands_still_until_it_is_to_go_on,
    a_container_that_stands_still_can_be_killed,
    what_a_container_may_use_is_changed,
    more_than_the_machine_has_is_refused,
    a_child_that_is_killed_for_want_of_memory_is_told_of,
    another_containers_processes_are_seen,
);

async fn stats(world: &World, container: &str) -> StatsResponse {
    let request = StatsRequest {
        container_id: container.into(),
        ..Default::default()
    };
    world.client.stats(limit(), &request).await.unwrap()
}

async fn freeze(world: &World, container: &str) -> ttrpc::Result<()> {
    let request = FreezeRequest {
        container_id: container.into(),
        ..Default::default()
    };
    world.client.freeze(limit(), &request).await.map(drop)
}

async fn thaw(world: &World, container: &str) {
    let request = ThawRequest {
        container_id: container.into(),
        ..Default::default()
    };
    world.client.thaw(limit(), &request).await.unwrap();
}

async fn update(world: &World, container: &str, resources: serde_json::Value) -> ttrpc::Result<()> {
    let request = UpdateRequest {
        container_id: container.into(),
        resources: resources.to_string().into_bytes(),
        ..Default::default()
    };
    world.client.update(limit(), &request).await.map(drop)
}

fn cgroup(container: &str, file: &str) -> String {
    let text = fs::read_to_string(format!("/sys/fs/cgroup/containers/{container}/{file}"));
    text.unwrap().trim().to_owned()
}

async fn a_container_is_counted_and_all_together(world: World) {
    let mut spec = script("sleep 1000 & sleep 1000");
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20});
    spec["linux"]["resources"]["pids"] = json!({"limit": 50});
    drop(world.run("a1", &spec, false).await);

    let one = stats(&world, "a1").await;
    let all = stats(&world, "").await;

    assert_eq!(one.memory.limit, 16 << 20);
    assert!(one.memory.usage > 0 && one.memory.detail.contains_key("anon"));
    assert_eq!(one.memory.events["oom_kill"], 0);
    assert!(one.pids.current >= 1);
    assert_eq!(one.pids.limit, 50);
    assert!(one.cpu.usage_micros > 0);
    assert!(all.cpu.usage_micros >= one.cpu.usage_micros);
    assert!(all.pids.current >= one.pids.current);
    // The machine's.
    assert!(all.memory.limit > 16 << 20 && all.memory.limit < u64::MAX);
    world.end("a1").await;
    assert!(stats(&world, "").await.cpu.usage_micros >= one.cpu.usage_micros);
    let gone = StatsRequest {
        container_id: "a1".into(),
        ..Default::default()
    };
    assert!(world.client.stats(limit(), &gone).await.is_err());
}

async fn a_container_stands_still_until_it_is_to_go_on(world: World) {
    let counting = script("while true; do echo x >> /tmp/ticks; sleep 0.05; done");
    drop(world.run("a2", &counting, false).await);
    let ticks = || fs::read(World::share().join("rootfs/a/tmp/ticks")).map_or(0, |text| text.len());
    while ticks() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    freeze(&world, "a2").await.unwrap();
    freeze(&world, "a2").await.unwrap();

    let stood = ticks();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(ticks(), stood);
    assert!(cgroup("a2", "cgroup.events").contains("frozen 1"));
    let stdio = world.stdio(false).await;
    let refused = world
        .start_exec("a2", "e", &["true"], &stdio, |_| {})
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("paused"), "{refused}");
    thaw(&world, "a2").await;
    while ticks() == stood {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (exit, ..) = world.exec("a2", "e", &["true"], |_| {}).await;
    assert_eq!(exit.exit_code, 0);
    world.end("a2").await;
    fs::remove_file(World::share().join("rootfs/a/tmp/ticks")).unwrap();
}

async fn a_container_that_stands_still_can_be_killed(world: World) {
    for (id, all) in [("a3", false), ("a4", true)] {
        drop(
            world
                .run(id, &script("sleep 1000 & sleep 1000"), false)
                .await,
        );
        freeze(&world, id).await.unwrap();

        world.signal(id, "", 9, all).await.unwrap();

        assert_eq!(world.wait(id, "").await.signal, 9);
        assert!(freeze(&world, id).await.is_err());
        world.remove(id).await.unwrap();
    }
}

async fn what_a_container_may_use_is_changed(world: World) {
    world.sleeper("a5").await;

    let wanted = json!({
        "cpu": {"shares": 1024, "quota": 50000, "period": 100_000},
        "memory": {"limit": 32 << 20, "reservation": 1 << 20},
        "pids": {"limit": 33},
        "unified": {"memory.high": "16777216"}
    });
    update(&world, "a5", wanted).await.unwrap();
    // What isn't named stays.
    update(
        &world,
        "a5",
        json!({"cpu": {"quota": 20000}, "pids": {"limit": 0}}),
    )
    .await
    .unwrap();

    assert_eq!(cgroup("a5", "cpu.max"), "20000 100000");
    assert_eq!(cgroup("a5", "memory.max"), (32 << 20).to_string());
    assert_eq!(cgroup("a5", "memory.low"), (1 << 20).to_string());
    assert_eq!(cgroup("a5", "memory.high"), "16777216");
    assert_eq!(cgroup("a5", "pids.max"), "33");
    assert_ne!(cgroup("a5", "cpu.weight"), "1");
    world.end("a5").await;
}

async fn more_than_the_machine_has_is_refused(world: World) {
    world.sleeper("a6").await;

    for (wanted, says) in [
        (json!({"memory": {"limit": 1_u64 << 50}}), "machine has"),
        (
            json!({"cpu": {"quota": 1_000_000_000, "period": 1000}}),
            "machine has",
        ),
        (json!({"unified": {"cgroup.procs": "1"}}), "cgroup.procs"),
        (json!({"unified": {"memory.max": "much"}}), "memory.max"),
        (
            json!({"memory": {"limit": "much"}}),
            "reading the resources",
        ),
    ] {
        let refused = update(&world, "a6", wanted).await.unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
    }
    assert_eq!(cgroup("a6", "memory.max"), "max");
    world.end("a6").await;
}

async fn a_child_that_is_killed_for_want_of_memory_is_told_of(world: World) {
    let mut spec = script("read go; tail /dev/zero; read go; tail /dev/zero; read end; exit 4");
    spec["linux"]["resources"]["memory"] = json!({"limit": 8 << 20, "swap": 8 << 20});
    let stdio = world.run("a7", &spec, false).await;
    let more = |kills| {
        let request = WaitOomRequest {
            container_id: "a7".into(),
            kills,
            ..Default::default()
        };
        let client = world.client.clone();
        tokio::spawn(async move { client.wait_oom(limit(), &request).await.unwrap().kills })
    };
    let first = more(0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!first.is_finished());

    stdio.stdin.write_all(b"\n").await.unwrap();
    assert_eq!(first.await.unwrap(), 1);
    // Who asks late hears it, too.
    assert_eq!(more(0).await.unwrap(), 1);
    let second = more(1);
    stdio.stdin.write_all(b"\n").await.unwrap();
    assert_eq!(second.await.unwrap(), 2);
    let last = more(2);
    stdio.stdin.write_all(b"\n").await.unwrap();

    let exit = world.wait("a7", "").await;
    assert_eq!((exit.exit_code, exit.oom_killed), (4, true));
    assert_eq!(last.await.unwrap(), 2);
    world.remove("a7").await.unwrap();
}

async fn another_containers_processes_are_seen(world: World) {
    drop(world.run("a8", &script("sleep 1234"), false).await);
    let request = |id: &str, stdio: &crate::world::Stdio, namespace: PidNamespace, target: &str| {
        CreateContainerRequest {
            container_id: id.into(),
            spec: spec(&["ps"]).to_string().into_bytes(),
            rootfs: "rootfs/a".into(),
            streams: Some(stdio.numbers.clone()).into(),
            pid_namespace: namespace.into(),
            pid_target: target.into(),
            ..Default::default()
        }
    };
    let stdio = world.stdio(false).await;
    let joins = request("a9", &stdio, PidNamespace::CONTAINER, "a8");
    world
        .client
        .create_container(limit(), &joins)
        .await
        .unwrap();
    world.start("a9").await.unwrap();
    let seen = read_all(&stdio.stdout).await;
    assert!(seen.contains("sleep 1234") && seen.contains("ps"), "{seen}");
    assert_eq!(world.wait("a9", "").await.exit_code, 0);
    world.remove("a9").await.unwrap();

    // With process 1 of the namespace ends whoever is in it.
    let stdio = world.stdio(false).await;
    let mut joins = request("a9", &stdio, PidNamespace::CONTAINER, "a8");
    joins.spec = spec(&["sleep", "1000"]).to_string().into_bytes();
    world
        .client
        .create_container(limit(), &joins)
        .await
        .unwrap();
    world.start("a9").await.unwrap();
    world.signal("a8", "", 9, false).await.unwrap();
    assert_eq!(world.wait("a9", "").await.signal, 9);
    world.remove("a9").await.unwrap();

    for (namespace, target) in [
        (PidNamespace::CONTAINER, "a8"),
        (PidNamespace::CONTAINER, "no-such"),
        // This pod's holds none.
        (PidNamespace::INFRA, ""),
    ] {
        let stdio = world.stdio(false).await;
        let refused = request("a9", &stdio, namespace, target);
        let refused = world.client.create_container(limit(), &refused).await;
        assert!(refused.is_err(), "{namespace:?} {target}");
    }
    world.remove("a8").await.unwrap();
}
