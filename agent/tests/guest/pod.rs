//! The pod as a whole: calls that wait, bad requests, and its end.

use std::time::Duration;

use hull_protocol::agent::{
    Empty, GetReadyRequest, HelloRequest, HelloResponse, StartInfraRequest,
};

use crate::world::{World, limit, script, spec};

crate::tests!(
    hello_can_be_said_again,
    the_kernels_random_numbers_are_made_new,
    a_waiting_call_holds_up_no_other,
    infra_starts_once,
    names_are_checked,
    the_last_connection_may_break_in_a_call,
    shutdown_is_passed_on,
    the_end_of_infra_is_the_end_of_all,
);

async fn hello_can_be_said_again(world: World) {
    let again = crate::world::connect(&world.agent).await;
    let processors = u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap();
    let request = HelloRequest {
        vcpus: processors,
        ..Default::default()
    };

    let first = world.client.hello(limit(), &request).await.unwrap();
    let second = again.hello(limit(), &request).await.unwrap();

    assert!(first.now_micros <= second.now_micros);
    let at_once = HelloResponse {
        now_micros: first.now_micros,
        ..second
    };
    assert_eq!(first, at_once);
    let (exit, ..) = world.output("p0", &spec(&["true"])).await;
    assert_eq!(exit.exit_code, 0);
}

async fn the_kernels_random_numbers_are_made_new(world: World) {
    let entropy = |count: usize| HelloRequest {
        entropy: vec![0xA5; count],
        ..Default::default()
    };

    for count in [32, 64] {
        let said = world.client.hello(limit(), &entropy(count)).await;
        assert!(said.is_ok(), "{count}: {said:?}");
    }
    for count in [1, 31, 65] {
        let refused = world.client.hello(limit(), &entropy(count)).await;
        assert!(refused.is_err(), "{count}");
    }
}

async fn a_waiting_call_holds_up_no_other(world: World) {
    let stdio = world.stdio(false).await;
    let late = world.stream_number();
    let mut numbers = stdio.numbers.clone();
    numbers.stdout = late;
    let waiting = {
        let world = world.clone();
        tokio::spawn(async move { world.create("p1", &spec(&["true"]), numbers).await })
    };
    let started = std::time::Instant::now();
    world
        .client
        .hello(limit(), &HelloRequest::new())
        .await
        .unwrap();
    let (exit, ..) = world.output("p2", &spec(&["true"])).await;
    assert_eq!(exit.exit_code, 0);
    assert!(!waiting.is_finished(), "{:?}", started.elapsed());
    let _stdout = world.open_stream(late).await;
    waiting.await.unwrap().unwrap();
    world.start("p1").await.unwrap();
    assert_eq!(world.wait("p1", "").await.exit_code, 0);
    world.remove("p1").await.unwrap();
}

async fn infra_starts_once(world: World) {
    let request = StartInfraRequest {
        hostname: "again".into(),
        ..Default::default()
    };
    assert!(world.client.start_infra(limit(), &request).await.is_err());
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", world.infra)).unwrap();
    assert_eq!(comm, "infra\n");
    let line = std::fs::read(format!("/proc/{}/cmdline", world.infra)).unwrap();
    assert_eq!(line, b"infra\0");
    // Only in a machine whose pod hasn't begun.
    let request = GetReadyRequest::default();
    assert!(world.client.get_ready(limit(), &request).await.is_err());
}

async fn names_are_checked(world: World) {
    let numbers = world.stdio(false).await.numbers;
    for name in ["", "../x", "A"] {
        assert!(
            world
                .create(name, &spec(&["true"]), numbers.clone())
                .await
                .is_err()
        );
    }
    assert!(world.remove("no-such").await.is_err());
    assert!(world.signal("no-such", "", 9, true).await.is_err());
}

async fn the_last_connection_may_break_in_a_call(world: World) {
    let other = crate::world::connect(&world.agent).await;
    let stdio = world.stdio(false).await;
    let broken = World {
        client: other,
        ..world.clone()
    };
    let numbers = stdio.numbers.clone();
    let call = tokio::spawn(async move { broken.create("p3", &script("exit 6"), numbers).await });
    let mut started = world.start("p3").await;
    while is_unknown(&started) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        started = world.start("p3").await;
    }
    call.abort();
    // The call goes on, and its container can be used.
    for _ in 0..500 {
        if started.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        started = world.start("p3").await;
    }
    started.unwrap();
    assert_eq!(world.wait("p3", "").await.exit_code, 6);
    world.remove("p3").await.unwrap();
}

fn is_unknown(started: &ttrpc::Result<()>) -> bool {
    matches!(started, Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND)
}

async fn shutdown_is_passed_on(world: World) {
    world.client.shutdown(limit(), &Empty::new()).await.unwrap();
    world.agent.shutdown.notified().await;
}

async fn the_end_of_infra_is_the_end_of_all(world: World) {
    world.sleeper("p4").await;
    world.sleeper("p5").await;
    let waiting = {
        let world = world.clone();
        tokio::spawn(async move { world.wait("", "").await })
    };
    world.signal("", "", 9, false).await.unwrap();
    assert_eq!(waiting.await.unwrap().signal, 9);
    for id in ["p4", "p5"] {
        assert_eq!(world.wait(id, "").await.signal, 9);
        world.remove(id).await.unwrap();
    }
    let numbers = world.stdio(false).await.numbers;
    assert!(world.create("p6", &spec(&["true"]), numbers).await.is_err());
}
