use std::path::Path;

use oci_spec::runtime::Mount;
use serde_json::json;

use super::*;
use crate::images::{Store, test_image};
use crate::manifest;

struct Lab {
    _dir: tempfile::TempDir,
    image: Image,
}

impl Lab {
    /// With an image of this configuration.
    fn new(config: serde_json::Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut image = test_image(&store, dir.path());
        image.config = serde_json::from_value(json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": []}
        }))
        .unwrap();
        Self { _dir: dir, image }
    }

    fn spec(&self, container_fields: &str, pod_fields: &str) -> Result<ContainerSpec, SpecError> {
        let manifest = pod(container_fields, pod_fields);
        container(&manifest, &manifest.containers()[0], &self.image, "u-1")
    }

    fn args(&self, fields: &str) -> Vec<String> {
        process(&self.spec(fields, "").unwrap())
            .args()
            .clone()
            .unwrap()
    }

    fn user(&self, fields: &str, pod_fields: &str) -> String {
        self.spec(fields, pod_fields)
            .map_or_else(|error| error.to_string(), |spec| spec.user)
    }
}

fn pod(container_fields: &str, pod_fields: &str) -> PodManifest {
    let text = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: web, labels: {{app: x}}}}, spec: {{{pod_fields} \
         volumes: [{{name: v, hostPath: {{path: /v}}}}, {{name: m, emptyDir: {{medium: Memory}}}}], \
         containers: [{{name: a, image: x, {container_fields}}}]}}}}"
    );
    manifest::parse("p.yaml", &text).unwrap().remove(0)
}

fn process(spec: &ContainerSpec) -> &oci_spec::runtime::Process {
    spec.spec.process().as_ref().unwrap()
}

fn mount<'a>(spec: &'a ContainerSpec, destination: &str) -> &'a Mount {
    let mounts = spec.spec.mounts().as_ref().unwrap();
    let mut found = mounts
        .iter()
        .filter(|mount| mount.destination() == Path::new(destination));
    let mount = found.next().unwrap();
    assert!(found.next().is_none());
    mount
}

fn describe(mount: &Mount) -> String {
    let options = mount.options().clone().unwrap_or_default().join(",");
    format!("{} {options}", mount.source().as_ref().unwrap().display())
}

#[test]
fn command_and_args_replace_what_kubernetes_says_they_replace() {
    let lab = Lab::new(json!({"Entrypoint": ["entry", "e"], "Cmd": ["cmd"]}));
    assert_eq!(lab.args(""), ["entry", "e", "cmd"]);
    assert_eq!(lab.args("args: [x]"), ["entry", "e", "x"]);
    assert_eq!(lab.args("command: [run]"), ["run"]);
    assert_eq!(lab.args("command: [run], args: [x]"), ["run", "x"]);
    assert_eq!(lab.args("command: [], args: []"), ["entry", "e", "cmd"]);
    assert_eq!(
        Lab::new(json!({"Cmd": ["sh"]})).args("args: [ls, -l]"),
        ["ls", "-l"]
    );
}

#[test]
fn nothing_to_run_is_a_fault() {
    let error = Lab::new(json!({})).spec("", "").unwrap_err().to_string();
    assert_eq!(
        error,
        "p.yaml: spec.containers[0].command: is missing, and image docker.io/library/x:latest has no command either"
    );
}

#[test]
fn variables_are_expanded_from_the_manifest_alone() {
    let lab = Lab::new(json!({"Cmd": ["sh"], "Env": ["PATH=/bin", "A=image", "B=image"]}));
    let spec = lab
        .spec(
            "args: ['$(C) $(PATH) $$(C)'], env: [{name: A, value: one}, {name: C, value: '$(A) $(D)'}, \
             {name: D, value: x}, {name: L, valueFrom: {fieldRef: {fieldPath: \"metadata.labels['app']\"}}}, \
             {name: U, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}]",
            "",
        )
        .unwrap();
    assert_eq!(
        process(&spec).args().clone().unwrap(),
        ["one $(D) $(PATH) $(C)"]
    );
    assert_eq!(
        process(&spec).env().clone().unwrap(),
        [
            "PATH=/bin",
            "A=one",
            "B=image",
            "HOSTNAME=web",
            "C=one $(D)",
            "D=x",
            "L=x",
            "U=u-1"
        ]
    );
}

#[test]
fn the_working_directory_is_the_manifests_or_the_images() {
    let lab = Lab::new(json!({"Cmd": ["sh"], "WorkingDir": "/srv"}));
    assert_eq!(process(&lab.spec("", "").unwrap()).cwd(), Path::new("/srv"));
    assert_eq!(
        process(&lab.spec("workingDir: /x", "").unwrap()).cwd(),
        Path::new("/x")
    );
    let plain = Lab::new(json!({"Cmd": ["sh"]}));
    assert_eq!(process(&plain.spec("", "").unwrap()).cwd(), Path::new("/"));
}

#[test]
fn users_come_from_container_pod_and_image() {
    let lab = Lab::new(json!({"Cmd": ["sh"], "User": "web:www"}));
    let pod_user = "securityContext: {runAsUser: 5},";
    assert_eq!(lab.user("", ""), "web:www");
    assert_eq!(lab.user("", pod_user), "5");
    assert_eq!(
        lab.user("securityContext: {runAsUser: 7, runAsGroup: 8}", pod_user),
        "7:8"
    );
    assert_eq!(lab.user("securityContext: {runAsGroup: 8}", ""), "web:8");
    let root = Lab::new(json!({"Cmd": ["sh"]}));
    assert_eq!(root.user("", ""), "");
    assert_eq!(root.user("securityContext: {runAsGroup: 8}", ""), "0:8");
}

#[test]
fn run_as_non_root_is_kept() {
    let non_root = "securityContext: {runAsNonRoot: true},";
    let with = |user: &str| Lab::new(json!({"Cmd": ["sh"], "User": user}));
    assert!(
        with("")
            .user("", non_root)
            .contains("the image runs as root")
    );
    assert!(
        with("0:5")
            .user("", non_root)
            .contains("would run as user 0")
    );
    assert!(with("web").user("", non_root).contains("has no number"));
    assert_eq!(with("12").user("", non_root), "12");
    assert_eq!(
        with("").user("securityContext: {runAsUser: 3}", non_root),
        "3"
    );
    assert_eq!(
        with("").user("securityContext: {runAsNonRoot: false}", non_root),
        ""
    );
}

#[test]
fn groups_of_the_pod_are_added() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let spec = lab
        .spec(
            "",
            "securityContext: {fsGroup: 5, supplementalGroups: [6, 7]},",
        )
        .unwrap();
    assert_eq!(spec.additional_gids, [5, 6, 7]);
}

#[test]
fn volumes_are_named_as_the_agent_knows_them() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let spec = lab
        .spec(
            "env: [{name: P, value: pod/1}], volumeMounts: [{name: v, mountPath: /deep/er/x, readOnly: true}, \
             {name: v, mountPath: /sub/, subPath: ./a//b}, {name: m, mountPath: dev/shm}, \
             {name: v, mountPath: /e, subPathExpr: $(P)/c, readOnly: true, recursiveReadOnly: Enabled}]",
            "",
        )
        .unwrap();
    assert_eq!(
        describe(mount(&spec, "/deep/er/x")),
        "share:volumes/v rbind,rprivate,ro"
    );
    assert_eq!(
        describe(mount(&spec, "/sub")),
        "share:volumes/v/a/b rbind,rprivate,rw"
    );
    assert_eq!(
        describe(mount(&spec, "/e")),
        "share:volumes/v/pod/1/c rbind,rprivate,rro"
    );
    assert_eq!(
        describe(mount(&spec, "/dev/shm")),
        "memory:m rbind,rprivate,rw"
    );
    let depths: Vec<usize> = spec
        .spec
        .mounts()
        .iter()
        .flatten()
        .map(|mount| mount.destination().components().count())
        .collect();
    assert!(depths.is_sorted(), "{depths:?}");
}

#[test]
fn a_sub_path_expression_must_lead_into_the_volume() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let fault = |value: &str, expression: &str| {
        let fields = format!(
            "env: [{{name: P, value: '{value}'}}], volumeMounts: [{{name: v, mountPath: /e, subPathExpr: {expression}}}]"
        );
        lab.spec(&fields, "").unwrap_err().to_string()
    };
    let place = "p.yaml: spec.containers[0].volumeMounts[0].subPathExpr: ";
    assert_eq!(
        fault("x", "$(Q)"),
        format!("{place}\"$(Q)\": the container has no variable Q")
    );
    assert_eq!(
        fault("/etc", "$(P)"),
        format!("{place}\"$(P)\": becomes \"/etc\", which is not relative")
    );
    assert_eq!(
        fault("../x", "a/$(P)"),
        format!("{place}\"a/../x\": must not contain '..'")
    );
}

#[test]
fn every_container_has_the_usual_mounts() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let spec = lab.spec("", "").unwrap();
    assert_eq!(describe(mount(&spec, "/proc")), "proc nosuid,noexec,nodev");
    assert!(describe(mount(&spec, "/sys")).ends_with(",ro"));
    assert_eq!(
        describe(mount(&spec, "/etc/hosts")),
        "share:etc/hosts rbind,rprivate,rw"
    );
    let read_only = lab
        .spec("securityContext: {readOnlyRootFilesystem: true}", "")
        .unwrap();
    assert_eq!(
        describe(mount(&read_only, "/etc/hosts")),
        "share:etc/hosts rbind,rprivate,ro"
    );
    assert_eq!(
        read_only
            .spec
            .root()
            .as_ref()
            .and_then(|root| root.readonly()),
        Some(true)
    );
    let replaced = lab
        .spec(
            "volumeMounts: [{name: v, mountPath: /etc/hosts, subPath: h}]",
            "",
        )
        .unwrap();
    assert_eq!(
        describe(mount(&replaced, "/etc/hosts")),
        "share:volumes/v/h rbind,rprivate,rw"
    );
}

#[test]
fn resources_become_those_of_a_cgroup() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let limited = lab
        .spec(
            "resources: {limits: {cpu: 1500m, memory: 64Mi}, requests: {cpu: 250m}}",
            "",
        )
        .unwrap();
    let resources = limited
        .spec
        .linux()
        .as_ref()
        .unwrap()
        .resources()
        .clone()
        .unwrap();
    let cpu = resources.cpu().clone().unwrap();
    assert_eq!(
        (cpu.shares(), cpu.quota(), cpu.period()),
        (Some(256), Some(150_000), Some(100_000))
    );
    assert_eq!(resources.memory().unwrap().limit(), Some(64 << 20));
    assert_eq!(resources.pids().unwrap().limit(), 4096);
    let free = lab.spec("", "").unwrap();
    let resources = free
        .spec
        .linux()
        .as_ref()
        .unwrap()
        .resources()
        .clone()
        .unwrap();
    assert_eq!(resources.cpu().clone().unwrap().quota(), None);
    assert!(resources.memory().is_none());
}

#[test]
fn quality_of_service_decides_who_is_killed_first() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let score = |resources: &str| {
        process(
            &lab.spec(&format!("resources: {{{resources}}}"), "")
                .unwrap(),
        )
        .oom_score_adj()
    };
    assert_eq!(score(""), Some(1000));
    assert_eq!(score("limits: {cpu: 1, memory: 1Gi}"), Some(-997));
    assert_eq!(score("requests: {cpu: 1}"), Some(999));
    // 1 GiB of the 2 GiB that such a pod's machine has.
    assert_eq!(score("requests: {memory: 1Gi}"), Some(500));
}

#[test]
fn privileges_follow_the_security_context() {
    let lab = Lab::new(json!({"Cmd": ["sh"]}));
    let plain = lab.spec("", "").unwrap();
    assert_eq!(process(&plain).no_new_privileges(), Some(false));
    assert!(plain.spec.linux().as_ref().unwrap().seccomp().is_some());
    let locked = lab
        .spec(
            "securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}",
            "",
        )
        .unwrap();
    assert_eq!(process(&locked).no_new_privileges(), Some(true));
    let sets = process(&locked).capabilities().clone().unwrap();
    assert_eq!(sets.bounding().as_ref().map(|set| set.len()), Some(0));
    let unconfined = "securityContext: {seccompProfile: {type: Unconfined}}";
    let open = lab.spec(unconfined, "").unwrap();
    assert!(open.spec.linux().as_ref().unwrap().seccomp().is_none());
    let own = lab
        .spec(
            "securityContext: {seccompProfile: {type: RuntimeDefault}}",
            &format!("{unconfined},"),
        )
        .unwrap();
    assert!(own.spec.linux().as_ref().unwrap().seccomp().is_some());
}

#[test]
fn nothing_of_the_librarys_defaults_is_left() {
    let spec = Lab::new(json!({"Cmd": ["sh"]})).spec("", "").unwrap();
    let text = serde_json::to_string(&spec.spec).unwrap();
    assert!(!text.contains("youki"), "{text}");
    let linux = spec.spec.linux().as_ref().unwrap();
    assert!(linux.namespaces().is_none() && linux.devices().is_none() && linux.sysctl().is_none());
    assert!(text.len() < 64 << 10, "{}", text.len());
}

#[test]
fn streams_are_as_the_manifest_says() {
    let lab = Lab::new(json!({"Cmd": ["sh"], "StopSignal": "SIGQUIT"}));
    let spec = lab
        .spec("tty: true, stdin: true, stdinOnce: true", "")
        .unwrap();
    assert!(spec.tty && spec.stdin && spec.stdin_once);
    assert_eq!(spec.stop_signal, 3);
}

#[test]
fn infra_has_what_the_pod_says() {
    let manifest = pod(
        "",
        "hostname: box, shareProcessNamespace: true, securityContext: {sysctls: [{name: net/core/somaxconn, value: '9'}]},",
    );
    let infra = infra(&manifest);
    assert_eq!(infra.hostname, "box");
    assert!(infra.share_process_namespace);
    assert_eq!(
        infra.sysctls,
        [("net.core.somaxconn".to_owned(), "9".to_owned())].into()
    );
    assert_eq!(super::infra(&pod("", "")).hostname, "web");
    assert_eq!(
        super::infra(&pod("", "subdomain: x, setHostnameAsFQDN: true,")).hostname,
        "web.x.default.svc.cluster.local"
    );
}

#[test]
fn the_usual_container_has_nothing_of_a_share() {
    let usual = usual().unwrap();
    let sources: Vec<_> = usual.mounts().iter().flatten().map(Mount::source).collect();
    assert!(sources.len() > 4);
    assert!(!format!("{sources:?}").contains("share:"), "{sources:?}");
    // What is compiled ahead is what a container without wishes has.
    let lab = Lab::new(json!({}));
    let other = lab.spec("command: [sh]", "").unwrap().spec;
    let seccomp = |spec: &Spec| spec.linux().as_ref().unwrap().seccomp().clone();
    assert!(seccomp(&usual).is_some());
    assert_eq!(seccomp(&usual), seccomp(&other));
}
