//! What containers use, what they may use, and whose processes they see, as a kubelet asks for it.

use std::time::Duration;

use hull_tests::containerd::Containerd;
use hull_tests::cri::{Cri, CriPod, container};
use hull_tests::eventually;
use k8s_cri::v1::*;

const MIB: i64 = 1 << 20;
/// Uses a processor, and some memory.
const BUSY: &str = "x=x; while :; do x=x$x; [ ${#x} -lt 100000 ] || x=x; done";

fn limited(name: &str, script: &str, memory: i64) -> ContainerConfig {
    let mut config = container(name, script);
    config.linux.as_mut().unwrap().resources = Some(resources(memory));
    config
}

fn resources(memory: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..Default::default()
    }
}

fn used(stats: Option<&CpuUsage>) -> u64 {
    let used = stats.and_then(|cpu| cpu.usage_core_nano_seconds.as_ref());
    used.map(|used| used.value).unwrap_or_default()
}

#[test]
fn a_kubelet_sees_and_changes_what_containers_use() {
    let containerd = Containerd::start();
    let cri = Cri::new(&containerd);
    let pod = CriPod::run(&cri, "amounts");
    let busy = pod.started(limited("busy", BUSY, 64 * MIB));

    let stats = || {
        let container_id = busy.clone();
        let request = ContainerStatsRequest { container_id };
        cri.call(|mut client| async move { client.container_stats(request).await })
            .unwrap()
            .stats
            .unwrap()
    };
    let before = used(stats().cpu.as_ref());
    eventually("the container uses more", Duration::from_secs(10), || {
        (used(stats().cpu.as_ref()) > before).then_some(())
    });
    let memory = stats().memory.unwrap().working_set_bytes.unwrap().value;
    assert!((1..64 << 20).contains(&memory), "{memory}");
    let request = ListPodSandboxStatsRequest { filter: None };
    let all = cri.call(|mut client| async move { client.list_pod_sandbox_stats(request).await });
    let all = all.unwrap().stats;
    assert_eq!(all.len(), 1);
    let linux = all[0].linux.as_ref().unwrap();
    assert_eq!(linux.containers.len(), 1);
    assert!(used(linux.cpu.as_ref()) > 0, "{linux:?}");

    let update = |memory| {
        let request = UpdateContainerResourcesRequest {
            container_id: busy.clone(),
            linux: Some(resources(memory)),
            ..Default::default()
        };
        cri.call(|mut client| async move { client.update_container_resources(request).await })
    };
    update(96 * MIB).unwrap();
    let limit = pod.sh(&busy, "cat /sys/fs/cgroup/memory.max");
    assert_eq!(limit, (96 * MIB).to_string());
    // The machine has less.
    let refused = update(1 << 40).unwrap_err();
    assert!(refused.message().contains("memory"), "{refused}");

    pod.remove();
    containerd.nothing_left();
}

#[test]
fn containers_of_a_pod_may_see_each_others_processes() {
    let containerd = Containerd::start();
    let cri = Cri::new(&containerd);
    let mut config = cri.pod_config("shared");
    let shared = NamespaceOption {
        pid: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let security = config.linux.as_mut().unwrap().security_context.as_mut();
    security.unwrap().namespace_options = Some(shared.clone());
    let pod = CriPod::run_with(&cri, "hull", config);
    let sharing = |name: &str, script: &str| {
        let mut config = container(name, script);
        let security = config.linux.as_mut().unwrap().security_context.as_mut();
        security.unwrap().namespace_options = Some(shared.clone());
        pod.started(config)
    };
    let _ = sharing("one", "exec sleep 54321");
    let two = sharing("two", "exec sleep 100000");

    assert!(pod.sh(&two, "ps").contains("sleep 54321"));

    pod.remove();
    containerd.nothing_left();
}
