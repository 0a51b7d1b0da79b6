//! Pods as containerd asks for them, in machines. Needs what the tests of `hull-machine` need.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

mod amounts;
mod bundle;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bundle::{Bundle, client, runs, until};
use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::TaskClient;
use rustix::process::{Pid, Signal, kill_process};
use ttrpc::context::{self, Context};

/// Generous: emulated machines on a busy host are slow.
const PATIENCE: Duration = Duration::from_secs(300);

fn within() -> Context {
    context::with_duration(PATIENCE)
}

/// A specification as `ctr` writes it.
fn spec(script: &str, annotations: &str, data: &Path) -> String {
    format!(
        r#"{{"ociVersion":"1.0.2","hostname":"named","annotations":{{{annotations}}},
        "process":{{"args":["/bin/busybox","sh","-c",{script:?}],"cwd":"/",
            "env":["PATH=/bin"],"user":{{"uid":0,"gid":0}},"noNewPrivileges":true,
            "rlimits":[{{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}}],
            "capabilities":{{"bounding":["CAP_KILL"],"effective":["CAP_KILL"],"permitted":["CAP_KILL"]}}}},
        "root":{{"path":"rootfs"}},
        "mounts":[{{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]}},
            {{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755"]}},
            {{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","size=65536k"]}},
            {{"destination":"/data","type":"bind","source":{data:?},"options":["rbind","rw","rshared"]}}],
        "linux":{{"namespaces":[{{"type":"pid"}},{{"type":"network"}},{{"type":"mount"}}],
            "cgroupsPath":"/hull-test/{name}",
            "resources":{{"devices":[{{"allow":false,"access":"rwm"}}],"memory":{{"limit":67108864}}}},
            "maskedPaths":["/proc/kcore"]}}}}"#,
        name = data.file_name().unwrap().display(),
    )
}

/// What the pod is made of, but for its machine.
struct Host {
    bundle: Bundle,
}

impl Host {
    fn new(id: &'static str, script: &str, annotations: &str, data: &Path) -> Self {
        let bundle = Bundle::new(id, &spec(script, annotations, data));
        let bin = bundle.path().join("rootfs/bin");
        fs::create_dir(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        fs::set_permissions(bin.join("busybox"), fs::Permissions::from_mode(0o755)).unwrap();
        // What containerd logs.
        let log = bundle.path().join("log");
        std::thread::spawn(move || {
            let mut log = File::open(log).unwrap();
            std::io::copy(&mut log, &mut std::io::stderr()).unwrap();
        });
        Self { bundle }
    }

    fn place(&self, name: &str) -> String {
        self.bundle.path().join(name).display().to_string()
    }

    fn create(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.bundle.id.into(),
            bundle: self.bundle.path().display().to_string(),
            stdin: self.place("stdin"),
            stdout: self.place("stdout"),
            ..Default::default()
        }
    }

    fn reader(&self) -> tokio::task::JoinHandle<String> {
        let path = self.place("stdout");
        tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        })
    }
}

/// The processes in the cgroup of a pod with this data.
fn in_cgroup(data: &Path) -> Vec<String> {
    let cgroup = Path::new("/sys/fs/cgroup/hull-test").join(data.file_name().unwrap());
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    processes.lines().map(String::from).collect()
}

async fn start(client: &TaskClient, id: &str, exec: &str) {
    let request = StartRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    };
    client.start(within(), &request).await.unwrap();
}

async fn wait(client: &TaskClient, id: &str, exec: &str) -> u32 {
    let request = WaitRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    };
    client.wait(within(), &request).await.unwrap().exit_status
}

async fn kill(client: &TaskClient, id: &str) {
    let request = KillRequest {
        id: id.into(),
        signal: 9,
        ..Default::default()
    };
    client.kill(within(), &request).await.unwrap();
}

async fn delete(client: &TaskClient, id: &str) -> u32 {
    let request = DeleteRequest {
        id: id.into(),
        ..Default::default()
    };
    client.delete(within(), &request).await.unwrap().exit_status
}

/// Tells the shim to go, and waits until it has.
async fn end(client: &TaskClient, bundle: &Bundle) {
    let pid = bundle.pid();
    // The answer may be lost with the shim.
    let _ = client.shutdown(within(), &ShutdownRequest::default()).await;
    until(|| !runs(&pid));
    assert_eq!(bundle.delete(), 137);
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_machine_that_is_killed_ends_its_containers() {
    let data = tempfile::tempdir().unwrap();
    let host = Host::new("alone", "sleep 1000", "", data.path());
    let client = client(&host.bundle.start()).await;
    client.create(within(), &host.create()).await.unwrap();
    start(&client, "alone", "").await;
    let shim = host.bundle.pid();
    let machine: Vec<String> = in_cgroup(data.path())
        .into_iter()
        .filter(|pid| *pid != shim)
        .collect();
    assert!(!machine.is_empty());

    for pid in machine {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        // Among them may be one that published an event, and has ended.
        let _ = kill_process(pid, Signal::KILL);
    }

    assert_eq!(wait(&client, "alone", "").await, 137);
    assert_eq!(delete(&client, "alone").await, 137);
    end(&client, &host.bundle).await;
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_shim_that_is_killed_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let host = Host::new("alone", "sleep 1000", "", data.path());
    let client = client(&host.bundle.start()).await;
    client.create(within(), &host.create()).await.unwrap();
    start(&client, "alone", "").await;
    let all = in_cgroup(data.path());
    assert!(all.len() > 1);
    let shim = Pid::from_raw(host.bundle.pid().parse().unwrap()).unwrap();

    kill_process(shim, Signal::KILL).unwrap();

    assert_eq!(host.bundle.delete(), 137);
    until(|| !all.iter().any(|pid| runs(pid)));
    assert_eq!(host.bundle.delete(), 137);
    let name = data.path().file_name().unwrap();
    assert!(!Path::new("/sys/fs/cgroup/hull-test").join(name).exists());
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_container_without_a_pod_is_one_of_its_own() {
    let data = tempfile::tempdir().unwrap();
    fs::write(data.path().join("in"), "of the host").unwrap();
    let script = "read line; echo got $line; cat /data/in; hostname >/data/out; cat; exit 7";
    let host = Host::new("alone", script, "", data.path());
    let client = client(&host.bundle.start()).await;
    let created = client.create(within(), &host.create()).await.unwrap();
    assert_eq!(created.pid.to_string(), host.bundle.pid());
    let printed = host.reader();
    start(&client, "alone", "").await;

    let mut stdin = File::options()
        .write(true)
        .open(host.place("stdin"))
        .unwrap();
    stdin.write_all(b"hello\nrest").unwrap();
    drop(stdin);
    let close = CloseIORequest {
        id: "alone".into(),
        stdin: true,
        ..Default::default()
    };
    client.close_io(within(), &close).await.unwrap();

    assert_eq!(wait(&client, "alone", "").await, 7);
    assert_eq!(printed.await.unwrap(), "got hello\nof the hostrest");
    assert_eq!(
        fs::read_to_string(data.path().join("out")).unwrap(),
        "named\n"
    );
    assert_eq!(delete(&client, "alone").await, 7);
    end(&client, &host.bundle).await;
}

#[tokio::test]
#[ignore = "needs KVM"]
async fn a_sandbox_outlives_its_containers() {
    let data = tempfile::tempdir().unwrap();
    let annotations = |kind| {
        format!(
            r#""io.kubernetes.cri.container-type":"{kind}","io.kubernetes.cri.sandbox-id":"pod""#
        )
    };
    let pod = Host::new("pod", "exit 1", &annotations("sandbox"), data.path());
    let one = Host::new("one", "sleep 1000", &annotations("container"), data.path());
    let two = Host::new("two", "cat /data/x", &annotations("container"), data.path());
    let client = client(&pod.bundle.start()).await;
    client.create(within(), &pod.create()).await.unwrap();
    start(&client, "pod", "").await;
    client.create(within(), &one.create()).await.unwrap();
    start(&client, "one", "").await;

    let pids = PidsRequest {
        id: "one".into(),
        ..Default::default()
    };
    assert!(
        !client
            .pids(within(), &pids)
            .await
            .unwrap()
            .processes
            .is_empty()
    );
    let mut exec = ExecProcessRequest {
        id: "one".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    exec.spec.mut_or_insert_default().value =
        br#"{"args":["/bin/busybox","touch","/data/x"],"cwd":"/","user":{"uid":0,"gid":0}}"#
            .to_vec();
    client.exec(within(), &exec).await.unwrap();
    start(&client, "one", "e").await;
    assert_eq!(wait(&client, "one", "e").await, 0);
    assert!(data.path().join("x").exists());
    kill(&client, "one").await;
    assert_eq!(wait(&client, "one", "").await, 137);
    assert_eq!(delete(&client, "one").await, 137);
    client.create(within(), &two.create()).await.unwrap();
    start(&client, "two", "").await;
    assert_eq!(wait(&client, "two", "").await, 0);
    assert_eq!(delete(&client, "two").await, 0);

    kill(&client, "pod").await;
    assert_eq!(wait(&client, "pod", "").await, 137);
    assert_eq!(delete(&client, "pod").await, 137);
    end(&client, &pod.bundle).await;
}

/// A file with an ext4 file system of what is in a directory.
fn disk_of(directory: &Path, file: &Path) {
    File::create(file).unwrap().set_len(16 << 20).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-d"])
        .arg(directory)
        .arg(file)
        .status();
    assert!(made.unwrap().success());
}

/// The sandbox's root, whatever is in it, makes the machine one with places for disks.
#[tokio::test]
#[ignore = "needs KVM"]
async fn root_file_systems_on_disks_are_the_machines() {
    let data = tempfile::tempdir().unwrap();
    let annotations = |kind| {
        format!(
            r#""io.kubernetes.cri.container-type":"{kind}","io.kubernetes.cri.sandbox-id":"pod""#
        )
    };
    let pod = Host::new("pod", "", &annotations("sandbox"), data.path());
    let script = "grep ' / ' /proc/mounts; echo kept >/kept; ls -l /bin/busybox";
    let host = Host::new("one", script, &annotations("container"), data.path());
    let disk = data.path().join("disk");
    disk_of(&host.bundle.path().join("rootfs"), &disk);
    fs::remove_file(host.bundle.path().join("rootfs/bin/busybox")).unwrap();
    let on_disk = |create: CreateTaskRequest, options: &[&str]| CreateTaskRequest {
        rootfs: vec![Mount {
            type_: "ext4".into(),
            source: disk.display().to_string(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Default::default()
        }],
        ..create
    };
    let client = client(&pod.bundle.start()).await;
    client
        .create(within(), &on_disk(pod.create(), &["ro"]))
        .await
        .unwrap();
    start(&client, "pod", "").await;

    // Twice: a place is free again, with another disk in it.
    for round in 0..2 {
        client
            .create(within(), &on_disk(host.create(), &["loop"]))
            .await
            .unwrap();
        let printed = host.reader();
        start(&client, "one", "").await;
        assert_eq!(wait(&client, "one", "").await, 0, "round {round}");
        let printed = printed.await.unwrap();
        assert!(printed.contains(" / ext4 rw"), "{printed}");
        assert!(printed.contains("/bin/busybox"), "{printed}");
        assert_eq!(delete(&client, "one").await, 0);

        // The guest has let go of it, and all is written.
        let check = Command::new("e2fsck")
            .args(["-fn"])
            .arg(&disk)
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");
        let kept = Command::new("debugfs")
            .args(["-R", "cat /kept"])
            .arg(&disk)
            .output();
        assert_eq!(kept.unwrap().stdout, b"kept\n");
    }
    let mut unknown = on_disk(host.create(), &[]);
    unknown.rootfs[0].type_ = "xfs".into();
    let refused = client
        .create(within(), &unknown)
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("xfs"), "{refused}");

    kill(&client, "pod").await;
    assert_eq!(delete(&client, "pod").await, 137);
    end(&client, &pod.bundle).await;
}
