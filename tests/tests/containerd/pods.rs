//! Pods as a kubelet asks for them.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use hull_tests::containerd::Containerd;
use hull_tests::cri::{Cri, CriPod, LogLine, container, log_lines};
use hull_tests::cri_stream::{CriStream, DATA, STDERR, STDIN, STDOUT};
use hull_tests::{eventually, scaled};
use k8s_cri::v1::*;

const SLEEP: &str = "exec sleep 100000";
/// Says something now and then, serves the pod's port 80, and ends when it is told to.
const SERVER: &str = "trap 'echo ends; exit 3' TERM
mkdir /www; echo served >/www/index.html; httpd -h /www -p 80
echo first; echo second >&2; printf no-newline
while :; do [ ! -e /say ] || { cat /say; rm /say; }; sleep 0.2; done";

fn exec(cri: &Cri, id: &str, script: &str, tty: bool) -> String {
    let request = ExecRequest {
        container_id: id.into(),
        cmd: ["sh", "-c", script].map(String::from).into(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    let answer = cri.call(|mut client| async move { client.exec(request).await });
    answer.expect("exec").url
}

fn attach(cri: &Cri, id: &str, tty: bool) -> String {
    let request = AttachRequest {
        container_id: id.into(),
        stdin: true,
        tty,
        stdout: true,
        stderr: !tty,
    };
    let answer = cri.call(|mut client| async move { client.attach(request).await });
    answer.expect("attach").url
}

fn line(stream: &str, text: &str) -> LogLine {
    LogLine {
        stream: stream.into(),
        partial: false,
        text: text.into(),
    }
}

#[test]
fn two_containers_are_in_one_pod() {
    let containerd = Containerd::start();
    let cri = Cri::new(&containerd);
    let mut config = cri.pod_config("web");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.1.2.3".into()],
        searches: vec!["default.svc.test".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = CriPod::run_with(&cri, "hull", config);
    let status = pod.status();
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.runtime_handler, "hull");

    let server = pod.started(container("server", SERVER));
    let client = pod.started(container("client", SLEEP));

    // One kernel, one network, one hostname; two file systems and process lists.
    let boot = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(pod.sh(&server, boot), pod.sh(&client, boot));
    pod.wait_log("server.log", "first");
    assert_eq!(pod.sh(&client, "wget -qO- http://127.0.0.1/"), "served");
    assert_eq!(pod.sh(&client, "hostname; cat /etc/hostname"), "web\nweb");
    assert_eq!(
        pod.sh(&client, "cat /etc/resolv.conf"),
        "search default.svc.test\nnameserver 10.1.2.3\noptions ndots:5"
    );
    assert_eq!(
        pod.sh(&client, "ls /www 2>&1; ps | grep -c '[h]ttpd' || true"),
        "ls: /www: No such file or directory\n0"
    );
    let address = pod.address();
    assert!(pod.sh(&client, "ip -4 addr show eth0").contains(&address));
    let served = std::process::Command::new("busybox")
        .args(["wget", "-qO-", &format!("http://{address}/")])
        .output()
        .unwrap();
    assert_eq!(served.stdout, b"served\n");
    let _ = pod.sh(
        &client,
        &format!("ping -c 1 -W 60 {}", containerd.gateway()),
    );
    // /dev/shm is the pod's.
    let _ = pod.sh(&server, "echo shared >/dev/shm/file");
    assert_eq!(pod.sh(&client, "cat /dev/shm/file"), "shared");

    let failed = pod.exec(&client, "echo out; echo err >&2; exit 5").unwrap();
    assert_eq!(
        (&*failed.stdout, &*failed.stderr, failed.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 5)
    );

    logs_are_kept_and_reopened(&cri, &pod, &server);
    streams_pass(&cri, &pod, &client);

    // It ends as it wants to, and a further attempt takes its place.
    pod.stop_container(&server, scaled(Duration::from_secs(10)))
        .unwrap();
    assert_eq!(pod.ended(&server).exit_code, 3);
    assert_eq!(pod.container_status(&server).reason, "Error");
    let lines = log_lines(&pod.log_path("server.log"));
    assert_eq!(lines.last(), Some(&line("stdout", "ends")), "{lines:?}");
    let mut again = container("server", "echo again");
    again.metadata.as_mut().unwrap().attempt = 1;
    again.log_path = "server-1.log".into();
    let again = pod.started(again);
    assert_eq!(pod.ended(&again).exit_code, 0);
    assert_eq!(pod.container_status(&again).reason, "Completed");
    assert_eq!(
        log_lines(&pod.log_path("server-1.log")),
        [line("stdout", "again")]
    );

    // The pod outlives its last container.
    for id in [&server, &again, &client] {
        pod.stop_container(id, Duration::ZERO).unwrap();
        pod.remove_container(id).unwrap();
    }
    let mut late = container("client", "cat /dev/shm/file");
    late.metadata.as_mut().unwrap().attempt = 1;
    let late = pod.started(late);
    assert_eq!(pod.ended(&late).exit_code, 0);
    pod.wait_log("client.log", "shared");

    pod.remove();
    containerd.nothing_left();
}

fn logs_are_kept_and_reopened(cri: &Cri, pod: &CriPod<'_>, server: &str) {
    let path = pod.log_path("server.log");
    let lines = eventually("the log", Duration::from_secs(5), || {
        Some(log_lines(&path)).filter(|lines| lines.len() >= 2)
    });
    assert!(lines.contains(&line("stdout", "first")), "{lines:?}");
    assert!(lines.contains(&line("stderr", "second")), "{lines:?}");
    // A kubelet rotates it.
    std::fs::rename(&path, path.with_extension("old")).unwrap();
    let request = ReopenContainerLogRequest {
        container_id: server.into(),
    };
    cri.call(|mut client| async move { client.reopen_container_log(request).await })
        .unwrap();
    let _ = pod.sh(server, "echo new >/new; mv /new /say");
    let lines = pod.wait_log("server.log", "new");
    assert_eq!(lines, [line("stdout", "new")]);
    let old = log_lines(&path.with_extension("old"));
    assert_eq!(old.last().unwrap().text, "no-newline", "{old:?}");
}

fn streams_pass(cri: &Cri, pod: &CriPod<'_>, client: &str) {
    let url = exec(
        cri,
        client,
        "read line; echo \"got $line\"; echo bad >&2; exit 6",
        false,
    );
    let mut stream = CriStream::open(cri, &url);
    stream.send(STDIN, b"a line\n");
    assert_eq!(stream.finish(), Some(6));
    assert_eq!(stream.received(STDOUT), "got a line\n");
    assert_eq!(stream.received(STDERR), "bad\n");

    let url = exec(cri, client, "tty; read go; stty size; read end", true);
    let mut stream = CriStream::open(cri, &url);
    stream.wait_for(STDOUT, "/dev/pts/");
    stream.resize(123, 45);
    // The size comes by a call of its own.
    std::thread::sleep(scaled(Duration::from_millis(200)));
    stream.send(STDIN, b"go\r");
    stream.wait_for(STDOUT, "45 123");
    stream.send(STDIN, b"end\r");
    assert_eq!(stream.finish(), Some(0));

    let mut config = container(
        "shell",
        "echo ready; while read line; do echo \"heard $line\"; done; exit 4",
    );
    config.stdin = true;
    let shell = pod.started(config);
    pod.wait_log("shell.log", "ready");
    let mut stream = CriStream::open(cri, &attach(cri, &shell, false));
    stream.send(STDIN, b"one\n");
    stream.wait_for(STDOUT, "heard one\n");
    drop(stream);
    // Who attaches later finds it as it was.
    let mut stream = CriStream::open(cri, &attach(cri, &shell, false));
    stream.send(STDIN, b"two\n");
    stream.wait_for(STDOUT, "heard two\n");
    pod.stop_container(&shell, Duration::ZERO).unwrap();
    pod.remove_container(&shell).unwrap();

    let mut config = container(
        "terminal",
        "stty size; read line; echo \"heard $line\"; exit 9",
    );
    (config.stdin, config.tty) = (true, true);
    let terminal = pod.started(config);
    let mut stream = CriStream::open(cri, &attach(cri, &terminal, true));
    stream.send(STDIN, b"typed\r");
    stream.wait_for(STDOUT, "heard typed");
    assert_eq!(pod.ended(&terminal).exit_code, 9);
    pod.remove_container(&terminal).unwrap();

    let request = PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![80],
    };
    let answer = cri.call(|mut client| async move { client.port_forward(request).await });
    let url = format!("{}?port=80", answer.unwrap().url);
    let mut stream = CriStream::open(cri, &url);
    stream.send(DATA, b"GET / HTTP/1.0\r\n\r\n");
    stream.wait_for(DATA, "served");
}

/// A profile that refuses as little as the test allows, and is there all the same.
fn security(uid: i64) -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        capabilities: Some(Capability {
            add_capabilities: vec!["NET_ADMIN".into()],
            drop_capabilities: vec!["ALL".into()],
            ..Default::default()
        }),
        run_as_user: Some(Int64Value { value: uid }),
        run_as_group: Some(Int64Value { value: 100 }),
        supplemental_groups: vec![33, 4444],
        readonly_rootfs: true,
        no_new_privs: true,
        seccomp: Some(SecurityProfile::default()),
        masked_paths: vec!["/proc/kcore".into()],
        readonly_paths: vec!["/proc/sys".into()],
        ..hull_tests::cri::security()
    }
}

#[test]
fn containers_have_what_they_ask_for() {
    let containerd = Containerd::start();
    let cri = Cri::new(&containerd);
    let mut config = cri.pod_config("asks");
    config.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port: 18_080,
        ..Default::default()
    }];
    let linux = config.linux.as_mut().unwrap();
    linux.sysctls = [("net.ipv4.ip_unprivileged_port_start".into(), "80".into())].into();
    let pod = CriPod::run_with(&cri, "hull", config);
    let volume = containerd.work_dir().join("volume");
    publish(&volume, "1", "old");

    let mut config = container(
        "secure",
        "mkdir /tmp/www; echo served >/tmp/www/index.html; httpd -h /tmp/www -p 80; exec sleep 100000",
    );
    config.linux.as_mut().unwrap().security_context = Some(security(1000));
    config.working_dir = "/tmp".into();
    config.envs = vec![KeyValue {
        key: "NAMED".into(),
        value: "value".into(),
    }];
    config.mounts = vec![
        Mount {
            container_path: "/etc/config".into(),
            host_path: volume.display().to_string(),
            readonly: true,
            ..Default::default()
        },
        Mount {
            container_path: "/tmp".into(),
            host_path: scratch(&containerd),
            ..Default::default()
        },
    ];
    let secure = pod.started(config);

    assert_eq!(
        pod.sh(&secure, "id -u; id -g; id -G; echo $NAMED; pwd"),
        "1000\n100\n100 33 4444\nvalue\n/tmp"
    );
    let status = pod.sh(&secure, "cat /proc/1/status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default()
            .trim_start_matches(':')
            .trim()
            .to_owned()
    };
    // CAP_NET_ADMIN is bit 12.
    assert_eq!(field("CapBnd"), "0000000000001000");
    assert_eq!(
        (field("Seccomp"), field("NoNewPrivs")),
        ("2".into(), "1".into())
    );
    assert_eq!(field("Groups"), "33 100 4444");
    let refused = pod.sh(
        &secure,
        "(touch /file) 2>&1; (touch /etc/config/file) 2>&1; (echo 1 >/proc/sys/vm/overcommit_memory) 2>&1; true",
    );
    assert_eq!(
        refused.matches("Read-only file system").count(),
        3,
        "{refused}"
    );

    // As the kubelet updates a ConfigMap: by a link that is exchanged.
    assert_eq!(pod.sh(&secure, "cat /etc/config/key"), "old");
    publish(&volume, "2", "new");
    eventually("the new value is seen", Duration::from_secs(10), || {
        (pod.sh(&secure, "cat /etc/config/key") == "new").then_some(())
    });

    let fetched = std::process::Command::new("busybox")
        .args([
            "wget",
            "-qO-",
            &format!("http://{}:18080/", containerd.gateway()),
        ])
        .output()
        .unwrap();
    assert_eq!(fetched.stdout, b"served\n", "{fetched:?}");

    let mut config = container("hungry", "x=x; while :; do x=$x$x; done");
    config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let hungry = pod.started(config);
    let ended = pod.ended(&hungry);
    assert_eq!((ended.exit_code, &*ended.reason), (137, "OOMKilled"));

    let mut config = container("device", SLEEP);
    config.devices = vec![Device {
        container_path: "/dev/kvm".into(),
        host_path: "/dev/kvm".into(),
        permissions: "rw".into(),
    }];
    let id = pod.create(config).unwrap();
    let refused = pod.start(&id).unwrap_err();
    assert!(
        refused.message().contains("/dev/kvm: a device of the host"),
        "{refused}"
    );
    let missing = pod.create(ContainerConfig {
        command: vec!["/no/such/program".into()],
        ..container("missing", "")
    });
    let refused = pod.start(&missing.unwrap()).unwrap_err();
    assert!(refused.message().contains("/no/such/program"), "{refused}");

    pod.remove();
    containerd.nothing_left();
}

/// A directory that everybody may write to.
fn scratch(containerd: &Containerd) -> String {
    let directory = containerd.work_dir().join("scratch");
    std::fs::create_dir(&directory).unwrap();
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o777)).unwrap();
    directory.display().to_string()
}

/// Writes a value into a volume as the kubelet does: a new directory, then the link `..data` to it in one step.
fn publish(volume: &Path, version: &str, value: &str) {
    let directory = format!("..{version}");
    std::fs::create_dir_all(volume.join(&directory)).unwrap();
    std::fs::write(volume.join(&directory).join("key"), value).unwrap();
    symlink(&directory, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    // It is there from the first time.
    let _ = symlink("..data/key", volume.join("key"));
}

#[test]
fn pods_of_one_name_are_apart() {
    let containerd = Containerd::start();
    let cri = Cri::new(&containerd);
    let config = |namespace: &str| {
        let mut config = cri.pod_config(&format!("{namespace}-web"));
        let metadata = config.metadata.as_mut().unwrap();
        metadata.name = "web".into();
        metadata.namespace = namespace.into();
        config
    };
    let one = CriPod::run_with(&cri, "hull", config("one"));
    let two = CriPod::run_with(&cri, "hull", config("two"));
    let boot_ids = [&one, &two].map(|pod| {
        let id = pod.started(container("web", "cat /proc/sys/kernel/random/boot_id"));
        assert_eq!(pod.ended(&id).exit_code, 0);
        log_lines(&pod.log_path("web.log"))
    });
    assert_ne!(boot_ids[0], boot_ids[1]);
    assert_ne!(one.address(), two.address());

    one.remove();

    let id = two.started(container("late", "echo here"));
    assert_eq!(two.ended(&id).exit_code, 0);
    two.remove();
    containerd.nothing_left();
}

/// A directory with a shim that finds no /dev/kvm.
fn without_kvm(directory: &Path) {
    const NAME: &str = "containerd-shim-hull-v2";
    let path = std::env::var_os("PATH").unwrap();
    let mut places = std::env::split_paths(&path);
    let shim = places.find(|place| place.join(NAME).exists()).unwrap();
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mkdir /dev/net && mknod /dev/net/tun c 10 200 && \
         exec \"$@\"' sh {} \"$@\"\n",
        shim.join(NAME).display()
    );
    std::fs::write(directory.join(NAME), script).unwrap();
    std::fs::set_permissions(directory.join(NAME), std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// What `kubectl describe` shows of a pod that can't be.
#[test]
fn a_pod_that_can_not_be_is_told_why() {
    let wrapped = tempfile::tempdir().unwrap();
    without_kvm(wrapped.path());
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", wrapped.path().display());
    for (variable, value, told) in [
        ("HULL_GUEST_DIR", "/nowhere", ["/nowhere", "guest image"]),
        ("HULL_VMM", "/nowhere/hull-vmm", ["/nowhere", "HULL_VMM"]),
        ("PATH", &path, ["/dev/kvm", "hull check"]),
    ] {
        let containerd = Containerd::start_with(&[(variable, value)]);
        let cri = Cri::new(&containerd);
        let error = cri.run_sandbox("hull", &cri.pod_config("not")).unwrap_err();
        for word in told {
            assert!(error.message().contains(word), "{error}");
        }
        let mut config = cri.pod_config("host");
        let linux = config.linux.as_mut().unwrap();
        let security = linux.security_context.as_mut().unwrap();
        security.namespace_options = Some(NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        });
        let error = cri.run_sandbox("hull", &config).unwrap_err();
        assert!(error.message().contains("hostNetwork"), "{error}");
        containerd.nothing_left();
    }
}
