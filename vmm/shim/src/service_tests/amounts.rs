use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{TaskOOM, TaskPaused};
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::*;

impl Shim {
    async fn pause(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = PauseRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.pause(within(), &request).await
    }

    async fn resume(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = ResumeRequest {
            id: id.into(),
            ..Default::default()
        };
        self.client.resume(within(), &request).await
    }

    async fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.into(),
            ..Default::default()
        };
        let state = self.client.state(within(), &request).await.unwrap();
        state.status.unwrap()
    }

    async fn processes(&self, id: &str) -> u64 {
        let request = StatsRequest {
            id: id.into(),
            ..Default::default()
        };
        let stats = self.client.stats(within(), &request).await.unwrap();
        let metrics = Metrics::parse_from_bytes(&stats.stats.value).unwrap();
        metrics.pids.current
    }

    async fn update(&self, kind: &str, json: &str) -> ttrpc::Result<Empty> {
        let resources = Any {
            type_url: kind.into(),
            value: json.into(),
            ..Default::default()
        };
        let request = UpdateTaskRequest {
            id: "web".into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.client.update(within(), &request).await
    }
}

#[tokio::test]
async fn a_container_stands_still_and_goes_on() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    shim.topics(2).await;

    shim.pause("web").await.unwrap();

    assert_eq!(shim.status("web").await, Status::PAUSED);
    let (topic, event) = shim.event().await;
    let paused = TaskPaused::parse_from_bytes(&event).unwrap();
    assert_eq!(
        (topic.as_str(), paused.container_id.as_str()),
        ("/tasks/paused", "web")
    );
    assert_eq!(code(shim.pause("web").await), Code::FAILED_PRECONDITION);
    assert_eq!(
        code(shim.delete("web", "").await),
        Code::FAILED_PRECONDITION
    );
    shim.resume("web").await.unwrap();
    assert_eq!(shim.status("web").await, Status::RUNNING);
    assert_eq!(shim.topics(1).await, ["/tasks/resumed"]);
    assert_eq!(code(shim.resume("web").await), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn what_stands_still_runs_nothing_and_can_be_killed() {
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    shim.pause("web").await.unwrap();
    let mut exec = ExecProcessRequest {
        id: "web".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    exec.spec.mut_or_insert_default().value =
        br#"{"args":["cat"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    shim.client.exec(within(), &exec).await.unwrap();

    assert_eq!(
        code(shim.start("web", "e").await),
        Code::FAILED_PRECONDITION
    );

    shim.kill("web", 9).await.unwrap();
    drop(shim.pod.guest("container-1"));
    shim.pod.end("container-1", 137);
    assert_eq!(shim.wait("web").await, 137);
    assert_eq!(shim.status("web").await, Status::STOPPED);
    assert_eq!(code(shim.resume("web").await), Code::FAILED_PRECONDITION);
    assert_eq!(shim.delete("web", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn a_sandbox_is_counted_as_a_whole_and_does_not_stand_still() {
    let shim = Shim::new().await;
    shim.create("pod", SANDBOX).await.unwrap();
    shim.start("pod", "").await.unwrap();
    shim.create("one", MEMBER).await.unwrap();

    assert_eq!(shim.processes("pod").await, 20);
    assert_eq!(shim.processes("one").await, 2);
    assert_eq!(code(shim.pause("pod").await), Code::UNIMPLEMENTED);
    let checkpoint = CheckpointTaskRequest::default();
    let refused = shim.client.checkpoint(within(), &checkpoint).await;
    assert_eq!(code(refused), Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn an_update_says_what_means_something_in_the_guest() {
    const KIND: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
    let shim = Shim::new().await;
    shim.create("web", "").await.unwrap();

    let json = r#"{"cpu":{"shares":512,"cpus":"6-7"},"memory":{"limit":1048576,"swap":1048576},
        "devices":[{"allow":true,"access":"rwm"}],
        "unified":{"memory.oom.group":"1","io.max":"8:0 rbps=1"}}"#;
    shim.update(KIND, json).await.unwrap();

    {
        let updates = shim.pod.updates.lock().unwrap();
        let (name, resources) = &updates[0];
        assert_eq!(name, "container-1");
        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!((cpu.shares(), cpu.cpus()), (Some(512), &None));
        let memory = resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(1_048_576), None));
        assert!(resources.devices().is_none());
        let files: Vec<_> = resources.unified().iter().flatten().collect();
        assert_eq!(files, [(&"memory.oom.group".to_owned(), &"1".to_owned())]);
    }
    assert_eq!(code(shim.update(KIND, "7").await), Code::INVALID_ARGUMENT);
    let windows = KIND.replace("Linux", "Windows");
    assert_eq!(code(shim.update(&windows, "{}").await), Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn a_process_that_is_killed_for_want_of_memory_is_told_of_while_the_container_runs() {
    let mut shim = Shim::new().await;
    shim.create("web", "").await.unwrap();
    shim.start("web", "").await.unwrap();
    shim.topics(2).await;

    shim.pod.ooms.send_replace(3);

    let (topic, event) = shim.event().await;
    let oom = TaskOOM::parse_from_bytes(&event).unwrap();
    assert_eq!(
        (topic.as_str(), oom.container_id.as_str()),
        ("/tasks/oom", "web")
    );
    // However many there are, they come a second apart.
    let told = std::time::Instant::now();
    shim.pod.ooms.send_replace(4);
    assert_eq!(shim.topics(1).await, ["/tasks/oom"]);
    assert!(told.elapsed() > Duration::from_millis(700));
    drop(shim.pod.guest("container-1"));
    shim.pod.end("container-1", 0);
    assert_eq!(shim.topics(1).await, ["/tasks/exit"]);
}
