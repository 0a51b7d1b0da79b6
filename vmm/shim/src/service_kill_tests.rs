//! Tests: whatever a guest does, its tasks can be killed and deleted.

use super::*;

async fn exec(shim: &Shim, id: &str, exec: &str) {
    let mut request = ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    };
    request.spec.mut_or_insert_default().value =
        br#"{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    shim.client.exec(within(), &request).await.unwrap();
}

async fn exit_of(shim: &mut Shim) -> TaskExit {
    loop {
        if let (topic, event) = shim.event().await
            && topic == "/tasks/exit"
        {
            return TaskExit::parse_from_bytes(&event).unwrap();
        }
    }
}

#[tokio::test]
async fn a_container_that_was_not_started_can_be_killed() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();

    shim.kill("web", 9).await.unwrap();
    shim.pod.end("container-1", 137);
    drop(shim.pod.guest("container-1"));

    assert_eq!(shim.wait("web").await, 137);
    assert_eq!(exit_of(&mut shim).await.exit_status, 137);
    assert_eq!(shim.delete("web", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn a_container_that_was_not_started_is_deleted_without_an_end() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();

    assert_eq!(shim.delete("web", "").await.unwrap().exit_status, 137);

    assert_eq!(shim.topics(2).await, ["/tasks/create", "/tasks/delete"]);
}

#[tokio::test]
async fn a_sandbox_ends_by_the_signal_that_it_was_sent() {
    let mut shim = Shim::new().await;
    shim.create("pod", SANDBOX).await.unwrap();
    shim.start("pod", "").await.unwrap();

    shim.kill("pod", 15).await.unwrap();

    assert_eq!(shim.wait("pod").await, 128 + 15);
    assert_eq!(exit_of(&mut shim).await.exit_status, 128 + 15);
}

#[tokio::test]
async fn an_agent_that_does_not_take_sigkill_loses_its_machine() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    *shim.pod.silent.lock().unwrap() = true;

    assert!(shim.kill("web", 15).await.is_err());
    assert!(*shim.pod.up.borrow());
    shim.kill("web", 9).await.unwrap();

    assert!(!*shim.pod.up.borrow());
    assert_eq!(exit_of(&mut shim).await.exit_status, 137);
}

#[tokio::test]
async fn a_pods_only_container_that_survives_sigkill_loses_its_machine() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();

    shim.kill("web", 9).await.unwrap();

    assert_eq!(exit_of(&mut shim).await.exit_status, 137);
    assert!(!*shim.pod.up.borrow());
}

#[tokio::test]
async fn a_signal_after_the_end_is_not_found() {
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    // Its last output is still on its way.
    shim.pod.end("container-1", 0);
    tokio::time::sleep(Duration::from_millis(100)).await;

    assert_eq!(code(shim.kill("web", 15).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_further_process_ends_before_its_container() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    exec(&shim, "web", "e").await;
    shim.start("web", "e").await.unwrap();
    // The container's own, groups and all.
    assert_eq!(*shim.pod.users.lock().unwrap(), [None]);
    drop(shim.pod.guest("container-1"));

    shim.pod.end("container-1", 3);
    tokio::time::sleep(Duration::from_millis(100)).await;
    shim.pod.end("exec-2", 137);
    drop(shim.pod.guest("exec-2"));

    assert_eq!(exit_of(&mut shim).await.id, "e");
    assert_eq!(exit_of(&mut shim).await.id, "web");
}

#[tokio::test]
async fn a_further_process_without_end_does_not_hold_up_its_containers() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    exec(&shim, "web", "e").await;
    exec(&shim, "web", "never").await;
    shim.start("web", "e").await.unwrap();
    drop(shim.pod.guest("container-1"));

    shim.pod.end("container-1", 3);

    assert_eq!(exit_of(&mut shim).await.id, "web");
}

#[tokio::test]
async fn of_two_starts_one_is_the_first() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();

    let (one, other) = tokio::join!(shim.start("web", ""), shim.start("web", ""));

    assert_ne!(one.is_ok(), other.is_ok());
    let refused = one.and(other);
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
    assert_eq!(shim.topics(2).await, ["/tasks/create", "/tasks/start"]);
}

#[tokio::test]
async fn a_shim_without_the_container_is_not_taken_for_its_shim() {
    let shim = Shim::new().await;

    let connected = shim
        .client
        .connect(within(), &ConnectRequest::default())
        .await;

    assert_eq!(code(connected), Code::NOT_FOUND);
}
