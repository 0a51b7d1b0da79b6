//! What containers use and may use, containers that stand still, and whose processes they see.

use std::time::Instant;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::*;

const TICKING: &str = "while true; do echo x >>/data/ticks; sleep 0.1; done";
const MEMORY: u64 = 64 << 20;

async fn metrics(client: &TaskClient, id: &str) -> Metrics {
    let request = StatsRequest {
        id: id.into(),
        ..Default::default()
    };
    let stats = client.stats(within(), &request).await.unwrap().stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    Metrics::parse_from_bytes(&stats.value).unwrap()
}

async fn pause(client: &TaskClient, id: &str) {
    let request = PauseRequest {
        id: id.into(),
        ..Default::default()
    };
    client.pause(within(), &request).await.unwrap();
}

async fn update(client: &TaskClient, id: &str, json: &str) -> ttrpc::Result<Empty> {
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: json.into(),
        ..Default::default()
    };
    let request = UpdateTaskRequest {
        id: id.into(),
        resources: Some(resources).into(),
        ..Default::default()
    };
    client.update(within(), &request).await
}

async fn status(client: &TaskClient, id: &str) -> Status {
    let request = StateRequest {
        id: id.into(),
        ..Default::default()
    };
    client
        .state(within(), &request)
        .await
        .unwrap()
        .status
        .unwrap()
}

async fn exec(client: &TaskClient, id: &str, exec: &str) {
    let mut request = ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    };
    request.spec.mut_or_insert_default().value =
        br#"{"args":["/bin/busybox","true"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    client.exec(within(), &request).await.unwrap();
}

fn ticks(data: &Path) -> usize {
    fs::read(data.join("ticks")).map_or(0, |text| text.len())
}

fn until_ticked(data: &Path, more_than: usize) {
    let begun = Instant::now();
    while ticks(data) <= more_than {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The topics of the events so far.
fn topics(host: &Host) -> Vec<String> {
    let told = fs::read_to_string(host.bundle.told()).unwrap_or_default();
    told.lines().map(String::from).collect()
}

impl Host {
    /// Names a PID namespace as containerd does: by a task's pid.
    fn sees_processes_of(&self, pid: &str) {
        let config = self.bundle.path().join("config.json");
        let spec = fs::read_to_string(&config).unwrap();
        let joins = format!(r#"{{"type":"pid","path":"/proc/{pid}/ns/pid"}}"#);
        fs::write(config, spec.replace(r#"{"type":"pid"}"#, &joins)).unwrap();
    }
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_container_is_counted_and_changed_and_stands_still() {
    let data = tempfile::tempdir().unwrap();
    let host = Host::new("alone", TICKING, "", data.path());
    let client = client(&host.bundle.start()).await;
    client.create(within(), &host.create()).await.unwrap();
    start(&client, "alone", "").await;
    until_ticked(data.path(), 0);

    let used = metrics(&client, "alone").await;
    assert_eq!(used.memory.usage_limit, MEMORY);
    assert!(used.memory.usage > 0 && used.memory.usage < MEMORY);
    assert!(used.cpu.usage_usec > 0 && used.pids.current > 0);

    let json = r#"{"memory":{"limit":33554432},"pids":{"limit":40},
        "cpu":{"quota":10000,"period":100000,"cpus":"17"}}"#;
    update(&client, "alone", json).await.unwrap();
    let json = r#"{"memory":{"limit":1099511627776}}"#;
    let refused = update(&client, "alone", json).await.unwrap_err();
    assert!(refused.to_string().contains("machine has"), "{refused}");
    let now = ticks(data.path());
    until_ticked(data.path(), now + 5);
    let used = metrics(&client, "alone").await;
    assert_eq!(used.memory.usage_limit, 32 << 20);
    assert_eq!(used.pids.limit, 40);
    assert!(used.cpu.nr_periods > 0);

    pause(&client, "alone").await;
    assert_eq!(status(&client, "alone").await, Status::PAUSED);
    let stood = ticks(data.path());
    exec(&client, "alone", "e").await;
    let started = StartRequest {
        id: "alone".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    let refused = client.start(within(), &started).await.unwrap_err();
    assert!(refused.to_string().contains("paused"), "{refused}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(ticks(data.path()), stood);
    // Numbers can be had all the same.
    metrics(&client, "alone").await;
    let resume = ResumeRequest {
        id: "alone".into(),
        ..Default::default()
    };
    client.resume(within(), &resume).await.unwrap();
    until_ticked(data.path(), stood);
    start(&client, "alone", "e").await;
    assert_eq!(wait(&client, "alone", "e").await, 0);

    pause(&client, "alone").await;
    kill(&client, "alone").await;
    assert_eq!(wait(&client, "alone", "").await, 137);
    assert_eq!(delete(&client, "alone").await, 137);
    end(&client, &host.bundle).await;
    assert_eq!(
        topics(&host),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/paused",
            "/tasks/exec-added",
            "/tasks/resumed",
            "/tasks/exec-started",
            "/tasks/exit",
            "/tasks/paused",
            "/tasks/exit",
            "/tasks/delete"
        ]
    );
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_child_that_is_killed_for_want_of_memory_is_told_of_while_its_container_runs() {
    let data = tempfile::tempdir().unwrap();
    let script = "tail /dev/zero; read end; exit 3";
    let host = Host::new("alone", script, "", data.path());
    let client = client(&host.bundle.start()).await;
    client.create(within(), &host.create()).await.unwrap();
    let printed = host.reader();
    start(&client, "alone", "").await;

    let begun = Instant::now();
    while !topics(&host).contains(&"/tasks/oom".to_owned()) {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    assert_eq!(status(&client, "alone").await, Status::RUNNING);
    assert_eq!(metrics(&client, "alone").await.memory_events.oom_kill, 1);
    fs::write(host.place("stdin"), "\n").unwrap();
    assert_eq!(wait(&client, "alone", "").await, 3);
    printed.await.unwrap();
    assert_eq!(delete(&client, "alone").await, 3);
    end(&client, &host.bundle).await;
    assert_eq!(
        topics(&host),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/oom",
            "/tasks/exit",
            "/tasks/delete"
        ]
    );
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_container_sees_its_own_processes_or_anothers_or_the_pods() {
    let data = tempfile::tempdir().unwrap();
    let annotations = |kind| {
        format!(
            r#""io.kubernetes.cri.container-type":"{kind}","io.kubernetes.cri.sandbox-id":"pod""#
        )
    };
    let member = annotations("container");
    let ps = "echo $$; for p in /proc/[0-9]*; do cat $p/cmdline; done";
    let pod = Host::new("pod", "", &annotations("sandbox"), data.path());
    let all = Host::new("all", ps, &member, data.path());
    let one = Host::new("one", "exec sleep 1000", &member, data.path());
    let debug = Host::new("debug", ps, &member, data.path());
    let client = client(&pod.bundle.start()).await;
    client.create(within(), &pod.create()).await.unwrap();
    start(&client, "pod", "").await;
    let shim = pod.bundle.pid();
    debug.sees_processes_of(&shim);
    client.create(within(), &one.create()).await.unwrap();
    start(&client, "one", "").await;

    client.create(within(), &debug.create()).await.unwrap();
    let printed = debug.reader();
    start(&client, "debug", "").await;
    assert_eq!(wait(&client, "debug", "").await, 0);
    let printed = printed.await.unwrap();
    assert!(!printed.starts_with("1\n"), "{printed}");
    assert!(printed.contains("sleep"), "{printed}");
    assert!(!printed.contains("infra"), "{printed}");
    assert_eq!(delete(&client, "debug").await, 0);
    assert!(metrics(&client, "pod").await.pids.current >= 1);
    kill(&client, "one").await;
    assert_eq!(wait(&client, "one", "").await, 137);
    assert_eq!(delete(&client, "one").await, 137);

    // Nobody is there whom a path could mean, but the pod.
    all.sees_processes_of(&shim);
    client.create(within(), &all.create()).await.unwrap();
    let printed = all.reader();
    start(&client, "all", "").await;
    assert_eq!(wait(&client, "all", "").await, 0);
    let printed = printed.await.unwrap();
    assert!(printed.contains("infra"), "{printed}");
    assert_eq!(delete(&client, "all").await, 0);

    kill(&client, "pod").await;
    assert_eq!(wait(&client, "pod", "").await, 137);
    assert_eq!(delete(&client, "pod").await, 137);
    end(&client, &pod.bundle).await;
}
